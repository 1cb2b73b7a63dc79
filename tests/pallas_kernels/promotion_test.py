"""Every function where jax must not promote ranks or dtypes by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.pallas_kernels.moi_pool.pooling_cases import random_case

FEATURES, MASKS, BOXES = random_case(1)
BOXES = np.clip(BOXES, 0, 8)
PIXELS = BOXES.astype(np.float32) * 8
SUPERPIXELS = np.arange(18 * 26).reshape(18, 26) % 7 - 1
MEMBERSHIP = np.eye(12, 6, dtype=bool)


def _moi_pool(**options):
  return lambda f: pk.moi_pool(f, MASKS, BOXES, output_size=(3, 2), **options)


def _masks(availability):
  return lambda _: pk.superpixel_masks(
    SUPERPIXELS, MEMBERSHIP, BOXES, stride=2, availability=availability
  )


FUNCTIONS = {
  "moi_pool": _moi_pool(),
  "official": _moi_pool(compensation="official"),
  "features": _moi_pool(compensation="features"),
  "deterministic": _moi_pool(deterministic=True),
  "reference": _moi_pool(implementation="reference"),
  "pallas_tpu": _moi_pool(implementation="pallas_tpu", interpret=True),
  "pallas_triton": _moi_pool(implementation="pallas_triton", interpret=True),
  "roi_pool": lambda f: pk.roi_pool(f, BOXES),
  "roi_align": lambda f: pk.roi_align(f, PIXELS, stride=8),
  "adaptive": lambda f: pk.roi_align(f, PIXELS, stride=8, sampling_ratio=None),
  "tps_pool": lambda f: pk.tps_pool(f, MASKS, BOXES),
  "masked_average": lambda f: pk.masked_average(f, MASKS),
  "grid_boxes": lambda _: pk.grid_boxes(PIXELS, stride=8),
  "any": _masks("any"),
  "coverage": _masks("coverage"),
  "superpixel_cells": lambda _: pk.superpixel_cells(
    SUPERPIXELS, num_superpixels=6, stride=2
  ),
  "cells_in_boxes": lambda _: pk.cells_in_boxes(BOXES, grid_size=(9, 13)),
  "available_bins": lambda _: pk.available_bins(MASKS, BOXES),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_promotes_nothing_by_itself(name, dtype):
  function = FUNCTIONS[name]

  def value_and_gradient(features):
    value, pullback = jax.vjp(function, features)
    if not jnp.issubdtype(value.dtype, jnp.floating):
      return value
    return value, pullback(jnp.ones_like(value))

  features = jax.ShapeDtypeStruct(FEATURES.shape, dtype)
  with (
    jax.numpy_rank_promotion("raise"),
    jax.numpy_dtype_promotion("strict"),
  ):
    # Traced only: promotion is a matter of shapes and dtypes.
    jax.eval_shape(value_and_gradient, features)
