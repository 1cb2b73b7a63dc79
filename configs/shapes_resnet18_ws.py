"""The embedded data set with the paper's backbone, narrow and from scratch.

    python main.py --config=configs/shapes_resnet18_ws.py --workdir=runs/ws

Hardware: 2 CPU cores. PQ 57.9 (things 48.2, stuff 77.4), seed 0. There are no
ImageNet weights here: the backbone first learns the tags from the globally
pooled map, then it is frozen, as the authors freeze theirs.
"""

import ml_collections

from configs import shapes


def get_config() -> ml_collections.ConfigDict:
  """The settings of configs/shapes.py with another backbone."""
  c = shapes.get_config()
  c.data.canvases = ((160, 160),)
  c.evaluation.canvases = ((160, 160),)
  c.proposals.network = False  # nothing here has seen ImageNet
  c.backbone.name = "resnet_ws"
  c.backbone.pretrained = ""
  c.backbone.depth = 18
  c.backbone.width = 0.25
  c.backbone.norm = "batch"
  c.backbone.outputs = ("res3", "res4", "res5")
  c.warm_up.steps = 2000
  c.warm_up.batch_size = 16
  c.warm_up.learning_rate = 2e-3
  return c
