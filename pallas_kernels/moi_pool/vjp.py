"""MoIPool's max-pooling with its gradient.

The argmax is computed only where a gradient is asked for.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.moi_pool import xla


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def max_pool(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> jax.Array:
  """As `reference.max_pool`; `masks` None means a full mask."""
  return _zero_empty(xla.pooled_max(features, masks, boxes, output_size))


def _zero_empty(pooled):
  # So a feature of -inf counts as unavailable.
  return jnp.where(pooled == -jnp.inf, 0, pooled)


def _forward(features, masks, boxes, output_size):
  pooled = xla.pooled_max(features, masks, boxes, output_size)
  cells = xla.argmax_cells(features, masks, boxes, pooled)
  # No bytes, but the shape of the grid.
  return _zero_empty(pooled), (cells, features[:, :, :0])


def _backward(output_size, residuals, gradient):
  """Adds each gradient to the cell and channel that it came from."""
  del output_size
  cells, (height, width, _) = residuals[0], residuals[1].shape
  channels = gradient.shape[-1]
  index = cells.astype(jnp.int32) * channels + jnp.arange(channels)
  total = jnp.zeros(height * width * channels, jnp.float32)
  # "drop": empty bins carry an index past the end.
  total = total.at[index.reshape(-1)].add(
    gradient.reshape(-1).astype(jnp.float32), mode="drop"
  )
  return (
    total.reshape(height, width, channels).astype(gradient.dtype),
    None,
    None,
  )


max_pool.defvjp(_forward, _backward)
