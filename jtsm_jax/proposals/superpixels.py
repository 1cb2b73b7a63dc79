"""Superpixels: connected sets of pixels, the atoms of all proposals."""

from __future__ import annotations

import higra as hg
import numpy as np

from jtsm_jax.proposals import merge_tree
from jtsm_jax.proposals.cues import Cues, blur, region_means


def make_superpixels(cues: Cues, num_superpixels: int) -> np.ndarray:
  """Cuts the image into connected superpixels.

  A watershed of the fine edges gives basins; Ward's linkage of their mean
  colours joins neighbours until `num_superpixels` are left (fewer where the
  image has fewer basins; one where it is constant).

  Args:
    cues: cues of an image of [H, W] pixels.
    num_superpixels: > 0.

  Returns:
    [H, W] int32, ids 0 .. S-1, S <= num_superpixels, each 4-connected.
  """
  shape = cues.fine.shape
  if shape[0] * shape[1] == 1:
    return np.zeros(shape, np.int32)
  grid = hg.get_4_adjacency_graph(shape)
  edges = blur(cues.fine, 0.7).astype(np.float64)
  weights = hg.weight_graph(grid, edges, hg.WeightFunction.mean)
  basins = hg.labelisation_watershed(grid, weights).ravel()
  basins = np.unique(basins, return_inverse=True)[1]
  num_basins = int(basins.max()) + 1
  if num_basins > num_superpixels:
    sizes = np.bincount(basins)
    means = region_means(basins, cues.lab.reshape(-1, 3), sizes)
    pairs = neighbour_pairs(basins.reshape(shape))[0]
    graph = hg.UndirectedGraph(num_basins)
    graph.add_edges(pairs[:, 0], pairs[:, 1])
    tree, _ = hg.binary_partition_tree_ward_linkage(
      graph, means, sizes.astype(np.float64), "none"
    )
    basins = merge_tree.cut(tree.parents(), num_superpixels)[basins]
  return basins.reshape(shape).astype(np.int32)


def neighbour_pairs(labels: np.ndarray) -> tuple[np.ndarray, ...]:
  """Pairs of 4-adjacent regions.

  Args:
    labels: [H, W] int, region ids 0 .. S-1.

  Returns:
    pairs: [E, 2] int64, i < j, sorted, each once.
    index: [N] int64, position in `pairs` of each pixel pair that crosses from
      one region to another.
    first, second: [N] int64, the flat indices of the two pixels of each.
  """
  flat = np.arange(labels.size).reshape(labels.shape)
  first = np.concatenate([flat[:, :-1].ravel(), flat[:-1].ravel()])
  second = np.concatenate([flat[:, 1:].ravel(), flat[1:].ravel()])
  a, b = labels.ravel()[first], labels.ravel()[second]
  crosses = a != b
  first, second, a, b = (v[crosses] for v in (first, second, a, b))
  count = int(labels.max()) + 1
  code = np.minimum(a, b).astype(np.int64) * count + np.maximum(a, b)
  code, index = np.unique(code, return_inverse=True)
  return np.stack([code // count, code % count], 1), index, first, second
