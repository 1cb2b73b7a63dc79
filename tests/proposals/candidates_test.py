"""Tests of the candidates, against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import hierarchies
from jtsm_jax.proposals.candidates import NO_NODE, make_candidates
from jtsm_jax.proposals.cues import compute_cues
from jtsm_jax.proposals.region_graph import build_region_graph
from jtsm_jax.proposals.superpixels import make_superpixels
from tests.proposals.hierarchies_test import random_features
from tests.proposals.merge_tree_test import leaves_of
from tests.proposals.region_graph_test import small_image


@pytest.fixture(scope="module")
def parts():
  cues = compute_cues(small_image())
  superpixels = make_superpixels(cues, 24)
  graph = build_region_graph(superpixels, cues, random_features(24))
  return superpixels, graph, hierarchies.build_hierarchies(graph)


def brute_force(graph, trees, pair_merges):
  """Every set with its least rank and the trees that hold it."""
  touching = {tuple(p) for p in graph.pairs} | {
    tuple(p[::-1]) for p in graph.pairs
  }
  rank, held, is_node = {}, {}, {}

  def add(members, value, tree, node):
    key = frozenset(members)
    rank[key] = min(rank.get(key, np.inf), value)
    held.setdefault(key, set()).add(tree)
    is_node[key] = is_node.get(key, False) or node

  for t, parents in enumerate(trees):
    sets = leaves_of(parents)
    count = len(graph.sizes)
    # After merge k (node count + k) there are count - k - 1 regions; a node
    # lives until its parent's merge.
    life = [count - (p - count) for p in parents]
    life[-1] = 1
    for n, members in enumerate(sets):
      add(members, life[n], t, True)
    first = len(parents) - min(pair_merges, count - 1)
    top = [n for n in range(len(parents) - 1) if parents[n] >= first]
    for i in top:
      for j in top:
        if (
          i < j
          and parents[i] != parents[j]
          and not sets[i] & sets[j]
          and any((a, b) in touching for a in sets[i] for b in sets[j])
        ):
          add(sets[i] | sets[j], max(life[i], life[j]), t, False)
  return rank, held, is_node


@pytest.mark.parametrize("pair_merges", [0, 6, 120])
def test_candidates_equal_brute_force(parts, pair_merges):
  _, graph, trees = parts
  found = make_candidates(graph, trees, pair_merges=pair_merges)
  rank, held, is_node = brute_force(graph, trees, pair_merges)
  members = found.membership(np.arange(len(found)))
  keys = [frozenset(np.flatnonzero(m)) for m in members]
  assert len(keys) == len(set(keys))  # no duplicates
  assert set(keys) == set(rank)
  for n, key in enumerate(keys):
    assert found.rank[n] == rank[key]
    assert found.consensus[n] == len(held[key])
    assert (found.second[n] == NO_NODE) == is_node[key]
    assert (found.node_consensus[n] > 0) == is_node[key]


def test_membership_of_some(parts):
  _, graph, trees = parts
  found = make_candidates(graph, trees, pair_merges=20)
  chosen = np.random.default_rng(0).permutation(len(found))[:50]
  np.testing.assert_array_equal(
    found.membership(chosen), found.membership(np.arange(len(found)))[chosen]
  )


def test_statistics_equal_loops_over_pixels(parts):
  superpixels, graph, trees = parts
  found = make_candidates(graph, trees, pair_merges=120)
  cues = [
    {tuple(p): s for p, s in zip(graph.pairs, values, strict=True)}
    for values in (graph.strength, graph.fine)
  ]
  for n in np.random.default_rng(0).choice(len(found), 12, replace=False):
    mask = found.membership(np.array([n]))[0][superpixels]
    outer, inner = [], []
    for a, b, s, t in (
      (mask[1:], mask[:-1], superpixels[1:], superpixels[:-1]),
      (mask[:, 1:], mask[:, :-1], superpixels[:, 1:], superpixels[:, :-1]),
    ):
      for y, x in np.argwhere(s != t):
        pair = tuple(sorted((s[y, x], t[y, x])))
        if a[y, x] != b[y, x]:
          outer.append([cue[pair] for cue in cues])
        elif a[y, x]:
          inner.append([cue[pair] for cue in cues])
    assert found.area[n] == mask.sum()
    assert found.perimeter[n] == len(outer)
    assert found.inner_length[n] == len(inner)
    for values, means in ((outer, found.outer[n]), (inner, found.inner[n])):
      expected = np.mean(values, 0) if values else np.zeros(2)
      np.testing.assert_allclose(means[:2], expected, rtol=1e-3, atol=1e-6)
    rows, columns = np.nonzero(mask)
    box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    np.testing.assert_array_equal(found.boxes[n], box)


def test_moments_equal_their_definition(parts):
  superpixels, graph, trees = parts
  found = make_candidates(graph, trees, pair_merges=120)
  lab = graph.lab[superpixels]  # the mean colour of its superpixel
  activity = graph.deep.activity[superpixels]
  assert len(found.deep) == 2
  for n in np.random.default_rng(1).choice(len(found), 12, replace=False):
    mask = found.membership(np.array([n]))[0][superpixels]
    if mask.all():
      continue
    mean = lab[mask].mean(0)
    spread = np.sqrt(((lab[mask] - mean) ** 2).sum(1).mean())
    contrast = np.linalg.norm(mean - lab[~mask].mean(0))
    np.testing.assert_allclose(found.colour.mean[n], mean)
    assert found.colour.spread[n] == pytest.approx(spread, abs=1e-6)
    assert found.colour.contrast[n] == pytest.approx(contrast)
    assert found.activity[n] == pytest.approx(activity[mask].mean())


def test_pairs_know_what_lies_between_their_parts(parts):
  _, graph, trees = parts
  found = make_candidates(graph, trees, pair_merges=120)
  pairs = np.flatnonzero(found.second != NO_NODE)
  for n in np.random.default_rng(2).choice(pairs, 12, replace=False):
    order = found.orders[found.tree[n]]
    first, second = order.membership(
      np.array([found.first[n], found.second[n]])
    )
    i, j = graph.pairs.T
    between = (first[i] & second[j]) | (first[j] & second[i])
    length = graph.length[between]
    assert found.joint_length[n] == length.sum()
    assert found.joint_strength[n] == pytest.approx(
      (length * graph.strength[between]).sum() / length.sum(), rel=1e-4
    )
    areas = sorted(graph.sizes[m].sum() for m in (first, second))
    assert found.balance[n] == pytest.approx(areas[0] / areas[1])
    coarser = found.rank_of_coarser[n]
    assert coarser <= found.rank[n] or found.consensus[n] > 1
