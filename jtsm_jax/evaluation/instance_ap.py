"""Average precision (AP) of instances: COCO's, and that of mask IoU in VOC."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

import numpy as np
from pycocotools import coco, cocoeval
from pycocotools import mask as mask_utils

from jtsm_jax.data.run_lengths import read_runs
from jtsm_jax.evaluation.average_precision import (
  MatchedImage,
  check_image,
  class_results,
  match_image,
  merge_images,
)
from jtsm_jax.types import Categories, Detections, Instances

try:
  import hotcoco
except ImportError:  # optional: the extra "fast"
  hotcoco = None

KINDS = ("segm", "bbox")
AREAS = ("all", "small", "medium", "large")
_LOWER, _UPPER = (0, 0, 32**2, 96**2), (1e10, 32**2, 96**2, 1e10)


@dataclasses.dataclass
class InstanceAP:
  """COCO's AP (Lin et al., Microsoft COCO, ECCV 2014) by pycocotools.

  The mean over IoU 0.50, 0.55, ... 0.95 of the precision at 101 recalls, of the
  100 best detections of each image and class. Objects flagged as difficult
  count as any others: COCO knows no such flag.

  Attributes:
    categories: the classes; the things count.
    kind: "segm", IoU of the masks, or "bbox", of the boxes.
    fast: compute by hotcoco, which gives the same values, instead of by
      pycocotools (`pip install 'jtsm_jax[fast]'`).
    images: what was added, by image id: detections and ground truth as COCO's
      annotations without ids, and the masks' height and width.
  """

  categories: Categories
  kind: str = "segm"
  fast: bool = False
  images: dict[str, tuple[list[dict], list[dict], list[int]]] = (
    dataclasses.field(default_factory=dict)
  )

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"kind is {self.kind!r}, wanted one of {KINDS}")
    if self.fast and hotcoco is None:
      raise ImportError(
        "fast=True needs hotcoco: pip install 'jtsm_jax[fast]', or leave it out"
      )

  def add(
    self, image_id: str, detections: Detections, instances: Instances
  ) -> None:
    """Keeps one image, its masks as run lengths.

    Args:
      image_id: unique among the images.
      detections: what the model gave; the kind "bbox" reads no masks.
      instances: the ground truth; with `rles` for the kind "segm".

    Raises:
      ValueError: the image was added before, arrays differ in length, a score
        is no number, a category is no class index of a thing, or masks are
        absent or of another size.
    """
    check_image(
      image_id,
      detections,
      instances,
      seen=self.images,
      categories=self.categories,
    )
    size = [0, 0]  # is read with masks only
    mine, truth = [None] * len(detections.score), [None] * len(instances.area)
    if self.kind == "segm":
      mine, truth = _run_lengths(image_id, detections, instances)
      size = list(detections.size)
    found = [
      {"category_id": int(c) + 1, "score": float(s)}
      | ({"bbox": _xywh(box)} if rle is None else {"segmentation": rle})
      for c, s, box, rle in zip(
        detections.category,
        detections.score,
        detections.boxes,
        mine,
        strict=True,
      )
    ]
    actual = [
      {
        "category_id": int(c) + 1,
        "bbox": _xywh(box),
        "area": float(area),
        "iscrowd": int(crowd),
      }
      | ({} if rle is None else {"segmentation": rle})
      for c, box, area, crowd, rle in zip(
        instances.category,
        instances.boxes,
        instances.area,
        instances.is_crowd,
        truth,
        strict=True,
      )
    ]
    self.images[image_id] = found, actual, size

  def merge(self, other: InstanceAP) -> InstanceAP:
    """Adds the images of `other` to these, and returns these.

    Raises:
      ValueError: the two count different categories or kinds, or both have an
        image.
    """
    if self.kind != other.kind:
      raise ValueError(f"cannot merge AP of {other.kind!r} into {self.kind!r}")
    merge_images(self, other)
    return self

  def result(self) -> dict[str, Any]:
    """In percent; independent of the order of the images.

    Returns:
      {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large": float, 0 ..
      100, means over the classes with such objects; "n": classes with objects;
      "objects": {"all", "small", "medium", "large": int}, crowds not counted;
      "per_class": {name: {"ap", "ap50", "ap75": float, "objects": int}}}. Where
      there is no object the percentage is 0 (pycocotools has -1): read the
      number of objects before it.
    """
    targets = [a for _, actual, _ in self.images.values() for a in actual]
    counted = [a for a in targets if not a["iscrowd"]]
    category = np.array([a["category_id"] for a in counted], int)
    area = np.array([a["area"] for a in counted])
    objects = {
      name: int(((area >= low) & (area <= high)).sum())
      for name, low, high in zip(AREAS, _LOWER, _UPPER, strict=True)
    }
    # Others have no precision, and enter no mean.
    present = sorted({a["category_id"] for a in targets})
    precision = self._precision(present)

    def mean(values: np.ndarray) -> float:
      values = values[values > -1]
      return 100 * float(values.mean()) if values.size else 0.0

    everything = {"ap": slice(None), "ap50": 0, "ap75": 5}
    per_class = {}
    for c, name in enumerate(self.categories.names[: self._num_things], 1):
      chosen = precision[:, :, [i == c for i in present], 0]
      per_class[name] = {k: mean(chosen[i]) for k, i in everything.items()}
      per_class[name]["objects"] = int((category == c).sum())
    return (
      {k: mean(precision[i, ..., 0]) for k, i in everything.items()}
      | {f"ap_{n}": mean(precision[..., AREAS.index(n)]) for n in AREAS[1:]}
      | {
        "n": len(set(category.tolist())),
        "objects": objects,
        "per_class": per_class,
      }
    )

  @property
  def _num_things(self) -> int:
    return self.categories.num_things

  def _precision(self, present: list[int]) -> np.ndarray:
    """[10, 101, classes present, 4] precision by IoU, recall, class, area."""
    if not present:
      return np.full((10, 101, 0, 4), -1.0)
    names = sorted(self.images)
    found, actual = (
      [
        annotation | {"image_id": i}
        for i, name in enumerate(names, 1)
        for annotation in self.images[name][part]
      ]
      for part in (0, 1)
    )
    truth = {
      "images": [
        {"id": i, "height": size[0], "width": size[1]}
        for i, (_, _, size) in enumerate((self.images[n] for n in names), 1)
      ],
      "categories": [
        {"id": c, "name": name}
        for c, name in enumerate(self.categories.names[: self._num_things], 1)
      ],
      "annotations": [a | {"id": i} for i, a in enumerate(actual, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
      data = _load(truth, fast=self.fast)
      # The libraries cannot load no detections as results.
      results = (
        data.loadRes(found)
        if found
        else _load(truth | {"annotations": []}, fast=self.fast)
      )
      if self.fast:
        evaluator = hotcoco.COCOeval(data, results, self.kind)
      else:
        evaluator = cocoeval.COCOeval(data, results, self.kind)
      evaluator.params.catIds = present
      evaluator.evaluate()
      evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])[..., -1]


@dataclasses.dataclass
class VocInstanceAP:
  """mAP^r: PASCAL VOC's AP with the IoU of masks in place of boxes.

  Hariharan et al., Simultaneous Detection and Segmentation, ECCV 2014; the
  thresholds are those that weakly supervised methods report (Zhou et al., PRM,
  CVPR 2018; Ahn et al., IRNet, CVPR 2019, by ChainerCV's
  eval_instance_segmentation_voc). AP is the area under the precision-recall
  curve; the rules are those of `average_precision`. Crowds and difficult
  objects, which those data do not have, are ignored.

  Attributes:
    categories: the classes; the things count.
    thresholds: of the IoU, each in (0, 1].
    images: what was counted, by image id.
  """

  categories: Categories
  thresholds: tuple[float, ...] = (0.25, 0.5, 0.7, 0.75)
  images: dict[str, MatchedImage] = dataclasses.field(default_factory=dict)

  def add(
    self, image_id: str, detections: Detections, instances: Instances
  ) -> None:
    """Counts one image; arguments and errors as of `InstanceAP.add`."""
    check_image(
      image_id,
      detections,
      instances,
      seen=self.images,
      categories=self.categories,
    )
    mine, truth = _run_lengths(image_id, detections, instances)
    overlap = np.zeros((len(mine), len(truth)))
    if overlap.size:
      # Crowd 0: intersection over union for all.
      overlap = np.asarray(mask_utils.iou(mine, truth, [0] * len(truth)))
    self.images[image_id] = match_image(
      detections,
      instances,
      overlap,
      is_ignored=instances.is_difficult | instances.is_crowd,
      thresholds=self.thresholds,
      num_things=self.categories.num_things,
    )

  def merge(self, other: VocInstanceAP) -> VocInstanceAP:
    """Adds the images of `other` to these, and returns these.

    Raises:
      ValueError: the two count different categories or thresholds, or both have
        counted an image.
    """
    if self.thresholds != other.thresholds:
      raise ValueError(
        f"cannot merge AP at {other.thresholds} into AP at {self.thresholds}"
      )
    merge_images(self, other)
    return self

  def result(self) -> dict[str, Any]:
    """In percent.

    Returns:
      {"map25", "map50", ...: float, 0 .. 100, one for each threshold, the mean
      over the "n" classes with objects; "per_class": {name: {"ap25", "ap50",
      ...: float, "objects": int}}}. Percentages of nothing are 0.
    """
    result: dict[str, Any] = {}
    per_class: dict[str, dict[str, Any]] = {}
    for r, threshold in enumerate(self.thresholds):
      key = f"{100 * threshold:g}"
      at = class_results(
        self.images, self.categories, metric="area", threshold_index=r
      )
      result |= {f"map{key}": at["map"], "n": at["n"]}
      for name, values in at["per_class"].items():
        per_class.setdefault(name, {})[f"ap{key}"] = values["ap"]
        per_class[name]["objects"] = values["objects"]
    return result | {"per_class": per_class}


def _load(content: dict[str, Any], *, fast: bool) -> Any:
  if fast:
    return hotcoco.COCO(content)
  data = coco.COCO()
  data.dataset = content
  data.createIndex()
  return data


def _xywh(box: np.ndarray) -> list[float]:
  y0, x0, y1, x1 = (float(v) for v in box)
  return [x0, y0, x1 - x0, y1 - y0]


def _run_lengths(
  image_id: str, detections: Detections, instances: Instances
) -> tuple[list[dict], list[dict]]:
  """Both sides' masks as COCO's compressed run lengths."""
  if len(detections.rles) != len(detections.score):
    raise ValueError(
      f"image {image_id!r} has {len(detections.rles)} masks for"
      f" {len(detections.score)} detections; mask AP needs a mask of each"
    )
  if len(instances.rles) != len(instances.category):
    raise ValueError(
      f"image {image_id!r} has {len(instances.rles)} masks for"
      f" {len(instances.category)} objects; mask AP needs ground truth with"
      " masks"
    )
  height, width = detections.size
  for counts in instances.rles:
    pixels = read_runs(counts).sum()
    if pixels != height * width:
      raise ValueError(
        f"a mask in the ground truth of image {image_id!r} has {pixels} pixels,"
        f" the detections' masks have {height} x {width}: predict in the"
        " image's own size"
      )
  mine, truth = (
    [{"size": [height, width], "counts": rle.decode()} for rle in side.rles]
    for side in (detections, instances)
  )
  return mine, truth
