"""The whole program in seconds: drawn pictures of 64 pixels, a narrow network.

    python main.py --config=tests/configs/tiny.py --workdir=runs/tiny
    python main.py --config=tests/configs/tiny.py:frozen --workdir=runs/frozen

Hardware: 1 CPU core. It learns nothing: only the tests use it.
"""

import ml_collections

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Every part of the program at its smallest.

  Args:
    variant: "" trains the backbone and waits for each mask; "frozen" freezes it
      after the warm-up, keeps its features on disk, and learns from the masks
      two steps later.
  """
  c = base.get_config()
  c.data.name = "shapes"
  c.data.shapes.num_train = 12
  c.data.shapes.num_val = 6
  c.data.shapes.side = 64
  c.data.canvases = ((64, 64),)
  c.evaluation.canvases = ((64, 64),)
  c.proposals.network = False
  c.proposals.num_superpixels = 24
  c.proposals.max_proposals = 32
  c.proposals.num_workers = 1

  c.backbone.width = 0.125
  c.backbone.norm = "group"
  c.backbone.freeze = "none"
  c.pooling.output_size = (2, 2)
  c.neck.widths = (16,)
  c.heads.num_refinements = 2
  c.instance.channels = 8
  c.instance.num_convs = 1
  c.semantic.channels = 8
  c.reestimation.iterations = 1
  c.reestimation.longest_side = 32
  c.losses.instances_per_image = 4

  c.warm_up.steps = 2
  c.warm_up.batch_size = 4
  c.train.steps = 12
  c.train.batch_size = 2
  c.train.learning_rate = 1e-3
  c.train.boundaries = (8,)
  c.train.log_every = 2
  c.train.checkpoint_every = 5
  c.train.evaluate_every = 8
  c.evaluation.batch_size = 3
  c.evaluation.calibrate = True
  c.evaluation.pictures = 1
  if variant == "frozen":
    c.backbone.freeze = "all"
    c.data.colour_factor = 1.0  # or nothing could be cached
    c.backbone.norm = "batch"
    c.backbone.projection = 8
    c.pooling.center = True
    c.cells.enabled = True
    c.reestimation.lag = 2
  return c
