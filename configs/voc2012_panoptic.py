"""Table 4: panoptic segmentation of PASCAL VOC 2012 with SBD's images.

    python main.py --config=configs/voc2012_panoptic.py --workdir=runs/voc \
        --config.data.root=VOCdevkit --config.data.sbd=SBD \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

After the file's name may come `:resnet50_ws`, `:resnet101_ws` or `:authors`,
see configs/variants.py. Data, weights, time and memory: docs/reproduce.md.

Hardware: 4 GPUs in the paper, an image each. PQ 39.0 (things 37.1, stuff 77.7)
in the paper; not measured here.
"""

import ml_collections

from configs import base, variants


def get_config(variant: str = "resnet18_ws") -> ml_collections.ConfigDict:
  """The paper's setting, 20 things and 1 stuff class."""
  c = base.get_config()
  c.data.name = "voc_panoptic"
  c.data.year = "2012"
  c.proposals.max_proposals = 4000
  return variants.apply(c, variant)
