"""Stored statistics against the definition of batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.backbones.frozen_norm import FrozenNorm


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)]
)
def test_equals_batch_norm_with_stored_statistics(dtype, tolerance):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  scale, bias, mean = rng.normal(size=(3, 5)).astype(np.float32)
  var = rng.uniform(0.5, 2, 5).astype(np.float32)
  variables = {
    "params": {"scale": scale, "bias": bias},
    "batch_stats": {"mean": mean, "var": var},
  }
  norm = FrozenNorm(0.1, dtype)
  found = norm.apply(variables, jnp.asarray(x, dtype))
  expected = (x - mean) / np.sqrt(var + 0.1) * scale + bias
  assert found.dtype == dtype
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected, rtol=tolerance, atol=4 * tolerance
  )


def test_starts_as_the_identity_but_for_epsilon():
  norm = FrozenNorm(1e-3, jnp.float32)
  x = jnp.ones((1, 2, 2, 3))
  found, variables = norm.init_with_output(jax.random.key(0), x)
  np.testing.assert_allclose(found, 1 / np.sqrt(1.001), rtol=1e-6)
  assert set(variables) == {"params", "batch_stats"}
