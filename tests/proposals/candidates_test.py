"""Tests of the candidates, against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import candidates as candidates_lib
from jtsm_jax.proposals import hierarchy
from jtsm_jax.proposals import superpixels as superpixels_lib
from tests.proposals.hierarchy_test import small_image


@pytest.fixture(scope="module")
def parts():
  cues = superpixels_lib.compute_cues(small_image())
  superpixels = superpixels_lib.make_superpixels(cues, 24)
  graph = hierarchy.build_region_graph(superpixels, cues)
  trees = hierarchy.build_hierarchies(graph)
  return superpixels, graph, trees


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
    sets = [set(np.flatnonzero(m)) for m in hierarchy.node_membership(parents)]
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
  found = candidates_lib.make_candidates(graph, trees, pair_merges=pair_merges)
  rank, held, is_node = brute_force(graph, trees, pair_merges)
  keys = [frozenset(np.flatnonzero(m)) for m in found.membership]
  assert len(keys) == len(set(keys))  # no duplicates
  assert set(keys) == set(rank)
  for n, key in enumerate(keys):
    assert found.rank[n] == rank[key]
    assert found.consensus[n] == len(held[key])
    assert found.is_pair[n] != is_node[key]


def test_statistics_equal_loops_over_pixels(parts):
  superpixels, graph, trees = parts
  found = candidates_lib.make_candidates(graph, trees)
  strength = {
    tuple(p): s for p, s in zip(graph.pairs, graph.strength, strict=True)
  }
  for n in np.random.default_rng(0).choice(len(found.area), 12, replace=False):
    mask = found.membership[n][superpixels]
    outer, inner = [], []
    for a, b, s, t in (
      (mask[1:], mask[:-1], superpixels[1:], superpixels[:-1]),
      (mask[:, 1:], mask[:, :-1], superpixels[:, 1:], superpixels[:, :-1]),
    ):
      for y, x in np.argwhere(s != t):
        value = strength[tuple(sorted((s[y, x], t[y, x])))]
        if a[y, x] != b[y, x]:
          outer.append(value)
        elif a[y, x]:
          inner.append(value)
    sides = mask[0], mask[:, 0], mask[-1], mask[:, -1]
    assert found.area[n] == mask.sum()
    assert found.perimeter[n] == len(outer)
    assert found.outer[n] == pytest.approx(
      sum(outer) / max(len(outer), 1), 1e-4
    )
    assert found.inner[n] == pytest.approx(
      sum(inner) / max(len(inner), 1), rel=1e-3, abs=1e-6
    )
    assert found.borders[n] == sum(side.any() for side in sides)
