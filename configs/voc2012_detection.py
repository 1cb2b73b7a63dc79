"""Table 8: object detection of PASCAL VOC 2012, tags of things alone.

    python main.py --config=configs/voc2012_detection.py \
        --workdir=runs/voc_detection --config.data.root=VOCdevkit \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

Variants and what is needed: as configs/voc2012_panoptic.py. CorLoc is measured
here; mAP by VOC's server, which gets WORKDIR/evaluation/results
(docs/reproduce.md).

Hardware: 4 GPUs in the paper. mAP 51.5, CorLoc 72.5 in the paper; not measured
here.
"""

import ml_collections

from configs import base, variants


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """The mining branch alone."""
  c = base.get_config()
  c.task = "detection"
  c.data.name = "voc_detection"
  c.data.year = "2012"
  c.proposals.max_proposals = 4000
  c.evaluation.nms_kind = "boxes"
  return variants.apply(c, variant)
