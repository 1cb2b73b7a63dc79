"""Tests of the region graph and the merge trees."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from jtsm_jax.proposals import hierarchy
from jtsm_jax.proposals import superpixels as superpixels_lib


def small_image():
  rng = np.random.default_rng(3)
  image = np.full((48, 64, 3), (90, 120, 60), np.float64)
  image[10:30, 12:40] = (200, 60, 60)
  image[34:, 44:] = (40, 60, 190)
  image += rng.normal(0, 8, image.shape)
  return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def parts():
  cues = superpixels_lib.compute_cues(small_image())
  superpixels = superpixels_lib.make_superpixels(cues, 30)
  graph = hierarchy.build_region_graph(superpixels, cues)
  return cues, superpixels, graph


def test_region_graph_statistics(parts):
  cues, superpixels, graph = parts
  for s in (0, 13, 29):
    mask = superpixels == s
    assert graph.sizes[s] == mask.sum()
    np.testing.assert_allclose(graph.lab[s], cues.lab[mask].mean(0), rtol=1e-4)
    histogram = np.bincount(cues.textons[mask], minlength=20) / mask.sum()
    np.testing.assert_allclose(graph.texton_mix[s] ** 2, histogram)
    rows, columns = np.nonzero(mask)
    touches = [
      rows.min() == 0,
      columns.min() == 0,
      rows.max() == 47,
      columns.max() == 63,
    ]
    np.testing.assert_array_equal(graph.border[s], touches)
  crossings = (superpixels[1:] != superpixels[:-1]).sum() + (
    superpixels[:, 1:] != superpixels[:, :-1]
  ).sum()
  assert graph.length.sum() == crossings


def test_every_node_is_a_connected_union(parts):
  _, superpixels, graph = parts
  trees = hierarchy.build_hierarchies(graph)
  assert len(trees) >= 4
  for parents in trees:
    nodes = hierarchy.node_membership(parents)
    assert nodes.shape == (59, 30)
    assert nodes[-1].all()
    for node in range(30, 59):
      a, b = np.flatnonzero(parents[:-1] == node)
      assert not (nodes[a] & nodes[b]).any()
      np.testing.assert_array_equal(nodes[node], nodes[a] | nodes[b])
      mask = nodes[node][superpixels].astype(np.uint8)
      assert cv2.connectedComponents(mask, connectivity=4)[0] == 2


def test_trees_differ(parts):
  trees = hierarchy.build_hierarchies(parts[2])
  assert len({t.tobytes() for t in trees}) == len(trees)


def test_node_membership_by_hand():
  nodes = hierarchy.node_membership(np.array([3, 4, 3, 4, 4]))
  np.testing.assert_array_equal(
    nodes,
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]],
  )


def test_spectral_distance_is_largest_across_the_gap():
  """A chain of eight regions with one strong boundary in the middle."""
  pairs = np.stack([np.arange(7), np.arange(1, 8)], 1)
  strength = np.where(np.arange(7) == 3, 4.0, 0.5)
  ones = np.ones(7)
  graph = hierarchy.RegionGraph(
    pairs=pairs,
    length=ones,
    fine=ones,
    strength=strength,
    sizes=np.ones(8),
    lab=np.zeros((8, 3)),
    colour_mix=np.zeros((8, 20)),
    texton_mix=np.zeros((8, 20)),
    border=np.zeros((8, 4), bool),
  )
  distance = hierarchy.spectral_distance(graph)
  assert distance.argmax() == 3
  assert distance.mean() == pytest.approx(1)
