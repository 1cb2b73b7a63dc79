"""Candidate segments: tree nodes, and pairs of nodes that touch.

Areas and boundary sums are additive over superpixels up to a cross term, so
the statistics of all pairs come from a few small matrix products, and no loop
runs over candidates.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jtsm_jax.proposals import hierarchy

PAIR_MERGES = 120
"""Pairs are formed among the nodes of so many last merges of each tree. In the
prototype study pairs were the largest single gain; more merges added little."""


@dataclasses.dataclass(frozen=True)
class Candidates:
  """N distinct sets of the S superpixels of an image, in no order.

  Attributes:
    membership: [N, S] bool.
    rank: [N] float64 >= 1, regions in the coarsest cut of a tree that holds
      the candidate (for a pair: both its parts); least over the trees. The
      whole image has 1.
    consensus: [N] int64 >= 1, number of trees that hold the set, as a node or
      as a pair.
    is_pair: [N] bool, whether no tree has it as a node.
    area: [N] float64, pixels.
    perimeter: [N] float64, pixel edges towards the rest of the image; image
      borders do not count.
    outer: [N] float64 >= 0, mean boundary strength along the perimeter.
    inner: [N] float64 >= 0, mean boundary strength between its superpixels.
    borders: [N] int64, image borders that it touches, 0 .. 4.
  """

  membership: np.ndarray
  rank: np.ndarray
  consensus: np.ndarray
  is_pair: np.ndarray
  area: np.ndarray
  perimeter: np.ndarray
  outer: np.ndarray
  inner: np.ndarray
  borders: np.ndarray


def make_candidates(
  graph: hierarchy.RegionGraph,
  trees: list[np.ndarray],
  *,
  pair_merges: int = PAIR_MERGES,
) -> Candidates:
  """Collects the nodes of all `trees` and their pairs, without duplicates.

  Args:
    graph: the S superpixels.
    trees: [2S-1] int parents each, from `hierarchy.build_hierarchies`.
    pair_merges: pairs are formed among the children of the last so many merges
      of each tree: adjacent, disjoint, and not siblings (whose union is a
      node already).
  """
  count = len(graph.sizes)
  keys = _superpixel_keys(count)
  length = _symmetric(graph.pairs, graph.length, count)
  total = _symmetric(graph.pairs, graph.length * graph.strength, count)
  # Additive columns: pixels, then the sums over all sides of a superpixel.
  sides = np.stack([graph.sizes, length.sum(1), total.sum(1)], 1)

  columns = []  # per tree: everything about its nodes, then about its pairs
  for index, parents in enumerate(trees):
    nodes = hierarchy.node_membership(parents)
    member = nodes.astype(np.float32)
    inside = [
      np.einsum("ns,ns->n", member @ w, member) / 2 for w in (length, total)
    ]
    inside = np.stack(inside, 1)
    sums = member @ sides
    rank = len(parents) - parents + 1.0
    rank[-1] = 1  # the root is its own parent
    node_keys = np.where(nodes, keys, np.uint64(0)).sum(1, dtype=np.uint64)

    # Cross terms among the nodes that the last merges joined.
    first_merge = len(parents) - min(pair_merges, count - 1)
    top = np.flatnonzero(parents[:-1] >= first_merge)
    cross = np.stack([member[top] @ w @ member[top].T for w in (length, total)])
    disjoint = member[top] @ member[top].T == 0
    siblings = parents[top][:, None] == parents[top]
    joinable = np.triu((cross[0] > 0) & disjoint & ~siblings)
    i, j = np.nonzero(joinable)
    first, second = top[i], top[j]

    columns.append(
      dict(
        keys=np.concatenate([node_keys, node_keys[first] + node_keys[second]]),
        rank=np.concatenate([rank, np.maximum(rank[first], rank[second])]),
        sums=np.concatenate([sums, sums[first] + sums[second]]),
        inside=np.concatenate(
          [inside, inside[first] + inside[second] + cross[:, i, j].T]
        ),
        membership=np.concatenate([nodes, nodes[first] | nodes[second]]),
        is_pair=np.arange(len(nodes) + len(first)) >= len(nodes),
        tree=np.full(len(nodes) + len(first), index),
      )
    )
  every = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}

  _, chosen, group = np.unique(
    every["keys"], return_index=True, return_inverse=True
  )
  rank = np.full(len(chosen), np.inf)
  np.minimum.at(rank, group, every["rank"])
  num_nodes = np.bincount(group, ~every["is_pair"], len(chosen))
  held = np.unique(group * len(trees) + every["tree"]) // len(trees)
  area, side_length, side_total = every["sums"][chosen].astype(np.float64).T
  inside_length, inside_total = every["inside"][chosen].astype(np.float64).T
  perimeter = np.maximum(side_length - 2 * inside_length, 0)
  outside_total = np.maximum(side_total - 2 * inside_total, 0)
  membership = every["membership"][chosen]
  return Candidates(
    membership=membership,
    rank=rank,
    consensus=np.bincount(held, minlength=len(chosen)),
    is_pair=num_nodes == 0,
    area=area,
    perimeter=perimeter,
    outer=outside_total / np.maximum(perimeter, 1),
    inner=inside_total / np.maximum(inside_length, 1),
    borders=((membership.astype(np.float32) @ graph.border) > 0).sum(1),
  )


def _superpixel_keys(count: int) -> np.ndarray:
  """Fixed random [count] uint64: sums of different sets differ, almost surely.

  With 10^5 sets the chance that any two share a sum (modulo 2^64) is 3e-10.
  """
  return np.random.default_rng(0).integers(0, 2**64, count, np.uint64)


def _symmetric(pairs: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
  matrix = np.zeros((count, count), np.float32)
  matrix[pairs[:, 0], pairs[:, 1]] = values
  return matrix + matrix.T
