"""MoIPool's max-pooling for NVIDIA GPUs from Hopper on (Pallas, Mosaic GPU).

One warpgroup makes the maxima of one bin of one proposal for a block of
channels, a channel for each thread, in registers: it walks through the cells of
the bin row by row. No two of them write to the same place.

The arguments are those of `reference.max_pool`, with at least one proposal;
`masks` None means a full mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import grid
from .xla import cell_dtype

CHANNELS = 128  # of a program: the threads of a warpgroup


def pooled_max(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> jax.Array:
  """As `xla.pooled_max`."""
  return _pool(features, masks, boxes, output_size, with_cells=False)[0]


def pooled_argmax(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
  """As `xla.pooled_argmax`."""
  pooled, cells = _pool(features, masks, boxes, output_size, with_cells=True)
  return pooled, cells.astype(cell_dtype(features.shape[0] * features.shape[1]))


def _pool(features, masks, boxes, output_size, *, with_cells):
  height, width, channels = features.shape
  num_cells = height * width
  oh, ow = output_size
  types = (features.dtype, jnp.int32)[: 1 + with_cells]
  if num_cells > 2**24:
    raise ValueError(
      f"features: {height} x {width} cells are more than 2**24, the most that"
      " 'pallas_mosaic_gpu' counts; use another implementation"
    )
  padded = pl.cdiv(channels, CHANNELS) * CHANNELS
  flat = features.reshape(num_cells, channels)
  flat = jnp.pad(flat, ((0, 0), (0, padded - channels)))
  edges = jnp.concatenate(
    grid.bin_edges(boxes, output_size=output_size, grid_size=(height, width)),
    axis=1,
  )
  arrays = edges, flat
  if masks is not None:
    arrays += (masks.reshape(len(boxes), num_cells).astype(jnp.int8),)

  def kernel(edges_ref, features_ref, *refs):
    masks_ref = refs[0] if masks is not None else None
    proposal = lax.axis_index("proposal")
    index = lax.axis_index("bin")
    u, v = lax.div(index, ow), lax.rem(index, ow)
    top, bottom = edges_ref[proposal, u], edges_ref[proposal, oh + u]
    left = edges_ref[proposal, 2 * oh + v]
    right = edges_ref[proposal, 2 * oh + ow + v]
    block = pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)

    def one_row(y, carry):
      def one_cell(x, carry):
        pooled, place = carry
        cell = y * width + x
        found = features_ref[cell, block].astype(jnp.float32)
        # The first in row order wins; NaN wins over all numbers.
        wins = (found > pooled) | ((found != found) & (pooled == pooled))
        if masks_ref is not None:
          wins &= masks_ref[proposal, cell] != 0
        pooled = jnp.where(wins, found, pooled)
        return pooled, jnp.where(wins, cell.astype(jnp.float32), place)

      return lax.fori_loop(left, right, one_cell, carry)

    # Places are counted in float32: integers differ in their signs here.
    layout = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1)
    start = tuple(
      plgpu.layout_cast(jnp.full((CHANNELS,), x, jnp.float32), layout)
      for x in (-jnp.inf, num_cells)
    )
    found = lax.fori_loop(top, bottom, one_row, start)
    for ref, value in zip(refs[-len(types) :], found, strict=False):
      ref[proposal, index, block] = value.astype(ref.dtype)

  found = plgpu.kernel(
    kernel,
    out_type=tuple(
      jax.ShapeDtypeStruct((len(boxes), oh * ow, padded), t) for t in types
    ),
    grid=(len(boxes), oh * ow, padded // CHANNELS),
    grid_names=("proposal", "bin", "block"),
  )(*arrays)
  return tuple(x[..., :channels].reshape(-1, oh, ow, channels) for x in found)
