"""Table 8: object detection of COCO, tags of things alone.

    python main.py --config=configs/coco_detection.py \
        --workdir=runs/coco_detection --config.data.root=coco \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

Variants and what is needed: as configs/voc2012_panoptic.py.

Hardware: 4 GPUs in the paper. AP of boxes 9.4, at IoU 0.5 21.3, at 0.75 7.9 in
the paper; not measured here.
"""

import ml_collections

from configs import coco_instance


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """The mining branch alone."""
  c = coco_instance.get_config(variant)
  c.task = "detection"
  c.evaluation.nms_kind = "boxes"
  return c
