"""How well proposals cover the true segments. Never used in training.

Void pixels of the ground truth belong to nobody: as in panoptic quality
(Kirillov et al., 2019), they are left out of both sides of an IoU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jtsm_jax.types import VOID, PanopticMap, Proposals, Segment


@dataclasses.dataclass(frozen=True)
class BestIou:
  """Best overlaps of the G true segments of one image, crowds left out.

  Attributes:
    iou: [G] float64 in [0, 1].
    category: [G] int64 class index.
    is_thing: [G] bool.
  """

  iou: np.ndarray
  category: np.ndarray
  is_thing: np.ndarray


def best_iou(
  proposals: Proposals, target: PanopticMap, *, num: int | None = None
) -> BestIou:
  """Best IoU of each segment of `target` among the first `num` proposals.

  Raises:
    ValueError: the two are of different size.
  """
  return _best_among(segment_iou(proposals, target), target, num)


def segment_iou(proposals: Proposals, target: PanopticMap) -> np.ndarray:
  """IoU of every proposal with every segment, [P, G] float64; no crowds."""
  if proposals.superpixels.shape != target.ids.shape:
    raise ValueError(
      f"superpixels are {proposals.superpixels.shape}, "
      f"the target is {target.ids.shape}; wanted the same size."
    )
  ids = np.array([s.id for s in _segments(target)], np.int64)
  count = proposals.membership.shape[1]
  labels = proposals.superpixels.ravel().astype(np.int64)
  values, position = np.unique(target.ids, return_inverse=True)
  table = np.bincount(  # pixels of each superpixel with each value
    labels * len(values) + position.ravel(), minlength=count * len(values)
  ).reshape(count, len(values))
  counts = table @ (values[:, None] == ids)
  member = proposals.membership.astype(np.float64)
  inter = member @ counts
  area = member @ table[:, values != VOID].sum(1)
  union = area[:, None] + counts.sum(0) - inter
  return inter / np.maximum(union, 1)


def summary(
  pairs: Iterable[tuple[Proposals, PanopticMap]],
  *,
  counts: Sequence[int | None] = (100, 200, 400, None),
) -> dict[str, float]:
  """Means over all segments of many images, things and stuff apart.

  Args:
    pairs: proposals and ground truth of each image.
    counts: how many first proposals to look at; None is all.

  Returns:
    For kind in things, stuff and n in `counts` ("all" for None):
    "{kind}/J@{n}", the mean best IoU (J_i), and "{kind}/recall50@{n}", the
    share of segments with best IoU >= 0.5; also "{kind}/segments". A kind
    without segments has NaN.
  """
  found: list[list[BestIou]] = [[] for _ in counts]
  for proposals, target in pairs:
    iou = segment_iou(proposals, target)
    for results, num in zip(found, counts, strict=True):
      results.append(_best_among(iou, target, num))
  result = {}
  for kind, wanted in (("things", True), ("stuff", False)):
    for results, num in zip(found, counts, strict=True):
      values = [r.iou[r.is_thing == wanted] for r in results]
      iou = np.concatenate([np.zeros(0), *values])
      name = "all" if num is None else num
      some = len(iou) > 0
      result[f"{kind}/J@{name}"] = float(iou.mean()) if some else np.nan
      result[f"{kind}/recall50@{name}"] = (
        float((iou >= 0.5).mean()) if some else np.nan
      )
    result[f"{kind}/segments"] = len(iou)
  return result


def _segments(target: PanopticMap) -> list[Segment]:
  return [s for s in target.segments if not s.is_crowd]


def _best_among(
  iou: np.ndarray, target: PanopticMap, num: int | None
) -> BestIou:
  segments = _segments(target)
  return BestIou(
    iou=iou[:num].max(0, initial=0.0),
    category=np.array([s.category for s in segments], np.int64),
    is_thing=np.array([s.is_thing for s in segments], bool),
  )
