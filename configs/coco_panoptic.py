"""Table 5: panoptic segmentation of COCO, 80 things and 53 stuff classes.

    python main.py --config=configs/coco_panoptic.py --workdir=runs/coco \
        --config.data.root=coco \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

Variants and what is needed: as configs/voc2012_panoptic.py.

Hardware: 4 GPUs in the paper. PQ 5.3 (things 8.4, stuff 0.7) in the paper; not
measured here.
"""

import ml_collections

from configs import base, variants


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """Four times the schedule of VOC."""
  c = base.get_config()
  c.data.name = "coco_panoptic"
  c.proposals.max_proposals = 4000
  c.train.steps = 400_000  # "4x"
  c.train.boundaries = (280_000,)
  c.train.evaluate_every = 100_000
  return variants.apply(c, variant)
