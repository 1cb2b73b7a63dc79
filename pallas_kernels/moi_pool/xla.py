"""MoIPool's max-pooling in plain XLA operations.

All bins of all proposals walk through their cells in step, row by row: step i
of a proposal whose widest bin has w columns looks at cell (i // w, i % w) of
each of its bins. One step gathers a [P, oh, ow, C] slab, skips the bins whose
cell is not available, and there are as many steps as the largest bin has
cells. Nothing of size [P, Hf, Wf, C] exists. On CPU this beat lists of the
available cells and a loop over proposals; sorted chunks of proposals had no
consistent gain.

The arguments are those of `reference.max_pool`; `masks` None means a full mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import grid


def pooled_max(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> jax.Array:
  """[P, oh, ow, C] maximum over the available cells; -inf in empty bins."""
  cells, steps = _walk(features, masks, boxes, output_size)
  flat = features.reshape(-1, features.shape[-1])

  def body(step, pooled):
    index, available = cells(step)
    higher = jnp.maximum(pooled, flat[index])
    return jnp.where(available[..., None], higher, pooled)

  shape = (len(boxes), *output_size, features.shape[-1])
  pooled = jnp.full(shape, -jnp.inf, features.dtype)
  return lax.fori_loop(0, steps, body, pooled)


def argmax_cells(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  pooled: jax.Array,
) -> jax.Array:
  """[P, oh, ow, C] the first cell y * Wf + x that holds the maximum.

  A second walk, from the last cell to the first, is faster on CPU than one that
  carries the maximum and its place.

  Args:
    features, masks, boxes: as given to `pooled_max`.
    pooled: what `pooled_max` returned.

  Returns:
    unsigned integers of the smallest type that holds Hf * Wf, which marks the
    empty bins.
  """
  height, width, channels = features.shape
  empty = height * width
  dtype = jnp.uint8 if empty < 2**8 else jnp.uint16
  dtype = dtype if empty < 2**16 else jnp.uint32
  cells, steps = _walk(features, masks, boxes, pooled.shape[1:3])
  flat = features.reshape(-1, channels)

  def body(step, first):
    index, available = cells(steps - 1 - step)
    equal = available[..., None] & (flat[index] == pooled)
    return jnp.where(equal, index[..., None].astype(dtype), first)

  return lax.fori_loop(0, steps, body, jnp.full(pooled.shape, empty, dtype))


def _walk(features, masks, boxes, output_size):
  """A function from step to ([P, oh, ow] cell, available), and the steps."""
  height, width, _ = features.shape
  top, bottom, left, right = grid.bin_edges(
    boxes, output_size=output_size, grid_size=(height, width)
  )
  columns = jnp.maximum(jnp.max(right - left, axis=1), 1)
  steps = jnp.max(jnp.max(bottom - top, axis=1) * columns, initial=0)
  columns = columns[:, None]
  if masks is not None:
    masks = masks.reshape(-1)
    offsets = height * width * jnp.arange(len(boxes))[:, None, None]

  def cells(step):
    row = top + step // columns
    column = left + step % columns
    available = (row < bottom)[:, :, None] & (column < right)[:, None, :]
    index = row[:, :, None] * width + column[:, None, :]
    index = jnp.where(available, index, 0)
    if masks is not None:
      available &= masks[offsets + index]
    # Keeps XLA from computing these once per channel.
    return lax.optimization_barrier((index, available))

  return cells, steps
