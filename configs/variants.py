"""The backbones of the paper, and the settings of the authors' code.

The configurations of the paper's tables take one of these names after a colon:

    --config=configs/voc2012_panoptic.py:resnet50_ws
    --config=configs/voc2012_panoptic.py:authors

"authors" has what their released code does where the paper says otherwise. Of
that code it has not:

- the boxes that each refinement head regresses, and refinement heads without
  stuff; features times the proposal's own score + 1;
- masks that GrabCut makes of ten boxes of a class, each proposal learning from
  the nearest; pseudo masks of stuff from S^MIL, with all the rest as things;
- the second mask head that learns from the first; all foreground proposals in
  Eq. 9 (64 an image are drawn here); on COCO one convolution of 128 channels
  with group norm in the semantic branch (two of 256 here);
- 24 training sizes (12 here), sides that keep each image's aspect, brightness
  and blending in place of HSV;
- a stuff segment's least area of 4,096 pixels in an image of any size.
"""

import ml_collections

NAMES = ("resnet18_ws", "resnet50_ws", "resnet101_ws", "authors")


def apply(
  config: ml_collections.ConfigDict, name: str
) -> ml_collections.ConfigDict:
  """Changes a configuration of a table, and returns it.

  Raises:
    ValueError: there is no such variant.
  """
  if name not in NAMES:
    raise ValueError(f"variant {name!r}: wanted one of {', '.join(NAMES)}")
  if name == "authors":
    return _authors(config)
  config.backbone.depth = int(name.removeprefix("resnet").removesuffix("_ws"))
  if config.backbone.depth > 18:
    config.neck.widths = (2048, 4096)  # as the weights that come with it
  return config


def _authors(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  is_coco = c.data.name.startswith("coco")
  c.data.crop = 0.9
  c.data.annotation_source = "sbd"
  c.pooling.compensation = "official"
  c.pooling.sampling_ratio = 0
  c.mining.segments_per_stuff = 1
  c.mining.iou_kind = "boxes"
  c.semantic.enabled = is_coco  # on VOC, stuff is what no instance claims
  c.reestimation.init = "rectangle"
  c.losses.mil_reduction = "mean"
  c.losses.weight_instances = False
  c.train.bias_lr_factor = 2.0
  c.train.steps = 240_000 if is_coco else 50_000
  c.train.boundaries = (140_000, 200_000) if is_coco else (35_000,)
  c.evaluation.canvases = tuple(
    canvas
    for short in (480, 576, 672, 768, 864, 960, 1056, 1152)
    for canvas in ((short, short * 4 // 3), (short * 4 // 3, short))
  )
  c.evaluation.nms_iou = 0.3
  c.evaluation.nms_kind = "boxes"
  return c
