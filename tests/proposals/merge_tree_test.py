"""Tests of the arithmetic on merge trees, against loops over sets."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import merge_tree


def random_tree(count, seed):
  """Joins two random regions until one is left."""
  rng = np.random.default_rng(seed)
  parents = np.arange(2 * count - 1)
  regions = list(range(count))
  for node in range(count, 2 * count - 1):
    for _ in range(2):
      parents[regions.pop(rng.integers(len(regions)))] = node
    regions.append(node)
  return parents


def leaves_of(parents):
  """The set of leaves of each node, by walking up from every leaf."""
  sets = [set() for _ in parents]
  for leaf in range((len(parents) + 1) // 2):
    node = leaf
    while True:
      sets[node].add(leaf)
      if parents[node] == node:
        break
      node = parents[node]
  return sets


@pytest.fixture(params=[1, 2, 3, 40])
def tree(request):
  parents = random_tree(request.param, seed=request.param)
  return parents, leaves_of(parents)


def test_cut_by_hand():
  # Leaves 0..3; 4 = {1, 2}, 5 = {0, 4}, 6 = {5, 3}.
  parents = np.array([5, 4, 4, 6, 5, 6, 6])
  for num, groups in [
    (1, [[0, 1, 2, 3]]),
    (2, [[0, 1, 2], [3]]),
    (3, [[0], [1, 2], [3]]),
    (4, [[0], [1], [2], [3]]),
  ]:
    labels = merge_tree.cut(parents, num)
    found = [list(np.flatnonzero(labels == v)) for v in range(num)]
    assert sorted(found) == groups


def test_sums_and_maxima_of_the_leaves(tree):
  parents, sets = tree
  values = np.random.default_rng(0).integers(-50, 50, (len(sets[-1]), 3))
  sums = merge_tree.accumulate(parents, values)
  maxima = merge_tree.accumulate_maximum(parents, values)
  for node, members in enumerate(sets):
    np.testing.assert_array_equal(sums[node], values[[*members]].sum(0))
    np.testing.assert_array_equal(maxima[node], values[[*members]].max(0))


def test_sums_over_the_pairs_inside():
  parents = random_tree(30, seed=1)
  rng = np.random.default_rng(2)
  pairs = np.array([(i, j) for i in range(30) for j in range(i) if i % (j + 2)])
  values = rng.random((len(pairs), 2))
  found = merge_tree.accumulate_inside(parents, pairs, values)
  for node, members in enumerate(leaves_of(parents)):
    inside = [i in members and j in members for i, j in pairs]
    np.testing.assert_allclose(found[node], values[inside].sum(0), atol=1e-12)


def test_every_node_is_an_interval(tree):
  parents, sets = tree
  order = merge_tree.intervals(parents)
  np.testing.assert_array_equal(
    np.sort(order.position), np.arange(len(sets[-1]))
  )
  members = order.membership(np.arange(len(parents)))
  for node, expected in enumerate(sets):
    assert set(np.flatnonzero(members[node])) == expected
