"""What the types of arrays say."""

from __future__ import annotations

import jax.numpy as jnp


def wide(dtype: jnp.dtype) -> jnp.dtype:
  """Floats of at least 32 bits, in which features are summed."""
  # Not promote_types, which the strict promotion of dtypes refuses.
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
