"""Table 7: instance segmentation of COCO, tags of things alone.

    python main.py --config=configs/coco_instance.py \
        --workdir=runs/coco_instance --config.data.root=coco \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

Variants and what is needed: as configs/voc2012_panoptic.py.

Hardware: 4 GPUs in the paper. AP of masks 6.1, at IoU 0.5 12.1, at 0.75 5.0 in
the paper; not measured here.
"""

import ml_collections

from configs import coco_panoptic


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """Without the semantic branch."""
  c = coco_panoptic.get_config(variant)
  c.task = "instance"
  c.data.name = "coco_instances"
  return c
