"""A choice among candidates, many of which are nearly the same.

If each candidate j were the true segment with probability p_j, a set of
proposals would cover it up to their best IoU with j, and the sum of p_j times
that is the mean best IoU (J_i) to be expected. It is a submodular function of
the set, so the greedy choice of the candidate that adds most is near the best
one (Nemhauser et al., 1978), and a gain once computed is a bound for later
(Minoux, 1978): few have to be computed again.

So a large segment, of which there are many good versions that share its
probability, comes early, once; its other versions come late.
"""

from __future__ import annotations

import heapq

import numpy as np
import scipy.sparse

LEAST_IOU = 0.65  # overlaps of less count as none
MAX_OVERLAPS = 12_000_000
"""About so many are kept, the largest ones; few images have more. They need
some 300 MB while they are found."""
SAMPLE = 50  # each so manieth candidate tells how many overlaps there are
BLOCK = 128  # candidates whose overlaps are computed at once


def find_overlaps(
  membership: np.ndarray, sizes: np.ndarray
) -> scipy.sparse.csr_array:
  """Finds the pairs of sets that have IoU > `LEAST_IOU`.

  Where that would be more than `MAX_OVERLAPS`, the least IoU is higher.

  Args:
    membership: [N, S] bool.
    sizes: [S], pixels of each superpixel.

  Returns:
    [N, N] float32, symmetric, their IoU. The diagonal is 0.
  """
  # Products of these are pixels that two sets share.
  root = membership.astype(np.float32)
  root *= np.sqrt(sizes).astype(np.float32)
  area = np.square(root).sum(1)
  # The IoU of two sets is at most the ratio of their areas.
  order = np.argsort(area, kind="stable").astype(np.int32)
  root, area = root[order], area[order]
  least_iou = _least_iou(root, area)
  # IoU > t is the same as shared > t / (1 + t) * (sum of both areas).
  least = np.float32(least_iou / (1 + least_iou)) * area
  found = [(order[:0], order[:0], area[:0])]
  for start in range(0, len(order), BLOCK):
    block = slice(start, min(start + BLOCK, len(order)))
    stop = np.searchsorted(area, area[block][-1] / least_iou, side="right")
    shared = root[block] @ root[start:stop].T
    large = shared - least[start:stop] > least[block, None]
    # Faster than nonzero of two dimensions.
    i, j = np.divmod(np.flatnonzero(large), stop - start)
    i, j = i[i < j], j[i < j]
    shared, i, j = shared[i, j], start + i, start + j
    found.append((order[i], order[j], shared / (area[i] + area[j] - shared)))
  first, second, iou = map(np.concatenate, zip(*found, strict=True))
  size = (len(order), len(order))
  half = scipy.sparse.csr_array((iou, (first, second)), size)
  return half + half.T


def _least_iou(root: np.ndarray, area: np.ndarray) -> float:
  """`LEAST_IOU`, or the IoU that about `MAX_OVERLAPS` pairs exceed."""
  share = MAX_OVERLAPS / max(len(area), 1) ** 2
  if share >= 1:
    return LEAST_IOU
  shared = root[::SAMPLE] @ root.T
  iou = shared / (area[::SAMPLE, None] + area - shared)
  if np.mean(iou > LEAST_IOU) <= share:
    return LEAST_IOU
  return float(np.quantile(iou, 1 - share))


def select(
  scores: np.ndarray, overlaps: scipy.sparse.csr_array, *, max_proposals: int
) -> np.ndarray:
  """Chooses the candidates that cover most, best first.

  Args:
    scores: [N] float64, logarithms of the probabilities, up to a constant.
    overlaps: of `find_overlaps`, for the same candidates.
    max_proposals: > 0.

  Returns:
    [P] int64 candidates in the order taken, P = min(N, max_proposals). Of
    equal gains the earlier candidate comes first.
  """
  count = len(scores)
  probability = np.exp(scores - scores.max(initial=-np.inf))
  covered = np.zeros(count)
  bound = probability + overlaps @ probability
  start = overlaps.indptr.tolist()
  heap = [(-gain, n) for n, gain in enumerate(bound.tolist())]
  heapq.heapify(heap)
  taken = []
  while heap and len(taken) < max_proposals:
    _, n = heapq.heappop(heap)
    near = slice(start[n], start[n + 1])
    others, overlap = overlaps.indices[near], overlaps.data[near]
    added = np.maximum(overlap - covered[others], 0)
    gain = probability[n] * (1 - covered[n]) + added @ probability[others]
    entry = (-float(gain), n)
    if heap and entry > heap[0]:  # another one may add more
      heapq.heappush(heap, entry)
      continue
    taken.append(n)
    covered[others] = np.maximum(covered[others], overlap)
    covered[n] = 1
  return np.array(taken, np.int64)
