"""Your own photographs with tags: small data on a CPU.

    python main.py --config=configs/folder.py --config.data.root=DIR \
        --workdir=runs/mine

DIR holds classes.json, images/ and train_tags.csv; for figures also
val_tags.csv, panoptic_val.json and panoptic_val/ (docs/your_own_data.md).

Hardware: a CPU. Backbone: EfficientNet-Lite0 with ImageNet weights, frozen.
MSRC v2 (docs/beyond_the_paper.md), 296 tagged photographs and 98 with masks: PQ
66.1 (things 63.0, stuff 73.8), --config.seed=0, 1 and 2 between 65.1 and 67.1;
15 minutes on one core.
"""

import ml_collections

from configs import small_data


def get_config() -> ml_collections.ConfigDict:
  """Both ways up, in two sizes; features of two stages; bins tied."""
  c = small_data.get_config()
  c.data.canvases = ((320, 480), (480, 320), (480, 720), (720, 480))
  c.evaluation.canvases = c.data.canvases
  c.proposals.num_superpixels = 300
  c.proposals.max_proposals = 400
  c.backbone.outputs = ("stage5", "head")
  c.pooling.reduce = "mean"
  c.cells.enabled = True
  c.train.steps = 1000
  c.train.boundaries = (700,)
  c.reestimation.start = 700
  return c
