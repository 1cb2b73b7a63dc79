"""Layers whose products are narrow and whose sums are wide."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def wide_bias(
  x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """`promote_dtype` of Flax's layers: multiplies in `dtype`, adds a bias as is.

  The gradient of a bias is a sum over all proposals or cells, for which
  bfloat16 has too few digits: a float32 bias makes it one in float32. The
  result of the layer is float32 then; XLA fuses what follows.
  """
  return x.astype(dtype), kernel.astype(dtype), bias
