"""Tests of the colours against the standard library's HSV."""

import colorsys

import jax
import numpy as np
import pytest

from jtsm_jax.models import colours
from tests import tiny


@pytest.mark.parametrize("factors", [(1.5, 0.7), (0.67, 1.5), (1.3, 1.2)])
def test_saturation_and_value_are_multiplied(factors):
  images = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3), np.uint8)
  images[0, 0, :4] = [[0, 0, 0], [9, 9, 9], [255, 255, 255], [255, 0, 0]]
  wanted = []
  for pixel in images.reshape(-1, 3) / 255:
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    s, v = min(s * factors[0], 1), min(v * factors[1], 1)
    wanted.append(colorsys.hsv_to_rgb(h, s, v))
  found = colours.change_hsv(images, np.array([factors], np.float32))
  wanted = np.reshape(wanted, images.shape) * 255
  np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_factors_of_one_change_nothing():
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  found = colours.change_hsv(images, np.ones((2, 2), np.float32))
  np.testing.assert_array_equal(found, images)


def test_each_image_has_its_own_colours_and_black_stays():
  images = np.full((2, 1, 2, 3), 100, np.uint8)
  images[:, :, 1] = 0
  factors = np.array([[1.0, 0.5], [1.5, 2.0]], np.float32)
  found = colours.change_hsv(images, factors)
  np.testing.assert_allclose(found[:, 0, 0, 0], [50, 200])
  assert not found[:, :, 1].any()


def test_the_model_sees_the_colours():
  model, batch = tiny.make_model(), tiny.make_batch()
  variables = tiny.make_variables(model, batch)
  factors = np.array([[1.0, 0.5], [1.0, 0.5]], np.float32)

  @jax.jit
  def features(batch):
    return model.apply(variables, batch, method="features")

  found = features(batch.replace(colour=factors))
  wanted = features(batch.replace(images=batch.images * np.float32(0.5)))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert not np.allclose(found, features(batch), atol=1e-2)
