"""Tests of the merge trees of an image."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.sparse.linalg

from jtsm_jax.proposals import hierarchies, merge_tree
from jtsm_jax.proposals.cues import compute_cues
from jtsm_jax.proposals.deep_features import DeepFeatures
from jtsm_jax.proposals.region_graph import RegionGraph, build_region_graph
from jtsm_jax.proposals.superpixels import make_superpixels
from tests.proposals.region_graph_test import small_image


def random_features(count):
  rng = np.random.default_rng(1)
  return DeepFeatures(
    part=rng.normal(size=(count, 5)),
    object=rng.normal(size=(count, 6)),
    scene=rng.normal(size=(count, 7)),
    activity=rng.random(count),
  )


@pytest.fixture(scope="module", params=["cues", "network"])
def parts(request):
  """Superpixels and their graph, without and with deep features."""
  cues = compute_cues(small_image())
  superpixels = make_superpixels(cues, 30)
  deep = random_features(30) if request.param == "network" else None
  return superpixels, build_region_graph(superpixels, cues, deep)


def test_every_node_is_a_connected_union(parts):
  superpixels, graph = parts
  trees = hierarchies.build_hierarchies(graph)
  assert len(trees) == (6 if graph.deep is None else 8)
  for parents in trees:
    nodes = merge_tree.intervals(parents).membership(np.arange(59))
    assert nodes[-1].all()
    for node in range(30, 59):
      a, b = np.flatnonzero(parents[:-1] == node)
      assert not (nodes[a] & nodes[b]).any()
      np.testing.assert_array_equal(nodes[node], nodes[a] | nodes[b])
      mask = nodes[node][superpixels].astype(np.uint8)
      assert cv2.connectedComponents(mask, connectivity=4)[0] == 2


def test_trees_differ(parts):
  trees = hierarchies.build_hierarchies(parts[1])
  assert len({t.tobytes() for t in trees}) == len(trees)


def chain(count, strong):
  """A chain of regions with one strong boundary."""
  pairs = np.stack([np.arange(count - 1), np.arange(1, count)], 1)
  ones = np.ones(count - 1)
  strength = np.where(np.arange(count - 1) == strong, 4.0, 0.5)
  return RegionGraph(
    shape=(1, count),
    pairs=pairs,
    length=ones,
    fine=ones,
    strength=strength,
    sizes=np.ones(count),
    boxes=np.zeros((count, 4), np.int32),
    lab=np.zeros((count, 3)),
    colour_mix=np.zeros((count, 20)),
    texton_mix=np.zeros((count, 20)),
    deep=None,
  )


@pytest.mark.parametrize(("count", "strong"), [(8, 3), (300, 120)])
def test_spectral_steps_are_largest_across_the_gap(count, strong):
  """Both with all eigenvectors and with the largest few alone."""
  graph = chain(count, strong)
  embedding = hierarchies.spectral_embedding(
    graph, graph.strength, vectors=6, slope=2.0
  )
  assert embedding.shape == (count, 6)
  steps = np.linalg.norm(np.diff(embedding, axis=0), axis=1)
  assert steps.argmax() == strong


@pytest.mark.parametrize("count", [8, 300])  # all eigenvectors, and a few
def test_spectral_embedding_around_a_speck_on_even_ground(count):
  """All boundaries of a region are so strong that its affinities vanish."""
  graph = chain(count, 0)
  strength = np.full(count - 1, 1e-3)
  strength[2:4] = count
  embedding = hierarchies.spectral_embedding(
    graph, strength, vectors=6, slope=4.0
  )
  assert np.isfinite(embedding).all()
  assert np.isfinite((embedding**2).sum())
  steps = np.linalg.norm(np.diff(embedding, axis=0), axis=1)
  assert set(np.argsort(steps)[-2:]) == {2, 3}


def test_spectral_embedding_where_the_sparse_solver_gives_up(monkeypatch):
  graph = chain(300, 120)

  def give_up(*_, **__):
    raise scipy.sparse.linalg.ArpackNoConvergence("too close", [], [])

  expected = hierarchies.spectral_embedding(
    graph, graph.strength, vectors=6, slope=2.0
  )
  monkeypatch.setattr(scipy.sparse.linalg, "eigsh", give_up)
  found = hierarchies.spectral_embedding(
    graph, graph.strength, vectors=6, slope=2.0
  )
  np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-4)
