"""Mean average precision (mAP) of boxes as in PASCAL VOC, and CorLoc.

VOC's boxes hold their last pixel, so the devkit adds 1 to every width and
height. Half-open boxes, from xmin - 1 to xmax, have that very width as x1 - x0,
and the IoU below is the devkit's without adding anything.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jtsm_jax.evaluation.average_precision import (
  METRICS,
  MatchedImage,
  check_image,
  class_results,
  match_image,
  merge_images,
)
from jtsm_jax.types import Categories, Detections, Instances

THRESHOLD = 0.5


@dataclasses.dataclass
class VocDetection:
  """mAP at IoU >= 0.5; difficult objects (and crowds) are ignored.

  The rules are those of `average_precision`. Scores are not rounded, as some
  ports do when they write the devkit's files.

  Attributes:
    categories: the classes; the things count.
    metric: "11point", as for VOC 2007, or "area", as since VOC 2010.
    images: what was counted, by image id.
  """

  categories: Categories
  metric: str = "area"
  images: dict[str, MatchedImage] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.metric not in METRICS:
      raise ValueError(f"metric is {self.metric!r}, wanted one of {METRICS}")

  def add(
    self, image_id: str, detections: Detections, instances: Instances
  ) -> None:
    """Counts one image.

    Args:
      image_id: unique among the images.
      detections: their masks are not read.
      instances: the ground truth; difficult objects among them.

    Raises:
      ValueError: the image was counted before, arrays differ in length, a score
        is no number, or a category is no class index of a thing.
    """
    check_image(
      image_id,
      detections,
      instances,
      seen=self.images,
      categories=self.categories,
    )
    self.images[image_id] = match_image(
      detections,
      instances,
      box_iou(detections.boxes, instances.boxes),
      is_ignored=instances.is_difficult | instances.is_crowd,
      thresholds=(THRESHOLD,),
      num_things=self.categories.num_things,
    )

  def merge(self, other: VocDetection) -> VocDetection:
    """Adds the images of `other` to these, and returns these.

    Raises:
      ValueError: the two count different categories or metrics, or both have
        counted an image.
    """
    if self.metric != other.metric:
      raise ValueError(f"cannot merge {other.metric!r} into {self.metric!r}")
    merge_images(self, other)
    return self

  def result(self) -> dict[str, Any]:
    """In percent.

    Returns:
      {"map": float, 0 .. 100, the mean over the "n" classes with an object that
      is not ignored; "metric"; "per_class": {name: {"ap": float, "objects",
      "ignored", "detections": int}}}. Percentages of nothing are 0.
    """
    result = class_results(self.images, self.categories, metric=self.metric)
    return {"metric": self.metric} | result


@dataclasses.dataclass
class CorLoc:
  """Correct localisation (Deselaers et al., IJCV 2012) at IoU >= 0.5.

  Of the images with a class, the share where the box with the class's highest
  score overlaps with an object of the class. As in the code of OICR and PCL
  (Tang et al., CVPR 2017, TPAMI 2018), which published figures come from,
  difficult objects count as any others: they can be found, and an image with
  nothing else of the class has the class. An image without a box of the class
  is missed. PCL's later Python code wants IoU > 0.5.

  Attributes:
    categories: the classes; the things count.
    images: by image id, [2, T] bool: class is there, class was found.
  """

  categories: Categories
  images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def add(
    self, image_id: str, detections: Detections, instances: Instances
  ) -> None:
    """Counts one image.

    Args:
      image_id: of an image that was not added before.
      detections: at least the best one of each class of the image.
      instances: the truth.

    Raises:
      ValueError: as of `VocDetection.add`.
    """
    check_image(
      image_id,
      detections,
      instances,
      seen=self.images,
      categories=self.categories,
    )
    iou = box_iou(detections.boxes, instances.boxes)
    there, found = np.zeros((2, self.categories.num_things), bool)
    for c in np.unique(instances.category):
      there[c] = True
      (mine,) = np.nonzero(detections.category == c)
      if mine.size:
        top = mine[np.argmax(detections.score[mine])]
        found[c] = iou[top, instances.category == c].max() >= THRESHOLD
    self.images[image_id] = np.stack([there, found])

  def merge(self, other: CorLoc) -> CorLoc:
    """Adds the images of `other` to these, and returns these.

    Raises:
      ValueError: the two count different categories, or both have counted an
        image.
    """
    merge_images(self, other)
    return self

  def result(self) -> dict[str, Any]:
    """In percent.

    Returns:
      {"corloc": float, 0 .. 100, the mean over the "n" classes that are in an
      image; "per_class": {name: {"corloc": float, "images": int}}}. Percentages
      of nothing are 0.
    """
    t = self.categories.num_things
    images, found = sum(self.images.values(), np.zeros((2, t), np.int64))
    corloc = 100 * found / np.maximum(images, 1)
    seen = images > 0
    return {
      "corloc": float(corloc[seen].mean()) if seen.any() else 0.0,
      "n": int(seen.sum()),
      "per_class": {
        name: {"corloc": float(corloc[c]), "images": int(images[c])}
        for c, name in enumerate(self.categories.names[:t])
      },
    }


def write_server_files(
  folder: pathlib.Path,
  found: Iterable[tuple[str, Detections]],
  categories: Categories,
) -> None:
  """Writes detections as PASCAL VOC's evaluation server takes them.

  Competition 4, detection with other data for training: a line for each has the
  image id, score, xmin, ymin, xmax and ymax in pixels that count from 1, the
  last of which belong to the box.

  Args:
    folder: gets a file comp4_det_test_CLASS.txt for each thing.
    found: image id and detections of every test image.
    categories: the classes.
  """
  lines = [[] for _ in range(categories.num_things)]
  for image_id, detections in found:
    for c, score, (y0, x0, y1, x1) in zip(
      detections.category, detections.score, detections.boxes, strict=True
    ):
      lines[c].append(
        f"{image_id} {score:.9g} {x0 + 1:.6f} {y0 + 1:.6f} {x1:.6f} {y1:.6f}\n"
      )
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in zip(categories.names, lines, strict=False):
    (folder / f"comp4_det_test_{name}.txt").write_text("".join(rows))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """IoU of half-open boxes (y0, x0, y1, x1).

  Args:
    a: [N, 4] boxes, pixels.
    b: [M, 4] boxes.

  Returns:
    [N, M] float64; 0 for empty boxes.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  low = np.maximum(a[:, None, :2], b[None, :, :2])
  high = np.minimum(a[:, None, 2:], b[None, :, 2:])
  shared = np.maximum(high - low, 0).prod(-1)
  area_a, area_b = (np.maximum(x[:, 2:] - x[:, :2], 0).prod(-1) for x in (a, b))
  union = area_a[:, None] + area_b[None] - shared
  return shared / np.where(union > 0, union, 1)
