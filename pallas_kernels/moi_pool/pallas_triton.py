"""MoIPool's max-pooling for NVIDIA GPUs from Ampere on (Pallas, Triton).

One program makes the maxima of one bin of one proposal for a block of channels.
It walks through the cells of the bin row by row and loads several of them at
once, for the loads to overlap. No two programs write to the same place.

The arguments are those of `reference.max_pool`, with at least one proposal;
`masks` None means a full mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from .. import grid
from .xla import cell_dtype

CHANNELS = 128  # of a program; 4 for each thread of a warp
CELLS_AT_ONCE = 4


def pooled_max(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `xla.pooled_max`."""
  return _pool(features, masks, boxes, output_size, False, interpret)[0]


def pooled_argmax(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `xla.pooled_argmax`."""
  return _pool(features, masks, boxes, output_size, True, interpret)


def _pool(features, masks, boxes, output_size, with_cells, interpret):
  height, width, channels = features.shape
  num_bins = output_size[0] * output_size[1]
  types = (features.dtype, cell_dtype(height * width))[: 1 + with_cells]
  shape = len(boxes), num_bins, channels
  edges = grid.bin_edges(
    boxes, output_size=output_size, grid_size=(height, width)
  )
  is_full = masks is None
  if is_full:
    masks = jnp.ones((1, 1), jnp.uint8)  # not looked at
  else:
    masks = masks.reshape(len(boxes), height * width).astype(jnp.uint8)
  block = min(CHANNELS, pl.next_power_of_2(channels))
  pooled = pl.pallas_call(
    functools.partial(
      _kernel,
      width=width,
      columns=output_size[1],
      channels=channels,
      block=block,
      empty=height * width,
      is_full=is_full,
    ),
    grid=(len(boxes), num_bins, pl.cdiv(channels, block)),
    out_shape=tuple(jax.ShapeDtypeStruct(shape, t) for t in types),
    # Named, or some versions of jax would take Mosaic GPU.
    compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
    interpret=interpret,
    name="moi_pool",
  )(*edges, masks, features.reshape(height * width, channels))
  return tuple(x.reshape(-1, *output_size, channels) for x in pooled)


def _kernel(
  top_ref,
  bottom_ref,
  left_ref,
  right_ref,
  masks_ref,
  features_ref,
  *results,
  width,
  columns,
  channels,
  block,
  empty,
  is_full,
):
  proposal, bin_, first = (pl.program_id(axis) for axis in range(3))
  u, v = bin_ // columns, bin_ % columns
  top, bottom = top_ref[proposal, u], bottom_ref[proposal, u]
  left, right = left_ref[proposal, v], right_ref[proposal, v]
  per_row = jnp.maximum(right - left, 1)
  steps = jnp.maximum(bottom - top, 0) * jnp.maximum(right - left, 0)
  channel = first * block + jnp.arange(block)
  exists = channel < channels

  def body(i, carry):
    pooled, place = carry
    for j in range(CELLS_AT_ONCE):
      step = i * CELLS_AT_ONCE + j
      cell = (top + step // per_row) * width + left + step % per_row
      available = step < steps
      cell = jnp.where(available, cell, 0)
      if not is_full:
        available &= masks_ref[proposal, cell] != 0
      found = plt.load(
        features_ref.at[cell, channel],
        mask=exists & available,
        other=-jnp.inf,
      )
      # The first in row order wins; NaN wins over all numbers.
      wins = (found > pooled) | ((found != found) & (pooled == pooled))
      pooled = jnp.where(wins, found, pooled)
      place = jnp.where(wins, cell, place)
    return pooled, place

  pooled, place = lax.fori_loop(
    0,
    (steps + CELLS_AT_ONCE - 1) // CELLS_AT_ONCE,
    body,
    (
      jnp.full((block,), -jnp.inf, features_ref.dtype),
      jnp.full((block,), empty, jnp.int32),
    ),
  )
  for ref, value in zip(results, (pooled, place), strict=False):
    plt.store(
      ref.at[proposal, bin_, channel], value.astype(ref.dtype), mask=exists
    )
