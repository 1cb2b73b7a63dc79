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
  for n, a in enumerate(membership):
    row = slice(found.start[n], found.start[n + 1])
    got = dict(zip(found.other[row], found.iou[row], strict=True))
    expected = {
      k: iou(a, b, sizes)
      for k, b in enumerate(membership)
      if k != n and iou(a, b, sizes) > diversity.LEAST_IOU
    }
    assert got == pytest.approx(expected)
    assert len(found.other[row]) == len(expected)


def greedy(membership, sizes, scores, count):
  """The definition of `select`, as a plain loop."""
  taken, left = [], list(range(len(scores)))
  while left and len(taken) < count:
    gains = []
    for n in left:
      overlaps = [iou(membership[n], membership[k], sizes) for k in taken]
      most = max([o for o in overlaps if o > diversity.LEAST_IOU], default=0)
      rest = max(1 - most, diversity.LEAST_GAIN)
      gains.append(scores[n] + diversity.DISCOUNT * np.log(rest))
    best = left[int(np.argmax(gains))]
    taken.append(best)
    left.remove(best)
  return taken


@pytest.mark.parametrize("count", [1, 25, 1000])
def test_select_equals_the_loop(count):
  membership, sizes = random_sets(60)
  scores = np.random.default_rng(3).integers(0, 12, 60) / 4.0  # with ties
  chosen = diversity.select(
    scores,
    diversity.find_overlaps(membership, sizes),
    max_proposals=count,
  )
  expected = greedy(membership, sizes, scores, count)
  assert list(chosen) == expected


def test_nothing_to_choose_from():
  overlaps = diversity.find_overlaps(np.zeros((0, 4), bool), np.ones(4))
  assert not len(diversity.select(np.zeros(0), overlaps, max_proposals=3))
