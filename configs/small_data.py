"""What configs/shapes.py and configs/folder.py share: hundreds of images.

Hardware: 2 CPU cores. Backbone: EfficientNet-Lite0 with ImageNet weights,
frozen, its features kept on disk. docs/decisions.md says why each choice
differs from the paper's.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  """Settings for hundreds of images on a CPU; canvases are left to choose."""
  c = base.get_config()
  c.data.colour_factor = 1.0

  c.backbone.name = "efficientnet_lite0"
  c.backbone.pretrained = "imagenet"
  c.backbone.stride = 16
  c.backbone.outputs = ("head",)
  c.backbone.projection = 128

  c.pooling.availability = "coverage"
  c.pooling.average = True
  c.pooling.center = True
  c.pooling.size_exponents = (0.25, 0.5)
  c.neck.widths = ()
  c.neck.input_dropout = 0.5
  c.heads.num_refinements = 3

  c.instance.channels = 64
  c.semantic.channels = 64
  c.reestimation.longest_side = 160
  c.reestimation.iterations = 2  # less time than 5, nearly the same masks
  c.losses.instances_per_image = 8

  c.train.batch_size = 8
  c.train.optimizer = "adamw"
  c.train.learning_rate = 1e-3
  c.train.weight_decay = 0.1
  c.train.log_every = 50
  c.train.checkpoint_every = 500
  c.train.evaluate_every = 5000  # not before the end

  c.evaluation.calibrate = True
  c.evaluation.show_present = True
  c.evaluation.outline_rounds = 2
  c.evaluation.nms_iou = 0.3
  c.evaluation.mil_share = 0.5
  c.evaluation.mask_share = 0.6
  c.evaluation.semantic_share = 0.5
  c.evaluation.batch_size = 8
  return c
