"""The examples of the documentation run as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_kernels.moi_pool.pooling_cases import loop_pool

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_moipool_in_your_own_model():
  pytest.importorskip("equinox")
  page = (DOCS / "moipool.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  assert len(blocks) == 3
  names = {}
  for block in blocks:
    exec(block, names)  # one after the other, as a reader would

  features, grid = np.asarray(names["features"]), np.asarray(names["grid"])
  # A pixel mask, brought to the grid in its own way: any pixel of 8 x 8.
  pixels = names["member_pixels"].reshape(100, 60, 8, 80, 8).any((2, 4))
  few = slice(0, 5)
  expected, argmax = loop_pool(
    features[..., :2], pixels[few], grid[few], (7, 7)
  )
  bins = (argmax[..., 0] >= 0).sum((1, 2)).reshape(-1, 1, 1, 1)
  np.testing.assert_allclose(
    names["pooled"][few, ..., :2], expected * 49 / bins, rtol=1e-5
  )

  # Both gradients against the same model in plain jax.
  def loss(kernel, bias):
    flat = names["pooled"].reshape(100, -1)
    return jnp.mean((flat @ kernel + bias) ** 2)

  linear = names["model"].linear
  expected = jax.grad(loss)(linear.kernel[...], linear.bias[...])
  found = names["gradient"].linear.kernel[...]
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
  linear = names["scorer"].linear
  expected = jax.grad(loss)(linear.weight.T, linear.bias)
  found = names["scorer_gradient"].linear.weight.T
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
