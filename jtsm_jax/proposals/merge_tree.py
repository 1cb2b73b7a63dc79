"""Arithmetic on binary merge trees.

A tree of S leaves is an array of parents, [2S-1] int: nodes 0 .. S-1 are the
leaves, node S + k is the k-th merge, and the last node is the root and its own
parent. So children stand before their parents.
"""

from __future__ import annotations

import dataclasses

import higra as hg
import numpy as np


def cut(parents: np.ndarray, num_regions: int) -> np.ndarray:
  """Labels the leaves of a binary merge tree when `num_regions` are left.

  Args:
    parents: [2n-1] int, parent of each node, the root its own; leaves first,
      then the merges in their order.
    num_regions: 1 .. n.

  Returns:
    [n] int, the region of each leaf, 0 .. num_regions-1.
  """
  num_nodes = len(parents)
  first_undone = num_nodes - (num_regions - 1)
  top = np.where(parents < first_undone, parents, np.arange(num_nodes))
  while True:  # pointer jumping: log2(depth) rounds
    higher = top[top]
    if np.array_equal(higher, top):
      break
    top = higher
  leaves = (num_nodes + 1) // 2
  return np.unique(top[:leaves], return_inverse=True)[1]


def accumulate(parents: np.ndarray, leaves: np.ndarray) -> np.ndarray:
  """Sums of what the leaves of each node hold: [S, K] to [2S-1, K]."""
  sums = np.zeros((len(parents), leaves.shape[1]), leaves.dtype)
  sums[: len(leaves)] = leaves
  return _add_to_parents(parents, sums)


def accumulate_maximum(parents: np.ndarray, leaves: np.ndarray) -> np.ndarray:
  """As `accumulate`, but the maxima."""
  maxima = np.empty((len(parents), leaves.shape[1]), leaves.dtype)
  maxima[: len(leaves)] = leaves
  maxima[len(leaves) :] = leaves.min(0)
  for node in range(len(parents) - 1):
    row = maxima[parents[node]]
    np.maximum(row, maxima[node], out=row)
  return maxima


def accumulate_inside(
  parents: np.ndarray, pairs: np.ndarray, values: np.ndarray
) -> np.ndarray:
  """Sums over the pairs of leaves that lie inside each node.

  Args:
    parents: [2S-1] int.
    pairs: [E, 2] int64, leaves.
    values: [E, K] float64.

  Returns:
    [2S-1, K] float64.
  """
  joined = hg.make_lca_fast(hg.Tree(parents)).lca(*pairs.T)
  sums = np.stack(
    [np.bincount(joined, v, len(parents)) for v in values.T], axis=1
  )
  return _add_to_parents(parents, sums)


def _add_to_parents(parents, sums):
  for node in range(len(parents) - 1):
    sums[parents[node]] += sums[node]
  return sums


@dataclasses.dataclass(frozen=True)
class Intervals:
  """An order of the leaves in which each node is an interval.

  Attributes:
    position: [S] int64, of each leaf.
    start, stop: [2S-1] int64; a node holds the leaves with
      start <= position < stop.
  """

  position: np.ndarray
  start: np.ndarray
  stop: np.ndarray

  def membership(self, nodes: np.ndarray) -> np.ndarray:
    """The leaves of each of `nodes` [N]: [N, S] bool."""
    start, stop = self.start[nodes, None], self.stop[nodes, None]
    return (self.position >= start) & (self.position < stop)


def intervals(parents: np.ndarray) -> Intervals:
  """Finds `Intervals` of a tree."""
  count = (len(parents) + 1) // 2
  sizes = accumulate(parents, np.ones((count, 1), np.int64))[:, 0]
  start = np.zeros(len(parents), np.int64)
  used = np.zeros(len(parents), np.int64)
  for node in range(len(parents) - 2, -1, -1):
    parent = parents[node]
    start[node] = start[parent] + used[parent]
    used[parent] += sizes[node]
  return Intervals(
    position=start[:count].copy(), start=start, stop=start + sizes
  )
