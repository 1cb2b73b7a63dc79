"""Tests of the superpixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from jtsm_jax.proposals import superpixels as lib
from jtsm_jax.proposals.cues import compute_cues
from tests.proposals.cues_test import noisy_halves


@pytest.mark.parametrize("num", [1, 7, 40])
def test_superpixels_number_and_connectedness(num):
  superpixels = lib.make_superpixels(compute_cues(noisy_halves()), num)
  assert superpixels.dtype == np.int32
  np.testing.assert_array_equal(np.unique(superpixels), np.arange(num))
  for i in range(num):
    mask = (superpixels == i).astype(np.uint8)
    assert cv2.connectedComponents(mask, connectivity=4)[0] == 2


def test_two_superpixels_are_the_two_halves():
  superpixels = lib.make_superpixels(compute_cues(noisy_halves()), 2)
  assert len(np.unique(superpixels[:, :24])) == 1
  assert len(np.unique(superpixels[:, 26:])) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (8, 8)])
def test_constant_images_have_one_superpixel(shape):
  image = np.full((*shape, 3), 77, np.uint8)
  superpixels = lib.make_superpixels(compute_cues(image), 50)
  np.testing.assert_array_equal(superpixels, np.zeros(shape, np.int32))


def test_neighbour_pairs_against_a_loop():
  labels = np.random.default_rng(1).integers(0, 5, (6, 7))
  counts = {}
  for y in range(6):
    for x in range(7):
      for v, u in ((y + 1, x), (y, x + 1)):
        if v < 6 and u < 7 and labels[y, x] != labels[v, u]:
          pair = tuple(sorted((int(labels[y, x]), int(labels[v, u]))))
          counts[pair] = counts.get(pair, 0) + 1
  pairs, index, first, second = lib.neighbour_pairs(labels)
  assert [tuple(p) for p in pairs] == sorted(counts)
  np.testing.assert_array_equal(
    np.bincount(index), [counts[tuple(p)] for p in pairs]
  )
  ends = np.stack([labels.ravel()[first], labels.ravel()[second]], 1)
  np.testing.assert_array_equal(np.sort(ends, 1), pairs[index])
