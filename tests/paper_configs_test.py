"""The configurations of the paper's tables, number by number.

The numbers are copied from the paper, and those of "authors" from what is
known of the released code; section numbers are the paper's.
"""

import importlib

import pytest
from flax.traverse_util import flatten_dict

from configs import ablations, base

PAPER = {
  # Section 3.2.
  "neck.widths": (4096, 4096),
  "neck.dropout": 0.5,
  "neck.input_dropout": 0.0,
  "heads.num_refinements": 4,
  "mining.segments_per_thing": 1,
  "mining.foreground_iou": 0.5,
  "mining.background_iou": (0.0, 0.5),
  "mining.iou_kind": "masks",
  "losses.mil_reduction": "sum",
  # Section 3.3.
  "pooling.kind": "moi",
  "pooling.output_size": (7, 7),
  "pooling.compensation": "bins",
  "pooling.availability": "any",
  "pooling.sampling_ratio": 2,
  "pooling.reduce": "flatten",
  "pooling.average": False,
  "pooling.center": False,
  "pooling.size_exponents": (0.0, 0.0),
  # Section 3.4.
  "instance.enabled": True,
  "instance.channels": 256,
  "instance.num_convs": 4,
  "semantic.enabled": True,
  "semantic.channels": 256,
  "reestimation.init": "segment",
  "reestimation.iterations": 5,
  "reestimation.longest_side": 400,
  "reestimation.start": 0,
  "losses.weight_instances": True,
  "losses.instances_per_image": 64,
  # Section 4.1.
  "task": "panoptic",
  "backbone.name": "resnet_ws",
  "backbone.depth": 18,
  "backbone.width": 1.0,
  "backbone.norm": "frozen",
  "backbone.stride": 8,
  "backbone.outputs": ("res5",),
  "backbone.projection": 0,
  "backbone.freeze": "all",
  "proposals.num_superpixels": 1600,
  "data.flip": True,
  "data.crop": 1.0,
  "data.colour_factor": 1.5,
  "train.steps": 100_000,
  "train.boundaries": (70_000,),
  "train.batch_size": 4,
  "train.optimizer": "sgd",
  "train.learning_rate": 0.01,
  "train.momentum": 0.9,
  "train.weight_decay": 5e-4,
  "train.bias_lr_factor": 1.0,
  "train.ema_decay": 0.0,
  "train.rise": 0,
  "train.reference_batch_size": 0,
  "warm_up.steps": 0,
  "evaluation.canvases": (
    *((480, 640), (640, 480), (576, 768), (768, 576), (688, 928), (928, 688)),
    *((864, 1152), (1152, 864), (1200, 1600), (1600, 1200)),
  ),
  "evaluation.flip": True,
  "evaluation.nms_iou": 0.5,
  "evaluation.nms_kind": "masks",
  "evaluation.max_detections": 100,
  "evaluation.mask_share": 1.0,
  "evaluation.semantic_share": 1.0,
  "evaluation.voc_metric": "area",
  # Detectron2's, where the paper says nothing.
  "evaluation.instance_score": 0.5,
  "evaluation.instance_overlap": 0.5,
  "evaluation.stuff_area": 4096 / (500 * 375),
  # Part of no paper.
  "cells.enabled": False,
  "evaluation.mil_share": 0.0,
  "evaluation.calibrate": False,
  "evaluation.show_present": False,
  "evaluation.outline_rounds": 0,
}

VOC = {"data.name": "voc_panoptic", "proposals.max_proposals": 4000}
VOC_BOXES = {
  "task": "detection",
  "data.name": "voc_detection",
  "proposals.max_proposals": 4000,
  "evaluation.nms_kind": "boxes",
}
COCO = {
  "data.name": "coco_panoptic",
  "proposals.max_proposals": 4000,
  "train.steps": 400_000,
  "train.boundaries": (280_000,),
  "train.evaluate_every": 100_000,
}
COCO_THINGS = {**COCO, "data.name": "coco_instances"}
AUTHORS = {
  "data.crop": 0.9,
  "data.annotation_source": "sbd",
  "pooling.compensation": "official",
  "pooling.sampling_ratio": 0,
  "mining.segments_per_stuff": 1,
  "mining.iou_kind": "boxes",
  "reestimation.init": "rectangle",
  "losses.mil_reduction": "mean",
  "losses.weight_instances": False,
  "train.bias_lr_factor": 2.0,
  "evaluation.canvases": (
    *((480, 640), (640, 480), (576, 768), (768, 576), (672, 896), (896, 672)),
    *((768, 1024), (1024, 768), (864, 1152), (1152, 864)),
    *((960, 1280), (1280, 960), (1056, 1408), (1408, 1056)),
    *((1152, 1536), (1536, 1152)),
  ),
  "evaluation.nms_iou": 0.3,
  "evaluation.nms_kind": "boxes",
}
AUTHORS_VOC = {
  **AUTHORS,
  "semantic.enabled": False,
  "train.steps": 50_000,
  "train.boundaries": (35_000,),
}
AUTHORS_COCO = {
  **AUTHORS,
  "train.steps": 240_000,
  "train.boundaries": (140_000, 200_000),
}
DEEPER = {"neck.widths": (2048, 4096)}
AS_MINED = {"reestimation.init": "none"}

# What differs from configs/base.py.
ROWS = {
  ("voc2012_panoptic",): VOC,
  ("voc2012_instance",): {**VOC, "task": "instance"},
  ("voc2012_detection",): VOC_BOXES,
  ("voc2007_detection",): {
    **VOC_BOXES,
    "data.year": "2007",
    "evaluation.voc_metric": "11point",
  },
  ("coco_panoptic",): COCO,
  ("coco_instance",): {**COCO_THINGS, "task": "instance"},
  ("coco_detection",): {
    **COCO_THINGS,
    "task": "detection",
    "evaluation.nms_kind": "boxes",
  },
  ("voc2012_panoptic", "resnet18_ws"): VOC,
  ("voc2012_panoptic", "resnet50_ws"): {
    **VOC,
    **DEEPER,
    "backbone.depth": 50,
  },
  ("coco_panoptic", "resnet101_ws"): {
    **COCO,
    **DEEPER,
    "backbone.depth": 101,
  },
  ("voc2012_panoptic", "authors"): {**VOC, **AUTHORS_VOC},
  ("voc2007_detection", "authors"): {
    **VOC_BOXES,
    "data.year": "2007",
    "evaluation.voc_metric": "11point",
    **AUTHORS_VOC,
  },
  ("coco_panoptic", "authors"): {**COCO, **AUTHORS_COCO},
  ("coco_instance", "authors"): {
    **COCO_THINGS,
    **AUTHORS_COCO,
    "task": "instance",
  },
  # Tables 1 to 3.
  ("ablations", "roi_pool"): {**VOC, "pooling.kind": "roi"},
  ("ablations", "roi_align"): {**VOC, "pooling.kind": "roi_align"},
  ("ablations", "shape_interpolation"): {**VOC, "pooling.kind": "tps"},
  ("ablations", "shape_invariant"): VOC,
  ("ablations", "mining"): {
    **VOC,
    "instance.enabled": False,
    "semantic.enabled": False,
  },
  ("ablations", "instance"): {**VOC, **AS_MINED, "semantic.enabled": False},
  ("ablations", "semantic"): {**VOC, **AS_MINED, "instance.enabled": False},
  ("ablations", "both"): {**VOC, **AS_MINED},
  ("ablations", "reestimated"): VOC,
  **{
    ("ablations", f"refinements_{n}"): {**VOC, "heads.num_refinements": n}
    for n in (0, 1, 2, 3, 5)
  },
  ("ablations", "refinements_4"): VOC,
}


def _fields(config) -> dict:
  return flatten_dict(config.to_dict(), sep=".")


def test_defaults_are_the_paper():
  fields = _fields(base.get_config())
  assert {name: fields[name] for name in PAPER} == PAPER


@pytest.mark.parametrize("orientation", [1, -1])
def test_training_sizes_are_those_of_section_4_1(orientation):
  canvases = [
    canvas[::orientation]
    for canvas in base.get_config().data.canvases
    if (canvas[0] < canvas[1]) == (orientation == 1)
  ]
  shorts = [short for short, _ in canvases]
  assert (shorts[0], shorts[-1], len(set(shorts))) == (480, 1216, 12)
  assert shorts == sorted(shorts)
  for short, long in canvases:
    assert short % 32 == long % 32 == 0
    # An image of 3 : 4 has the short side, and less than 32 are left over.
    assert 0 <= long - short * 4 / 3 < 32


@pytest.mark.parametrize("row", ROWS, ids=":".join)
def test_rows_differ_from_the_defaults_in_nothing_else(row):
  file, *name = row
  config = importlib.import_module(f"configs.{file}").get_config(*name)
  defaults = _fields(base.get_config())
  changed = {
    name: value
    for name, value in _fields(config).items()
    if value != defaults[name]
  }
  assert changed == ROWS[row]


def test_each_row_of_tables_1_to_3_is_looked_at():
  looked_at = {name for file, *names in ROWS for name in names}
  assert set(ablations.ROWS) <= looked_at
