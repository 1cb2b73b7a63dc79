"""Your own photographs with tags: small data on a CPU.

    python main.py --config=configs/folder.py --config.data.root=DIR \
        --workdir=runs/mine

DIR holds classes.json, images/ and train_tags.csv; for figures also
val_tags.csv, panoptic_val.json and panoptic_val/ (docs/your_own_data.md).

Hardware: 2 CPU cores, minutes per hundred images. Backbone: EfficientNet-Lite0
with ImageNet weights, frozen.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  """Settings for a few hundred photographs, see docs/decisions.md."""
  c = base.get_config()
  c.data.canvases = ((320, 480), (480, 320))
  c.data.eval_canvases = ((320, 480), (480, 320))
  c.data.colour_factor = 1.0
  c.proposals.num_superpixels = 300
  c.proposals.max_proposals = 400

  c.backbone.name = "efficientnet_lite0"
  c.backbone.pretrained = "imagenet"
  c.backbone.stride = 16
  c.backbone.outputs = ("head",)
  c.backbone.projection = 128

  c.pooling.availability = "coverage"
  c.pooling.reduce = "mean"
  c.pooling.average = True
  c.pooling.center = True
  c.pooling.size_exponents = (0.25, 0.5)
  c.neck.widths = ()
  c.neck.input_dropout = 0.5
  c.heads.num_refinements = 3

  c.instance.channels = 64
  c.semantic.channels = 64
  c.reestimation.longest_side = 160
  c.reestimation.start = 700
  c.losses.instances_per_image = 8

  c.train.steps = 1000
  c.train.batch_size = 8
  c.train.optimizer = "adamw"
  c.train.learning_rate = 1e-3
  c.train.boundaries = (700,)
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
