"""Tests of the network's features of superpixels."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jtsm_jax.proposals import deep_features as lib
from jtsm_jax.types import InputError


def stripes(height, width, count):
  """Vertical superpixels of equal width."""
  columns = np.arange(width) * count // width
  return np.broadcast_to(columns, (height, width)).astype(np.int32)


@pytest.mark.parametrize("shape", [(640, 640), (320, 160), (100, 1280)])
def test_sampling_a_ramp_gives_the_centres(shape):
  """A map that holds the position of its cells, sampled for stripes."""
  height, width = shape
  scale = lib.CANVAS / max(shape)
  cells = np.arange(80) * 8 + 4.0  # centres in canvas pixels
  ramp = np.stack(np.meshgrid(cells, cells, indexing="ij"), -1)
  found = lib._sample(
    ramp.astype(np.float32), lib._some_pixels(stripes(*shape, 4)), scale / 8
  )
  centres = (np.arange(4) + 0.5) * width / 4 * scale
  # Six samples of a stripe stand for all; the border cells are held.
  np.testing.assert_allclose(found[:, 1], centres, atol=0.09 * width * scale)
  np.testing.assert_allclose(found[:, 0], height / 2 * scale, atol=8)


def test_standardise():
  values = np.random.default_rng(0).normal(3, 5, (40, 7)).astype(np.float32)
  found = lib.standardise(values)
  np.testing.assert_allclose(found.mean(0), 0, atol=1e-6)
  assert (found**2).sum(1).mean() == pytest.approx(1)
  distances = np.linalg.norm(values[1:] - values[:-1], axis=1)
  ratio = np.linalg.norm(np.diff(found, axis=0), axis=1) / distances
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
  np.testing.assert_array_equal(lib.standardise(np.ones((3, 2))), 0)


def test_regions_of_one_texture_are_alike():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 60, (96, 128, 3)).astype(np.uint8)
  image[:, 64:] += np.uint8([150, 20, 90])
  image[::4, 64:] = 255
  found = lib.deep_features(image, stripes(96, 128, 8))
  assert found.part.shape == (8, 40)
  assert found.object.shape == (8, 112)
  assert found.scene.shape == (8, 320)
  assert found.activity.mean() == pytest.approx(1)
  steps = np.linalg.norm(np.diff(found.part, axis=0), axis=1)
  assert steps.argmax() == 3


def test_without_a_cpu_the_error_names_the_remedy(monkeypatch):
  def none(**_):
    raise RuntimeError("Unknown backend: 'cpu' requested")

  monkeypatch.setattr(jax, "local_devices", none)
  with pytest.raises(InputError, match="JAX_PLATFORMS"):
    lib._network.__wrapped__()
