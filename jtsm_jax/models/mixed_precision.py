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


def flat_product(
  x: jax.Array,
  kernel: jax.Array,
  dimension_numbers: object,
  *,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
  """`dot_general` of Flax's Dense, [..., D] by [D, E], with one leading axis.

  The gradient of the kernel sums over the leading axes. Where they are several,
  XLA for CPUs sums bfloat16 in bfloat16 (jax 0.12).
  """
  del dimension_numbers  # always the last axis and the first one
  result = jnp.matmul(
    x.reshape(-1, x.shape[-1]),
    kernel,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return result.reshape(*x.shape[:-1], kernel.shape[-1])
