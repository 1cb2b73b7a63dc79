"""MoIPool's max-pooling as it is defined: slow, clear, no custom gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .. import grid


def max_pool(
  features: jax.Array,
  masks: jax.Array,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> jax.Array:
  """The maximum of the available cells of each bin, 0 where there is none.

  Eq. 5, read as max {Phi_ij : Omega_ij = 1} over the cells of bin (u, v).

  Args:
    features: [Hf, Wf, C] float.
    masks: [P, Hf, Wf] bool.
    boxes: [P, 4] int32 inclusive grid boxes.
    output_size: (oh, ow).

  Returns:
    [P, oh, ow, C].
  """
  height, width, channels = features.shape
  flat = features.reshape(1, 1, -1, channels)
  rows = jnp.arange(height)[None]
  columns = jnp.arange(width)[None]

  def pool(proposal):
    mask, box = proposal
    top, bottom, left, right = grid.bin_edges(
      box[None], output_size=output_size, grid_size=(height, width)
    )
    in_rows = (rows >= top[0, :, None]) & (rows < bottom[0, :, None])
    in_columns = (columns >= left[0, :, None]) & (columns < right[0, :, None])
    in_bin = in_rows[:, None, :, None] & in_columns[None, :, None, :]
    cells = (in_bin & mask[None, None]).reshape(*output_size, -1, 1)
    # The first of equal maxima in row order, so that it alone gets a gradient.
    first = jnp.argmax(jnp.where(cells, flat, -jnp.inf), axis=2, keepdims=True)
    pooled = jnp.take_along_axis(flat, first, axis=2)[:, :, 0]
    empty = ~jnp.any(cells, axis=2) | (pooled == -jnp.inf)
    return jnp.where(empty, 0, pooled)

  return lax.map(pool, (masks, boxes))
