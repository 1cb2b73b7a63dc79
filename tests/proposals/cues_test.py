"""Tests of the gradients and words of an image."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import cues as lib


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
