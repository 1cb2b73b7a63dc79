"""Candidate segments: tree nodes, and pairs of nodes that touch.

Everything that is known of a candidate is a sum over its superpixels, or over
pairs of them, so the statistics of all pairs come from those of the nodes and
a few small matrix products, and no loop runs over candidates. Nor is the
membership of all of them ever made.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from jtsm_jax.proposals import merge_tree
from jtsm_jax.proposals.cues import relative
from jtsm_jax.proposals.deep_features import standardise
from jtsm_jax.proposals.region_graph import RegionGraph, distance

COMPONENTS = 12  # principal components of the deep features that are kept
NO_NODE = -1


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean and spread of a feature of C channels within N candidates.

  Attributes:
    mean: [N, C] float64.
    spread: [N] float64 >= 0, root of the mean squared distance from the mean.
    contrast: [N] float64 >= 0, distance of the mean from that of the rest of
      the image.
  """

  mean: np.ndarray
  spread: np.ndarray
  contrast: np.ndarray


@dataclasses.dataclass(frozen=True)
class Candidates:
  """N distinct sets of the S superpixels of an image, in no order.

  Each is a connected region, maybe with holes.

  Attributes:
    orders: of each tree, the order in which its nodes are intervals.
    tree: [N] int64, a tree that holds the candidate.
    first: [N] int64, node of that tree.
    second: [N] int64, a node that touches the first and is united with it, or
      `NO_NODE`.
    rank: [N] float64 >= 1, regions in the coarsest cut of a tree that holds
      the candidate (for a pair: both its parts); least over the trees. The
      whole image has 1.
    rank_of_coarser: [N] float64, of the coarser part of a pair.
    consensus: [N] int64 >= 1, trees that hold the set, as node or pair.
    node_consensus: [N] int64 >= 0, trees that hold it as a node.
    area: [N] float64, pixels.
    boxes: [N, 4] int32 (y0, x0, y1, x1), half-open.
    perimeter: [N] float64, pixel edges towards the rest of the image; image
      borders do not count.
    inner_length: [N] float64, pixel edges between its superpixels.
    outer: [N, K] float64 >= 0, mean along the perimeter of K cues: strength,
      fine edges, and with deep features the distances of parts and objects,
      and of scenes.
    inner: [N, K] float64 >= 0, the same between its superpixels.
    joint_strength: [N] float64 >= 0, mean strength between the parts of a
      pair; 0 for a node.
    joint_length: [N] float64 >= 0, pixel edges between them.
    balance: [N] float64 in [0, 1], area of the smaller part of a pair over
      that of the larger; 0 for a node.
    colour: moments of Lab.
    deep: moments of the deep features of parts and objects, then of scenes;
      empty without them.
    activity: [N] float64 >= 0, mean of `DeepFeatures.activity`, or None.
  """

  orders: list[merge_tree.Intervals]
  tree: np.ndarray
  first: np.ndarray
  second: np.ndarray
  rank: np.ndarray
  rank_of_coarser: np.ndarray
  consensus: np.ndarray
  node_consensus: np.ndarray
  area: np.ndarray
  boxes: np.ndarray
  perimeter: np.ndarray
  inner_length: np.ndarray
  outer: np.ndarray
  inner: np.ndarray
  joint_strength: np.ndarray
  joint_length: np.ndarray
  balance: np.ndarray
  colour: Moments
  deep: list[Moments]
  activity: np.ndarray | None

  def __len__(self) -> int:
    return len(self.tree)

  def membership(self, chosen: np.ndarray) -> np.ndarray:
    """The superpixels of the candidates `chosen` [M] int: [M, S] bool."""
    members = np.zeros((len(chosen), len(self.orders[0].position)), bool)
    for index, order in enumerate(self.orders):
      here = np.flatnonzero(self.tree[chosen] == index)
      members[here] = order.membership(self.first[chosen[here]])
      pairs = here[self.second[chosen[here]] != NO_NODE]
      members[pairs] |= order.membership(self.second[chosen[pairs]])
    return members


def make_candidates(
  graph: RegionGraph, trees: list[np.ndarray], *, pair_merges: int
) -> Candidates:
  """Collects the nodes of all `trees` and their pairs, without duplicates.

  Args:
    graph: the S superpixels.
    trees: [2S-1] int parents each, from `hierarchies.build_hierarchies`.
    pair_merges: pairs are formed among the children of the last so many merges
      of each tree: adjacent, disjoint, and not siblings (whose union is a
      node already).
  """
  features = _features(graph)
  # Sums over the superpixels: area, then each feature and its square.
  moments = [graph.sizes[:, None]]
  for values in features:
    square = (values**2).sum(1, keepdims=True)
    moments += [graph.sizes[:, None] * v for v in (values, square)]
  if graph.deep is not None:
    moments.append((graph.sizes * graph.deep.activity)[:, None])
  moments = np.concatenate(moments, 1)
  # Sums over the pixel edges between superpixels: their number, then each cue.
  edges = graph.length[:, None] * _edge_cues(graph)
  num_cues = edges.shape[1]
  ends = np.concatenate([graph.pairs[:, 0], graph.pairs[:, 1]])
  sides = np.stack(
    [np.bincount(ends, np.tile(e, 2), len(graph.sizes)) for e in edges.T], 1
  )
  leaves = np.concatenate([moments, sides], 1)
  keys = _superpixel_keys(len(graph.sizes))

  orders = [merge_tree.intervals(parents) for parents in trees]
  columns = []  # per tree: everything about its nodes, then about its pairs
  for index, (parents, order) in enumerate(zip(trees, orders, strict=True)):
    sums = merge_tree.accumulate(parents, leaves)
    inside = merge_tree.accumulate_inside(parents, graph.pairs, edges)
    node_keys = merge_tree.accumulate(parents, keys[:, None])[:, 0]
    reach = merge_tree.accumulate_maximum(
      parents, graph.boxes * np.array([-1, -1, 1, 1], np.int32)
    )
    rank = len(parents) - parents + 1.0
    rank[-1] = 1  # the root is its own parent
    first, second, joint = _touching_pairs(
      graph, parents, order, edges, pair_merges
    )
    area = sums[:, 0]
    none, ones = np.zeros(len(parents)), np.full(len(parents), NO_NODE)
    columns.append(
      dict(
        keys=np.concatenate([node_keys, node_keys[first] + node_keys[second]]),
        tree=np.full(len(parents) + len(first), index),
        first=np.concatenate([np.arange(len(parents)), first]),
        second=np.concatenate([ones, second]),
        rank=np.concatenate([rank, np.maximum(rank[first], rank[second])]),
        coarser=np.concatenate([rank, np.minimum(rank[first], rank[second])]),
        sums=np.concatenate([sums, sums[first] + sums[second]]),
        inside=np.concatenate([inside, inside[first] + inside[second] + joint]),
        reach=np.concatenate([reach, np.maximum(reach[first], reach[second])]),
        joint_strength=np.concatenate(
          [none, joint[:, 1] / np.maximum(joint[:, 0], 1)]
        ),
        joint_length=np.concatenate([none, joint[:, 0]]),
        balance=np.concatenate(
          [
            none,
            np.minimum(area[first], area[second])
            / np.maximum(area[first], area[second]),
          ]
        ),
      )
    )
  every = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}

  # Of equal sets the coarsest is kept, a node before a pair.
  is_pair = every["second"] != NO_NODE
  order = np.lexsort((every["rank"], is_pair, every["keys"]))
  begins = np.ones(len(order), bool)
  begins[1:] = np.diff(every["keys"][order]) != 0
  group = np.cumsum(begins) - 1
  chosen = order[begins]
  rank = np.full(len(chosen), np.inf)
  np.minimum.at(rank, group, every["rank"][order])

  def trees_holding(which):
    code = (group * len(trees) + every["tree"][order])[which]
    return np.bincount(np.unique(code) // len(trees), minlength=len(chosen))

  sums = every["sums"][chosen]
  total, sides = leaves.sum(0), sums[:, -num_cues:]
  inside = every["inside"][chosen]
  outside = np.maximum(sides - 2 * inside, 0)
  found, column = [], 1
  for values in features:
    stop = column + values.shape[1] + 1
    found.append(
      _moments(sums[:, 0], sums[:, column:stop], total[0], total[column:stop])
    )
    column = stop
  return Candidates(
    orders=orders,
    tree=every["tree"][chosen],
    first=every["first"][chosen],
    second=every["second"][chosen],
    rank=rank,
    rank_of_coarser=every["coarser"][chosen],
    consensus=trees_holding(slice(None)),
    node_consensus=trees_holding(~is_pair[order]),
    area=sums[:, 0],
    boxes=every["reach"][chosen] * np.array([-1, -1, 1, 1], np.int32),
    perimeter=outside[:, 0],
    inner_length=inside[:, 0],
    outer=outside[:, 1:] / np.maximum(outside[:, :1], 1),
    inner=inside[:, 1:] / np.maximum(inside[:, :1], 1),
    joint_strength=every["joint_strength"][chosen],
    joint_length=every["joint_length"][chosen],
    balance=every["balance"][chosen],
    colour=found[0],
    deep=found[1:],
    activity=None if graph.deep is None else sums[:, column] / sums[:, 0],
  )


def _features(graph: RegionGraph) -> list[np.ndarray]:
  """What moments are made of: Lab and a few components of deep features."""
  if graph.deep is None:
    return [graph.lab]
  return [graph.lab] + [
    standardise(_principal_components(x))
    for x in (graph.deep.part_and_object, graph.deep.scene)
  ]


def _principal_components(features: np.ndarray) -> np.ndarray:
  left, scale, _ = np.linalg.svd(
    features - features.mean(0), full_matrices=False
  )
  components = (left * scale)[:, :COMPONENTS]
  missing = COMPONENTS - components.shape[1]
  return np.pad(components, ((0, 0), (0, missing)))


def _edge_cues(graph: RegionGraph) -> np.ndarray:
  """[E, 1 + K]: ones, and the cues of `Candidates.outer`."""
  cues = [np.ones(len(graph.pairs)), graph.strength, graph.fine]
  if graph.deep is not None:
    cues += [
      relative(distance(x, graph.pairs))
      for x in (graph.deep.part_and_object, graph.deep.scene)
    ]
  return np.stack(cues, 1)


def _touching_pairs(graph, parents, order, edges, pair_merges):
  """Pairs of nodes [M], [M] of a tree, and the edges [M, 1 + K] between."""
  merges = min(pair_merges, len(graph.sizes) - 1)
  top = np.flatnonzero(parents[:-1] >= len(parents) - merges)
  # All these nodes are unions of the merges + 1 regions of one cut.
  region = merge_tree.cut(parents, merges + 1)
  _, some_leaf = np.unique(region, return_index=True)
  member = order.membership(top)[:, some_leaf].astype(np.float32)
  rows, columns = region[np.concatenate([graph.pairs, graph.pairs[:, ::-1]])].T
  size = (merges + 1, merges + 1)
  between = [
    member
    @ scipy.sparse.csr_matrix(
      (np.tile(e, 2).astype(np.float32), (rows, columns)), size
    ).toarray()
    @ member.T
    for e in edges.T
  ]
  apart = order.stop[top][:, None] <= order.start[top]
  apart |= apart.T
  siblings = parents[top][:, None] == parents[top]
  i, j = np.nonzero(np.triu((between[0] > 0) & apart & ~siblings))
  joint = np.stack([b[i, j] for b in between], 1).astype(np.float64)
  return top[i], top[j], joint


def _moments(area, sums, total_area, total) -> Moments:
  area = area[:, None]
  mean = sums[:, :-1] / area
  rest = (total[:-1] - sums[:, :-1]) / np.maximum(total_area - area, 1)
  variance = sums[:, -1] / area[:, 0] - (mean**2).sum(1)
  return Moments(
    mean=mean,
    spread=np.sqrt(np.maximum(variance, 0)),
    contrast=np.linalg.norm(mean - rest, axis=1),
  )


def _superpixel_keys(count: int) -> np.ndarray:
  """Fixed random [count] uint64: sums of different sets differ, almost surely.

  With 10^5 sets the chance that any two share a sum (modulo 2^64) is 3e-10.
  """
  return np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
