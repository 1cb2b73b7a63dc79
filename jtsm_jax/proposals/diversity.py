"""A choice among candidates, many of which are nearly the same.

Candidates are taken one by one, each time the one whose expected gain is
largest. The score of a candidate is the logarithm of the chance that it is the
best one for some segment. If a candidate with which it has IoU v was taken
before, that segment is covered up to about v, and the gain falls by the factor
1 - v; to the power `DISCOUNT`, which was tried between 0.5 and 3 and matters
little from 1 to 2.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

DISCOUNT = 1.5
LEAST_IOU = 0.65  # overlaps of less are not looked at
LEAST_GAIN = 0.02  # share of the gain that remains for a copy
BLOCK = 256  # candidates whose overlaps are computed at once


@dataclasses.dataclass(frozen=True)
class Overlaps:
  """The candidates of IoU > `LEAST_IOU` with each of N, in rows one by one.

  Attributes:
    start: [N + 1] int64; row n is start[n] .. start[n + 1] - 1.
    other: [M] int64, candidates.
    iou: [M] float32.
  """

  start: np.ndarray
  other: np.ndarray
  iou: np.ndarray


def find_overlaps(membership: np.ndarray, sizes: np.ndarray) -> Overlaps:
  """Finds large overlaps.

  Args:
    membership: [N, S] bool.
    sizes: [S], pixels of each superpixel.
  """
  member = membership.astype(np.float32)
  weighted = member * sizes.astype(np.float32)
  area = weighted.sum(1)
  # The IoU of two sets is at most the ratio of their areas.
  order = np.argsort(area, kind="stable")
  member, weighted, area = member[order], weighted[order], area[order]
  found = [(np.zeros(0, np.int64),) * 2 + (np.zeros(0, np.float32),)]
  for start in range(0, len(order), BLOCK):
    block = slice(start, min(start + BLOCK, len(order)))
    stop = np.searchsorted(area, area[block][-1] / LEAST_IOU, side="right")
    window = slice(start, stop)
    inter = weighted[block] @ member[window].T
    iou = inter / (area[block, None] + area[window] - inter)
    i, j = np.nonzero(np.triu(iou > LEAST_IOU, 1))
    found.append((order[start + i], order[start + j], iou[i, j]))
  first, second, iou = map(np.concatenate, zip(*found, strict=True))
  row = np.concatenate([first, second])
  by_row = np.argsort(row, kind="stable")
  return Overlaps(
    start=np.searchsorted(row[by_row], np.arange(len(order) + 1)),
    other=np.concatenate([second, first])[by_row],
    iou=np.concatenate([iou, iou])[by_row],
  )


def select(
  scores: np.ndarray, overlaps: Overlaps, *, max_proposals: int
) -> np.ndarray:
  """Chooses diverse candidates, best first.

  Args:
    scores: [N] float64, logarithms; ties go to the earlier candidate.
    overlaps: of these candidates.
    max_proposals: > 0.

  Returns:
    [P] int64 candidates in the order taken, P = min(N, max_proposals).
  """
  discount = DISCOUNT * np.log(np.maximum(1 - overlaps.iou, LEAST_GAIN))
  gain = scores.astype(np.float64).copy()
  heap = [(-score, n) for n, score in enumerate(gain.tolist())]
  heapq.heapify(heap)
  taken = []
  while heap and len(taken) < max_proposals:
    negative, n = heapq.heappop(heap)
    if -negative > gain[n]:  # it has fallen since
      heapq.heappush(heap, (-float(gain[n]), n))
      continue
    taken.append(n)
    row = slice(overlaps.start[n], overlaps.start[n + 1])
    other = overlaps.other[row]
    gain[other] = np.minimum(gain[other], scores[other] + discount[row])
  return np.array(taken, np.int64)
