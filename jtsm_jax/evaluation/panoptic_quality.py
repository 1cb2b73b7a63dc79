"""Panoptic quality (PQ), streamed over images.

Kirillov et al., Panoptic Segmentation, CVPR 2019; the rules for void and crowd
are those of COCO's panopticapi:

- Void pixels of the target are taken out of the union of a match.
- A match is IoU > 0.5 between segments of one category; crowds never match.
- A crowd that nothing covers is no false negative.
- An unmatched prediction of which more than half (of its whole area) lies in
  void or in the crowd of its own category is no false positive. Of several
  crowds of one category only the last in the target's list counts, which is an
  accident of panopticapi that COCO's own files, with one each, never show.
- A category without a true positive, false positive or false negative does not
  enter the means.

Where panopticapi goes on with faulty input, this raises: ids of the target that
are in its map or its list only, and unknown categories of the target. Areas are
always counted in the map. As a command, with panopticapi's own flags:

    python -m jtsm_jax.evaluation.panoptic_quality \\
        --gt_json_file=panoptic_val2017.json --gt_folder=panoptic_val2017 \\
        --pred_json_file=predictions.json --pred_folder=predictions
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jtsm_jax.types import VOID, Categories, PanopticMap, Segment


@dataclasses.dataclass
class PanopticQuality:
  """The counts behind PQ; start with `PanopticQuality(categories)`.

  Attributes:
    categories: the K classes.
    iou: [K] float64, sum of the IoU of the true positives, each in (0.5, 1].
    tp, fp, fn: [K] int64, segments.
  """

  categories: Categories
  iou: np.ndarray | None = None
  tp: np.ndarray | None = None
  fp: np.ndarray | None = None
  fn: np.ndarray | None = None

  def __post_init__(self):
    k = len(self.categories)
    self.iou = np.zeros(k) if self.iou is None else self.iou
    for name in ("tp", "fp", "fn"):
      if getattr(self, name) is None:
        setattr(self, name, np.zeros(k, np.int64))

  def add(self, prediction: PanopticMap, target: PanopticMap) -> None:
    """Counts one image.

    Args:
      prediction: what the model gave; scores are not read.
      target: the ground truth of the same image, in the same size.

    Raises:
      ValueError: the sizes differ, the ids of a map and its segments differ, or
        a category is not one of `categories`.
    """
    k = len(self.categories)
    predicted, actual, overlap = overlap_counts(prediction, target, k)
    # The first row and column are void; areas include the void of the other.
    predicted_area, actual_area = overlap.sum(axis=1), overlap.sum(axis=0)
    matched_predictions, matched_targets = set(), set()
    for i, j in zip(*np.nonzero(overlap[1:, 1:]), strict=True):
      mine, truth = predicted[i], actual[j]
      if truth.is_crowd or mine.category != truth.category:
        continue
      i, j = i + 1, j + 1
      union = predicted_area[i] + actual_area[j] - overlap[i, j] - overlap[i, 0]
      iou = overlap[i, j] / union
      if iou > 0.5:  # so at most one match for each segment
        self.iou[truth.category] += iou
        self.tp[truth.category] += 1
        matched_predictions.add(i)
        matched_targets.add(j)

    for j, truth in enumerate(actual, start=1):
      if j not in matched_targets and not truth.is_crowd:
        self.fn[truth.category] += 1

    crowds = {
      truth.category: j  # the last one, as panopticapi
      for j, truth in enumerate(actual, start=1)
      if truth.is_crowd
    }
    for i, mine in enumerate(predicted, start=1):
      if i in matched_predictions:
        continue
      ignored = overlap[i, 0]
      if mine.category in crowds:
        ignored = ignored + overlap[i, crowds[mine.category]]
      if ignored / predicted_area[i] <= 0.5:
        self.fp[mine.category] += 1

  def merge(self, other: PanopticQuality) -> PanopticQuality:
    """Adds the counts of `other` to these, and returns these.

    Raises:
      ValueError: the two count different categories.
    """
    if self.categories != other.categories:
      raise ValueError(
        f"cannot merge the PQ of {other.categories.names} into that of"
        f" {self.categories.names}: both must count the same categories"
      )
    self.iou = self.iou + other.iou
    self.tp = self.tp + other.tp
    self.fp = self.fp + other.fp
    self.fn = self.fn + other.fn
    return self

  def result(self) -> dict[str, Any]:
    """PQ = SQ * RQ, in percent.

    Returns:
      {"all", "things", "stuff": {"pq", "sq", "rq": float, 0 .. 100; "n": the
      number of categories in the mean}, "per_class": {name: {"pq", "sq", "rq",
      "tp", "fp", "fn"}}}. Without a category to average, or a segment of a
      category, the percentages are 0, as panopticapi gives them: read "n", or
      "tp" + "fp" + "fn", before them.
    """
    seen = self.tp + self.fp + self.fn > 0
    size = self.tp + 0.5 * self.fp + 0.5 * self.fn
    pq = 100 * self.iou / np.where(seen, size, 1)
    sq = 100 * self.iou / np.maximum(self.tp, 1)
    rq = 100 * self.tp / np.where(seen, size, 1)

    def mean(chosen: np.ndarray) -> dict[str, Any]:
      n = int(chosen.sum())
      values = {
        name: float(value[chosen].mean()) if n else 0.0
        for name, value in (("pq", pq), ("sq", sq), ("rq", rq))
      }
      return values | {"n": n}

    thing = np.array([c.is_thing for c in self.categories.items], bool)
    return {
      "all": mean(seen),
      "things": mean(seen & thing),
      "stuff": mean(seen & ~thing),
      "per_class": {
        name: {
          "pq": float(pq[c]),
          "sq": float(sq[c]),
          "rq": float(rq[c]),
          "tp": int(self.tp[c]),
          "fp": int(self.fp[c]),
          "fn": int(self.fn[c]),
        }
        for c, name in enumerate(self.categories.names)
      },
    }


def overlap_counts(
  prediction: PanopticMap, target: PanopticMap, num_classes: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...], np.ndarray]:
  """Checks two maps of one image and counts the pixels that they share.

  Args:
    prediction, target: two maps of one size.
    num_classes: K; every category must lie in 0 .. K-1.

  Returns:
    The segments of the prediction (N) and of the target (M) in the order of
    their lists, and [N + 1, M + 1] int64 pixels in both: row 0 is void in the
    prediction, column 0 void in the target.

  Raises:
    ValueError: see `PanopticQuality.add`.
  """
  if prediction.ids.shape != target.ids.shape:
    raise ValueError(
      f"the prediction is {prediction.ids.shape}, the target"
      f" {target.ids.shape}: resize the prediction to the image's own size"
    )
  # Some ten thousand runs of one pair of ids instead of all pixels.
  mine, truth = prediction.ids.ravel(), target.ids.ravel()
  is_start = np.ones(mine.size, bool)
  is_start[1:] = (mine[1:] != mine[:-1]) | (truth[1:] != truth[:-1])
  start = np.flatnonzero(is_start)
  pixels = np.diff(start, append=mine.size)
  predicted, actual = prediction.segments, target.segments
  rows = _positions(mine[start], predicted, "prediction", num_classes)
  columns = _positions(truth[start], actual, "target", num_classes)
  width = len(actual) + 1
  counts = np.bincount(
    rows * width + columns,
    weights=pixels,  # exact: sums stay far below 2**53
    minlength=(len(predicted) + 1) * width,
  )
  return predicted, actual, counts.astype(np.int64).reshape(-1, width)


def _positions(
  ids: np.ndarray, segments: tuple[Segment, ...], what: str, num_classes: int
) -> np.ndarray:
  """Position of each id's segment in the list, from 1; 0 for void."""
  listed = np.array([s.id for s in segments], np.int64)
  order = np.argsort(listed)
  found, inverse = np.unique(ids, return_inverse=True)
  if not np.array_equal(found[found != VOID], listed[order]):
    unlisted = np.setdiff1d(found, [*listed, VOID]).tolist()
    absent = np.setdiff1d(listed, found[found != VOID]).tolist()
    raise ValueError(
      f"the map and the segments of the {what} disagree: ids {unlisted} are in"
      f" the map only, ids {absent} in the segments only, and the segments"
      f" list {len(listed) - len(set(listed.tolist()))} ids twice; every id"
      f" but {VOID} must be in both, once"
    )
  for segment in segments:
    if not 0 <= segment.category < num_classes:
      raise ValueError(
        f"segment {segment.id} of the {what} has the category"
        f" {segment.category}, wanted a class index in 0 .. {num_classes - 1}"
        " (not the data set's own id)"
      )
  position = np.zeros(len(found), np.int64)
  position[found != VOID] = order + 1
  return position[inverse]


def format_table(result: dict[str, Any]) -> str:
  """`PanopticQuality.result` as a table for the console.

  Rows All, Things and Stuff with the number of classes, then one per class with
  its counts. A dash stands where there was nothing to count.
  """
  classes = result["per_class"]
  width = max([8, *(len(name) for name in classes)])

  def row(name: str, values: dict[str, Any], counted: int, end: str) -> str:
    cells = (
      f"{values[m]:7.1f}" if counted else f"{'-':>7}"
      for m in ("pq", "sq", "rq")
    )
    return f"{name:<{width}}{''.join(cells)}{end}"

  rule = "-" * (width + 39)
  lines = [f"{'':<{width}}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'classes':>18}", rule]
  for name in ("all", "things", "stuff"):
    values = result[name]
    n = values["n"]
    lines.append(row(name.capitalize(), values, n, f"{n:18d}"))
  lines += [
    rule,
    f"{'':<{width}}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'TP':>6}{'FP':>6}{'FN':>6}",
    rule,
  ]
  for name, values in classes.items():
    counts = [values[c] for c in ("tp", "fp", "fn")]
    end = "".join(f"{c:6d}" for c in counts)
    lines.append(row(name, values, sum(counts), end))
  return "\n".join(lines)


if __name__ == "__main__":
  from jtsm_jax.evaluation import panoptic_command

  panoptic_command.main()
