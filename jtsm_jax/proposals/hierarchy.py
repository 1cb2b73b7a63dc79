"""The graph of superpixels and several merge trees (hierarchies) on it.

Different cues fail on different images, so the trees differ in what they
compare: edges between regions, colours, textures, or a spectral embedding.
The weights come from a prototype study on VOC 2007 and COCO photographs; they
are round numbers and were not fitted to masks.
"""

from __future__ import annotations

import dataclasses

import higra as hg
import numpy as np

from jtsm_jax.proposals import superpixels as superpixels_lib

NUM_EIGENVECTORS = 12
AFFINITY_SLOPE = 2.0  # affinity = exp(-slope * strength), strength has mean 1
TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class RegionGraph:
  """S superpixels and the E pairs of them that touch.

  Attributes:
    pairs: [E, 2] int64, i < j, sorted.
    length: [E] float64, pixel pairs along the common boundary.
    fine: [E] float64 >= 0, mean strength of the fine edges along it.
    strength: [E] float64 >= 0, all cues combined; mean 1, or all 0.
    sizes: [S] float64, pixels.
    lab: [S, 3] float64, mean colour.
    colour_mix: [S, 20] float64, square roots of the colour word histogram.
    texton_mix: [S, 20] float64, square roots of the texton histogram.
    border: [S, 4] bool, touches the top, left, bottom, right of the image.
  """

  pairs: np.ndarray
  length: np.ndarray
  fine: np.ndarray
  strength: np.ndarray
  sizes: np.ndarray
  lab: np.ndarray
  colour_mix: np.ndarray
  texton_mix: np.ndarray
  border: np.ndarray


def build_region_graph(
  superpixels: np.ndarray, cues: superpixels_lib.Cues
) -> RegionGraph:
  """Collects the statistics of `superpixels`, [H, W] int32 ids 0 .. S-1."""
  labels = superpixels.ravel()
  sizes = np.bincount(labels).astype(np.float64)
  pairs, index, first, second = superpixels_lib.neighbour_pairs(superpixels)
  length = np.bincount(index, minlength=len(pairs)).astype(np.float64)

  def along_boundary(edges: np.ndarray) -> np.ndarray:
    flat = edges.ravel()
    crossing = (flat[first] + flat[second]) / 2
    return np.bincount(index, crossing, len(pairs)) / np.maximum(length, 1)

  def word_mix(words: np.ndarray) -> np.ndarray:
    num_words = superpixels_lib.NUM_WORDS
    code = labels.astype(np.int64) * num_words + words.ravel()
    counts = np.bincount(code, minlength=len(sizes) * num_words)
    return np.sqrt(counts.reshape(-1, num_words) / sizes[:, None])

  lab = superpixels_lib.region_means(labels, cues.lab.reshape(-1, 3), sizes)
  colour_mix, texton_mix = word_mix(cues.colours), word_mix(cues.textons)
  fine = along_boundary(cues.fine)
  strength = _relative(
    _relative(along_boundary(cues.coarse))
    + 0.25 * _relative(_distance(colour_mix, pairs))
    + 0.15 * _relative(_distance(texton_mix, pairs))
    + 0.15 * _relative(_distance(lab, pairs))
  )
  sides = superpixels[0], superpixels[:, 0], superpixels[-1], superpixels[:, -1]
  border = np.zeros((len(sizes), 4), bool)
  for side, ids in enumerate(sides):
    border[ids, side] = True
  return RegionGraph(
    pairs=pairs,
    length=length,
    fine=fine,
    strength=strength,
    sizes=sizes,
    lab=lab,
    colour_mix=colour_mix,
    texton_mix=texton_mix,
    border=border,
  )


def build_hierarchies(graph: RegionGraph) -> list[np.ndarray]:
  """Builds the merge trees of one image.

  Returns:
    One array per tree: [2S-1] int64 parents. Nodes 0 .. S-1 are the
    superpixels, node S + k is the k-th merge, the last node is the image and
    its own parent. Every node is a connected region.
  """
  if len(graph.sizes) == 1:
    return [np.zeros(1, np.int64)]
  spectral = spectral_distance(graph)
  texture = np.concatenate(
    [graph.texton_mix, graph.colour_mix, graph.lab], axis=1
  )
  return [
    _average_linkage(graph, graph.fine),
    _average_linkage(graph, graph.strength),
    _average_linkage(graph, spectral),
    _average_linkage(graph, graph.strength + spectral),
    _ward_linkage(graph, graph.lab),
    _ward_linkage(graph, texture),
  ]


def spectral_distance(graph: RegionGraph) -> np.ndarray:
  """Distance of touching superpixels in a spectral embedding.

  The eigenvectors of the normalised Laplacian (Shi and Malik, 2000), divided
  by the roots of their eigenvalues: long-range evidence, which a weak piece
  of a long contour lacks by itself.

  Returns:
    [E] float64 >= 0; mean 1, or all 0.
  """
  count = len(graph.sizes)
  i, j = graph.pairs.T
  affinity = np.zeros((count, count))
  affinity[i, j] = affinity[j, i] = np.exp(-AFFINITY_SLOPE * graph.strength)
  scale = 1 / np.sqrt(affinity.sum(1))
  laplacian = np.eye(count) - scale[:, None] * affinity * scale
  values, vectors = np.linalg.eigh(laplacian)
  chosen = slice(1, 1 + NUM_EIGENVECTORS)
  embedding = scale[:, None] * vectors[:, chosen]
  embedding /= np.sqrt(np.maximum(values[chosen], TINY))
  return _relative(_distance(embedding, graph.pairs))


def node_membership(parents: np.ndarray) -> np.ndarray:
  """The superpixels of each node of a merge tree.

  Args:
    parents: [2S-1] int, see `build_hierarchies`.

  Returns:
    [2S-1, S] bool.
  """
  num_nodes = len(parents)
  member = np.eye(num_nodes, (num_nodes + 1) // 2, dtype=bool)
  for node in range(num_nodes - 1):  # children stand before their parent
    member[parents[node]] |= member[node]
  return member


def _average_linkage(graph: RegionGraph, weights: np.ndarray) -> np.ndarray:
  tree, _ = hg.binary_partition_tree_average_linkage(
    _higra_graph(graph), weights, graph.length
  )
  return tree.parents().astype(np.int64)


def _ward_linkage(graph: RegionGraph, features: np.ndarray) -> np.ndarray:
  tree, _ = hg.binary_partition_tree_ward_linkage(
    _higra_graph(graph), features, graph.sizes, "none"
  )
  return tree.parents().astype(np.int64)


def _higra_graph(graph: RegionGraph) -> hg.UndirectedGraph:
  result = hg.UndirectedGraph(len(graph.sizes))
  result.add_edges(graph.pairs[:, 0], graph.pairs[:, 1])
  return result


def _distance(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  difference = features[pairs[:, 0]] - features[pairs[:, 1]]
  return np.linalg.norm(difference, axis=1)


def _relative(values: np.ndarray) -> np.ndarray:
  mean = values.mean() if len(values) else 0.0
  return values / mean if mean > TINY else np.zeros_like(values)
