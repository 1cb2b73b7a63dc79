"""Table 8: object detection of PASCAL VOC 2007, tags of things alone.

    python main.py --config=configs/voc2007_detection.py \
        --workdir=runs/voc2007 --config.data.root=VOCdevkit \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

Variants and what is needed: as configs/voc2012_panoptic.py.

Hardware: 4 GPUs in the paper. mAP 53.4, CorLoc 71.4 in the paper; not measured
here.
"""

import ml_collections

from configs import voc2012_detection


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """As for VOC 2012, measured as VOC 2007 is."""
  c = voc2012_detection.get_config(variant)
  c.data.year = "2007"
  c.evaluation.voc_metric = "11point"
  return c
