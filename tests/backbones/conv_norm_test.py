"""A convolution and its norm against a numpy loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.backbones import conv_norm


@pytest.mark.parametrize(
  ("kernel", "stride", "dilation"),
  [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (3, 2, 2), (7, 2, 1)],
)
def test_equals_a_loop(kernel, stride, dilation):
  layer = conv_norm.ConvNorm(
    8, kernel, "frozen", jnp.float32, stride=stride, dilation=dilation
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 9, 12, 3)).astype(np.float32)
  weight = rng.normal(size=(kernel, kernel, 3, 8)).astype(np.float32)
  scale, bias, mean = rng.normal(size=(3, 8)).astype(np.float32)
  var = rng.uniform(0.5, 2, 8).astype(np.float32)
  found = layer.apply(
    {
      "params": {
        "conv": {"kernel": weight},
        "norm": {"scale": scale, "bias": bias},
      },
      "batch_stats": {"norm": {"mean": mean, "var": var}},
    },
    x,
    train=True,  # of no effect on stored statistics
  )
  half = kernel // 2
  rows, columns = range(0, 9, stride), range(0, 12, stride)
  assert found.shape == (2, len(rows), len(columns), 8)
  for i, row in enumerate(rows):
    for j, column in enumerate(columns):
      total = np.zeros((2, 8))
      for u in range(kernel):
        for v in range(kernel):
          y, z = row + (u - half) * dilation, column + (v - half) * dilation
          if 0 <= y < 9 and 0 <= z < 12:
            total += x[:, y, z] @ weight[u, v]
      expected = (total - mean) / np.sqrt(var + 1e-5) * scale + bias
      np.testing.assert_allclose(found[:, i, j], expected, rtol=1e-3, atol=1e-4)


def test_kernels_start_as_he_fan_out():
  layer = conv_norm.ConvNorm(128, 3, "frozen", jnp.float32)
  variables = layer.init(
    jax.random.key(0), jnp.zeros((1, 4, 4, 64)), train=False
  )
  kernel = variables["params"]["conv"]["kernel"]
  assert kernel.shape == (3, 3, 64, 128)
  assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)


def test_channels_are_multiples_of_eight():
  found = [
    conv_norm.scaled_channels(64, width=w) for w in (1.0, 0.5, 0.4, 0.05)
  ]
  assert found == [64, 32, 24, 8]


def test_unknown_norm_is_named():
  layer = conv_norm.ConvNorm(8, 1, "layer", jnp.float32)
  with pytest.raises(ValueError, match="norm is 'layer'"):
    layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)
