"""Table 6: instance segmentation of PASCAL VOC 2012, tags of things alone.

    python main.py --config=configs/voc2012_instance.py \
        --workdir=runs/voc_instance --config.data.root=VOCdevkit \
        --config.data.sbd=SBD \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

Variants and what is needed: as configs/voc2012_panoptic.py.

Hardware: 4 GPUs in the paper. mAP of masks at IoU 0.5 44.2, at 0.75 12.0 in the
paper; not measured here.
"""

import ml_collections

from configs import voc2012_panoptic


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """Without the semantic branch."""
  c = voc2012_panoptic.get_config(variant)
  c.task = "instance"
  return c
