"""Average precision as PASCAL VOC's devkit counts it, for boxes and masks.

Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, and
the devkit's VOCevaldet.m and VOCap.m:

- Detections are taken by descending score, each looks at the object of its
  class and image that it overlaps most, and at no other.
- With an IoU of at least the threshold it is a true positive if no detection
  took the object before, else a false positive.
- Objects that are to be ignored (VOC's difficult ones) are no positives, and a
  detection that looks at one is neither true nor false.

Python ports of the devkit often want IoU > threshold, not >=.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jtsm_jax.types import Categories, Detections, Instances

TRUE, FALSE, IGNORED = 1, 0, -1
METRICS = ("11point", "area")


@dataclasses.dataclass(frozen=True)
class MatchedImage:
  """What is left of an image once its detections are matched.

  Attributes:
    category: [N] int, class index.
    score: [N] float.
    outcome: [N, R] int8, `TRUE`, `FALSE` or `IGNORED` at each of R thresholds.
    objects: [T] int64, objects of each class that can be found.
    ignored: [T] int64, objects of each class that are to be ignored.
  """

  category: np.ndarray
  score: np.ndarray
  outcome: np.ndarray
  objects: np.ndarray
  ignored: np.ndarray


def match_image(
  detections: Detections,
  instances: Instances,
  overlap: np.ndarray,
  *,
  is_ignored: np.ndarray,
  thresholds: tuple[float, ...],
  num_things: int,
) -> MatchedImage:
  """Matches the detections of one image, class by class.

  Args:
    detections: N of them.
    instances: M objects.
    overlap: [N, M] float, IoU.
    is_ignored: [M] bool.
    thresholds: R of the IoU, each > 0.
    num_things: T.
  """
  outcome = np.full((len(detections.score), len(thresholds)), FALSE, np.int8)
  for c in np.intersect1d(detections.category, instances.category):
    (mine,) = np.nonzero(detections.category == c)
    mine = mine[np.argsort(-detections.score[mine], kind="stable")]
    (truth,) = np.nonzero(instances.category == c)
    iou = overlap[np.ix_(mine, truth)]
    for r, threshold in enumerate(thresholds):
      outcome[mine, r] = match_to_best(
        iou, is_ignored[truth], threshold=threshold
      )

  def count(chosen: np.ndarray) -> np.ndarray:
    return np.bincount(instances.category[chosen], minlength=num_things)

  return MatchedImage(
    np.array(detections.category),
    np.array(detections.score),
    outcome,
    count(~is_ignored),
    count(is_ignored),
  )


def match_to_best(
  iou: np.ndarray, is_ignored: np.ndarray, *, threshold: float
) -> np.ndarray:
  """The devkit's assignment of one class in one image.

  Args:
    iou: [N, M] float, detections by descending score.
    is_ignored: [M] bool.
    threshold: of the IoU, > 0.

  Returns:
    [N] int8, `TRUE`, `FALSE` or `IGNORED`.
  """
  outcome = np.full(len(iou), FALSE, np.int8)
  if iou.size == 0:
    return outcome
  taken = np.zeros(iou.shape[1], bool)
  for n, m in enumerate(iou.argmax(axis=1)):  # of equal ones the first
    if iou[n, m] < threshold:
      continue
    if is_ignored[m]:
      outcome[n] = IGNORED
    elif not taken[m]:
      outcome[n] = TRUE
      taken[m] = True
  return outcome


def average_precision(
  score: np.ndarray, outcome: np.ndarray, num_objects: int, *, metric: str
) -> float:
  """AP of one class in [0, 1].

  Args:
    score: [N] float; of equal scores the first comes first.
    outcome: [N] int8, as of `match_to_best`.
    num_objects: that can be found; without any, AP is 0.
    metric: "area" under the precision-recall curve, made monotonous (VOC since
      2010); or "11point", its mean at recalls 0, 0.1, ... 1 (VOC 2007). The
      tenths are exact. The devkit's own 0:0.1:1 has 0.30000000000000004, which
      a recall of 3 / 10 misses.

  Raises:
    ValueError: there is no such metric.
  """
  if metric not in METRICS:
    raise ValueError(f"metric is {metric!r}, wanted one of {METRICS}")
  if num_objects == 0:
    return 0.0
  outcome = outcome[np.argsort(-score, kind="stable")]
  true, false = np.cumsum(outcome == TRUE), np.cumsum(outcome == FALSE)
  recall = true / num_objects
  # Where all so far are ignored, precision is undefined and not the best.
  precision = true / np.maximum(true + false, 1)
  if metric == "area":
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * best).sum())
  best = [precision[recall >= t / 10].max(initial=0) for t in range(11)]
  return float(np.mean(best))


def class_results(
  images: dict[str, MatchedImage],
  categories: Categories,
  *,
  metric: str,
  threshold_index: int = 0,
) -> dict[str, Any]:
  """AP of every class of things, in percent.

  Equal scores in several images are ordered by image id, so that the result
  does not depend on the order in which images came.

  Args:
    images: of every image id, its matches.
    categories: the classes; those of things count.
    metric: as in `average_precision`.
    threshold_index: which of the R thresholds.

  Returns:
    {"map": float, 0 .. 100, the mean over the "n" classes with an object to be
    found; "per_class": {name: {"ap": float, "objects", "ignored", "detections":
    int}}}. Percentages of nothing are 0.
  """
  num_things = categories.num_things
  matched = [images[i] for i in sorted(images)]
  objects = sum((m.objects for m in matched), np.zeros(num_things, np.int64))
  ignored = sum((m.ignored for m in matched), np.zeros(num_things, np.int64))
  category, score, outcome = (
    np.concatenate([*parts, np.zeros(0)])
    for parts in (
      [m.category for m in matched],
      [m.score for m in matched],
      [m.outcome[:, threshold_index] for m in matched],
    )
  )
  per_class = {}
  for c, name in enumerate(categories.names[:num_things]):
    mine = category == c
    ap = average_precision(
      score[mine], outcome[mine], int(objects[c]), metric=metric
    )
    per_class[name] = {
      "ap": 100 * ap,
      "objects": int(objects[c]),
      "ignored": int(ignored[c]),
      "detections": int(mine.sum()),
    }
  counted = [v["ap"] for v in per_class.values() if v["objects"]]
  return {
    "map": float(np.mean(counted)) if counted else 0.0,
    "n": len(counted),
    "per_class": per_class,
  }


def check_image(
  image_id: str,
  detections: Detections,
  instances: Instances,
  *,
  seen: dict[str, Any],
  categories: Categories,
) -> None:
  """Checks what is about to be counted.

  Raises:
    ValueError: the image was counted before, arrays differ in length, a score
      is no number, or a category is no class index of a thing.
  """
  if image_id in seen:
    raise ValueError(f"image {image_id!r} is counted already; add it once")
  for what, arrays in (
    ("detections", (detections.category, detections.score, detections.boxes)),
    (
      "instances",
      (
        instances.category,
        instances.boxes,
        instances.area,
        instances.is_crowd,
        instances.is_difficult,
      ),
    ),
  ):
    lengths = [len(a) for a in arrays]
    if len(set(lengths)) > 1:
      raise ValueError(
        f"the {what} of image {image_id!r} have fields of {lengths} entries;"
        " all need the same number"
      )
    for category in arrays[0].tolist():
      if not 0 <= category < categories.num_things:
        raise ValueError(
          f"the {what} of image {image_id!r} have the category {category};"
          " wanted the class index of a thing, 0 .."
          f" {categories.num_things - 1} (not the data set's own id)"
        )
  if np.isnan(detections.score).any():
    raise ValueError(
      f"the detections of image {image_id!r} have a score that is no number"
    )


def merge_images(mine: Any, other: Any) -> None:
  """Adds the images of another host's measure to those of `mine`.

  Args:
    mine, other: with `categories`, and `images` by image id.

  Raises:
    ValueError: an image is in both, or their categories differ.
  """
  if mine.categories != other.categories:
    raise ValueError(
      f"cannot merge results of {other.categories.names} into those of"
      f" {mine.categories.names}: both must count the same categories"
    )
  both = sorted(mine.images.keys() & other.images.keys())
  if both:
    raise ValueError(
      f"{len(both)} images are in both results, e.g. {both[0]!r}; divide the"
      " images among the hosts"
    )
  mine.images.update(other.images)
