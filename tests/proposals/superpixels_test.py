"""Tests of the cues and superpixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from jtsm_jax.proposals import superpixels as lib


def noisy_halves(height=40, width=60, column=25):
  image = np.full((height, width, 3), 60, np.float64)
  image[:, column:] = (200, 80, 40)
  image += np.random.default_rng(0).normal(0, 4, image.shape)
  return np.clip(image, 0, 255).astype(np.uint8)


def test_fine_edges_stand_where_the_colour_changes():
  cues = lib.compute_cues(noisy_halves())
  assert cues.fine.shape == (40, 60)
  assert set(cues.fine.argmax(1)) <= {24, 25}
  assert cues.fine.mean() == pytest.approx(1, abs=1e-4)


def test_coarse_edges_see_a_change_of_texture_alone():
  """Two checkerboards with the same two greys and different period."""
  y, x = np.mgrid[:96, :96]
  period = np.where(x < 48, 2, 6)
  board = (y // period + x // period) % 2
  image = np.repeat((80 + 90 * board)[..., None], 3, 2).astype(np.uint8)
  words = lib.compute_cues(image).textons
  strength = lib._word_gradient(words, sigma=6, shrink=4)[10:-10, 10:-10]
  peak = strength.mean(0).argmax() + 10
  assert abs(peak - 48) <= 6


@pytest.mark.parametrize("num", [1, 7, 40])
def test_superpixels_number_and_connectedness(num):
  superpixels = lib.make_superpixels(lib.compute_cues(noisy_halves()), num)
  assert superpixels.dtype == np.int32
  np.testing.assert_array_equal(np.unique(superpixels), np.arange(num))
  for i in range(num):
    mask = (superpixels == i).astype(np.uint8)
    assert cv2.connectedComponents(mask, connectivity=4)[0] == 2


def test_two_superpixels_are_the_two_halves():
  superpixels = lib.make_superpixels(lib.compute_cues(noisy_halves()), 2)
  assert len(np.unique(superpixels[:, :24])) == 1
  assert len(np.unique(superpixels[:, 26:])) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (8, 8)])
def test_constant_images_have_one_superpixel(shape):
  image = np.full((*shape, 3), 77, np.uint8)
  superpixels = lib.make_superpixels(lib.compute_cues(image), 50)
  np.testing.assert_array_equal(superpixels, np.zeros(shape, np.int32))


def test_cut_tree_by_hand():
  # Leaves 0..3; 4 = {1, 2}, 5 = {0, 4}, 6 = {5, 3}.
  parents = np.array([5, 4, 4, 6, 5, 6, 6])
  for num, groups in [
    (1, [[0, 1, 2, 3]]),
    (2, [[0, 1, 2], [3]]),
    (3, [[0], [1, 2], [3]]),
    (4, [[0], [1], [2], [3]]),
  ]:
    labels = lib.cut_tree(parents, num)
    found = [list(np.flatnonzero(labels == v)) for v in range(num)]
    assert sorted(found) == groups


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
