"""Tests of the diverse choice, against loops over all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import diversity


def random_sets(count, seed=2):
  rng = np.random.default_rng(seed)
  membership = rng.random((count, 9)) < 0.8
  membership[~membership.any(1), 0] = True
  return membership, rng.integers(1, 50, 9).astype(np.float64)


def iou(a, b, sizes):
  return sizes[a & b].sum() / sizes[a | b].sum()


@pytest.mark.parametrize("block", [1, 7, 256])
def test_overlaps_equal_the_loop(monkeypatch, block):
  monkeypatch.setattr(diversity, "BLOCK", block)
  membership, sizes = random_sets(60)
  found = diversity.find_overlaps(membership, sizes)
  expected = [[iou(a, b, sizes) for b in membership] for a in membership]
  expected = np.where(np.array(expected) > diversity.LEAST_IOU, expected, 0)
  np.fill_diagonal(expected, 0)
  np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
  assert found.nnz == np.count_nonzero(expected)


def test_of_too_many_overlaps_the_largest_are_kept(monkeypatch):
  membership, sizes = random_sets(60)
  every = diversity.find_overlaps(membership, sizes).toarray()
  monkeypatch.setattr(diversity, "MAX_OVERLAPS", np.count_nonzero(every) // 2)
  monkeypatch.setattr(diversity, "SAMPLE", 1)
  kept = diversity.find_overlaps(membership, sizes).toarray()
  # The diagonal counts too, and equal overlaps stay or go together.
  assert 0.3 * every.astype(bool).sum() < kept.astype(bool).sum()
  assert kept.astype(bool).sum() <= diversity.MAX_OVERLAPS
  left_out = every[(every > 0) & (kept == 0)]
  assert left_out.max() <= kept[kept > 0].min()
  np.testing.assert_array_equal(kept[kept > 0], every[kept > 0])


def expected_cover(taken, membership, sizes, probability):
  """What a set of proposals covers, from the definition."""
  total = 0.0
  for j, p in enumerate(probability):
    overlaps = [iou(membership[j], membership[k], sizes) for k in taken]
    total += p * max(
      [o for o in overlaps if o > diversity.LEAST_IOU], default=0
    )
  return total


@pytest.mark.parametrize("count", [1, 25, 1000])
def test_each_choice_adds_most(count):
  membership, sizes = random_sets(60)
  membership = np.unique(membership, axis=0)
  scores = np.random.default_rng(3).normal(size=len(membership))
  chosen = diversity.select(
    scores,
    diversity.find_overlaps(membership, sizes),
    max_proposals=count,
  ).tolist()
  assert len(chosen) == len(set(chosen)) == min(count, len(membership))
  probability = np.exp(scores)
  for n, taken in enumerate(chosen):
    covers = [
      expected_cover([*chosen[:n], k], membership, sizes, probability)
      for k in range(len(membership))
    ]
    assert covers[taken] == pytest.approx(max(covers), rel=1e-6)


def test_many_versions_of_one_segment_come_before_a_likelier_single_one():
  """Five versions of a large segment, 0.1 each, and a small one of 0.2."""
  membership = np.zeros((6, 30), bool)
  for n in range(5):
    membership[n, :20] = True
    membership[n, n] = False
  membership[5, 25] = True
  overlaps = diversity.find_overlaps(membership, np.ones(30))
  scores = np.log([0.1, 0.1, 0.1, 0.1, 0.1, 0.2])
  chosen = diversity.select(scores, overlaps, max_proposals=3)
  assert list(chosen[:2]) == [0, 5]


def test_nothing_to_choose_from():
  overlaps = diversity.find_overlaps(np.zeros((0, 4), bool), np.ones(4))
  assert not len(diversity.select(np.zeros(0), overlaps, max_proposals=3))
