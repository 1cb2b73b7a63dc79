"""Several merge trees (hierarchies) of the superpixels of an image.

Different cues fail on different images, so the trees differ in what they
compare (edges, colour and texture, a classifier's features, a spectral
embedding of any of them) and in how they merge: Ward's linkage and watershed
hierarchies by volume keep regions of like size, average linkage lets a small
region stand out for long. The weights come from studies on VOC 2007 and COCO
photographs; they are round numbers and were not fitted to masks.
"""

from __future__ import annotations

import higra as hg
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from jtsm_jax.proposals.cues import relative
from jtsm_jax.proposals.deep_features import standardise
from jtsm_jax.proposals.region_graph import RegionGraph, distance

DENSE_LIMIT = 200  # regions up to which all eigenvectors are computed
TINY = 1e-9
GREATEST_EXPONENT = 300.0  # its square is far from the end of a float64, too


def build_hierarchies(graph: RegionGraph) -> list[np.ndarray]:
  """Builds the merge trees of one image.

  Returns:
    One array per tree, [2S-1] int64 parents as `merge_tree` describes them:
    eight with the classifier's features, six without. Every node is a
    4-connected region.
  """
  if len(graph.sizes) == 1:
    return [np.zeros(1, np.int64)]
  strength = graph.strength
  appearance = standardise(
    np.concatenate([graph.texton_mix, graph.colour_mix, graph.lab], axis=1)
  )
  spectrum = spectral_embedding(graph, strength, vectors=12, slope=2.0)
  long_range = spectral_embedding(graph, strength, vectors=24, slope=4.0)
  trees = [
    _average_linkage(graph, relative(distance(long_range, graph.pairs))),
    _volume_watershed(graph, strength),
    _ward_linkage(graph, appearance, standardise(spectrum)),
  ]
  if graph.deep is None:
    return [
      *trees,
      _ward_linkage(graph, spectrum),
      _ward_linkage(graph, appearance),
      _average_linkage(graph, strength),
    ]
  deep, objects = graph.deep, graph.deep.object
  part_and_object = deep.part_and_object
  with_deep = relative(
    strength + 2 * relative(distance(part_and_object, graph.pairs))
  )
  spectrum = spectral_embedding(graph, with_deep, vectors=12, slope=3.0)
  return [
    *trees,
    _volume_watershed(graph, with_deep),
    _ward_linkage(graph, part_and_object, appearance, standardise(spectrum)),
    _ward_linkage(graph, part_and_object, deep.scene, appearance),
    _ward_linkage(graph, part_and_object),
    _ward_linkage(graph, objects),
  ]


def spectral_embedding(
  graph: RegionGraph, strength: np.ndarray, *, vectors: int, slope: float
) -> np.ndarray:
  """Coordinates in which regions with many weak boundaries between are near.

  The eigenvectors of the normalised Laplacian (Shi and Malik, 2000), divided
  by the roots of their eigenvalues: long-range evidence, which a weak piece
  of a long contour lacks by itself.

  Args:
    graph: the S regions.
    strength: [E] float64 >= 0 with mean 1; affinity = exp(-slope * strength).
    vectors: at most so many eigenvectors.
    slope: see `strength`.

  Returns:
    [S, min(vectors, S - 1)] float64.
  """
  count = len(graph.sizes)
  vectors = min(vectors, count - 1)
  rows, columns = np.concatenate([graph.pairs, graph.pairs[:, ::-1]]).T
  # Around a speck on an even ground all of it would be 0, and 1 / 0 the scale.
  exponent = np.minimum(slope * strength, GREATEST_EXPONENT)
  affinity = np.exp(-np.concatenate([exponent, exponent]))
  scale = 1 / np.sqrt(np.bincount(rows, affinity, count))
  similarity = scipy.sparse.csr_matrix(
    (affinity * scale[rows] * scale[columns], (rows, columns)), (count, count)
  )
  values, basis = _largest_eigenvectors(similarity, vectors + 1)
  values = 1 - values[::-1][1 : vectors + 1]
  basis = basis[:, ::-1][:, 1 : vectors + 1]
  return scale[:, None] * basis / np.sqrt(np.maximum(values, TINY))


def _largest_eigenvectors(matrix, number):
  """Eigenvalues in ascending order and their vectors; maybe more of them."""
  if matrix.shape[0] > DENSE_LIMIT:
    try:
      return scipy.sparse.linalg.eigsh(
        matrix, k=number, which="LA", v0=np.ones(matrix.shape[0])
      )
    except scipy.sparse.linalg.ArpackError:
      pass  # eigenvalues too close to each other, for example
  return np.linalg.eigh(matrix.toarray())


def _average_linkage(graph: RegionGraph, weights: np.ndarray) -> np.ndarray:
  tree, _ = hg.binary_partition_tree_average_linkage(
    _higra_graph(graph), weights, graph.length
  )
  return tree.parents().astype(np.int64)


def _ward_linkage(graph: RegionGraph, *features: np.ndarray) -> np.ndarray:
  tree, _ = hg.binary_partition_tree_ward_linkage(
    _higra_graph(graph), np.concatenate(features, 1), graph.sizes, "none"
  )
  return tree.parents().astype(np.int64)


def _volume_watershed(graph: RegionGraph, weights: np.ndarray) -> np.ndarray:
  edges = _higra_graph(graph)
  tree, heights = hg.watershed_hierarchy_by_volume(
    edges, weights, vertex_area=graph.sizes
  )
  tree, _ = hg.bpt_canonical(edges, hg.saliency(tree, heights))
  return tree.parents().astype(np.int64)


def _higra_graph(graph: RegionGraph) -> hg.UndirectedGraph:
  result = hg.UndirectedGraph(len(graph.sizes))
  result.add_edges(graph.pairs[:, 0], graph.pairs[:, 1])
  return result
