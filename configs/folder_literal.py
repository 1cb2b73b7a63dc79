"""Your own photographs with the paper's choices, at the size of small data.

    python main.py --config=configs/folder_literal.py --config.data.root=DIR \
        --workdir=runs/literal

To compare with configs/folder.py, whose choices serve small data. Pooling,
compensation, heads, mining, losses, SGD and fusion are the paper's. Smaller
are: canvases, superpixels (300) and proposals (400), branches (64 channels, 8
instances an image), GrabCut (160 pixels) and the schedule; and there is no
colour augmentation. The backbone is another one, for which the package index
has ImageNet weights, at stride 16 and with its features projected to 128
channels; so the neck starts at random, where the paper's comes with the
backbone, and has 1,024 units, not 4,096. From there the paper's learning rate
of 0.01 diverges, and --config.train.learning_rate=0.002 does after 400 steps.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  """Sections 3 and 4.1 on small canvases."""
  c = base.get_config()
  c.data.canvases = ((320, 480), (480, 320))
  c.evaluation.canvases = ((320, 480), (480, 320))
  c.data.colour_factor = 1.0
  c.proposals.num_superpixels = 300
  c.proposals.max_proposals = 400
  c.backbone.name = "efficientnet_lite0"
  c.backbone.pretrained = "imagenet"
  c.backbone.stride = 16
  c.backbone.outputs = ("head",)
  c.backbone.projection = 128
  c.neck.widths = (1024, 1024)
  c.reestimation.longest_side = 160
  c.instance.channels = 64
  c.semantic.channels = 64
  c.losses.instances_per_image = 8
  c.train.steps = 1000
  c.train.learning_rate = 1e-3
  c.train.boundaries = (700,)
  c.train.log_every = 50
  c.train.checkpoint_every = 500
  return c
