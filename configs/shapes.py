"""The embedded data set with a pretrained backbone: the demo.

    python main.py --config=configs/shapes.py --workdir=runs/demo

Hardware: 2 CPU cores. Backbone: EfficientNet-Lite0 with ImageNet weights,
frozen.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  """Settings for small data on a CPU, see docs/decisions.md."""
  c = base.get_config()
  c.data.name = "shapes"
  c.data.canvases = ((320, 320),)
  c.data.eval_canvases = ((320, 320),)
  c.data.colour_factor = 1.0
  c.proposals.num_superpixels = 200
  c.proposals.max_proposals = 256

  c.backbone.name = "efficientnet_lite0"
  c.backbone.pretrained = "imagenet"
  c.backbone.stride = 16
  c.backbone.outputs = ("stage3", "stage5", "head")
  c.backbone.projection = 64

  c.pooling.availability = "coverage"
  c.pooling.output_size = (4, 4)
  c.pooling.average = True
  c.pooling.center = True
  c.pooling.size_exponents = (0.25, 0.5)
  c.neck.widths = ()
  c.neck.input_dropout = 0.5
  c.neck.share_input_dropout = True
  c.heads.num_refinements = 3

  c.instance.channels = 64
  c.semantic.channels = 64
  c.reestimation.longest_side = 160
  c.reestimation.start = 1000
  c.losses.instances_per_image = 8

  c.train.steps = 1300
  c.train.batch_size = 8
  c.train.optimizer = "adamw"
  c.train.learning_rate = 1e-3
  c.train.boundaries = (900,)
  c.train.weight_decay = 0.1
  c.train.log_every = 50
  c.train.checkpoint_every = 500
  c.train.evaluate_every = 5000

  c.evaluation.calibrate = True
  c.evaluation.mil_share = 0.5
  c.evaluation.mask_share = 0.6
  c.evaluation.semantic_share = 0.5
  c.evaluation.batch_size = 8
  return c
