"""MoIPool's max-pooling for TPUs (Pallas).

The grid runs over blocks of channels and, inside, over proposals. The features
of a block stay in VMEM while all proposals pass; a cell is a part of a vector
register there, so that any cell can be looked up. The masks lie in SMEM as
bits, where single values can be read. The gradient runs the same way and
collects the features' gradient of a block in VMEM: proposals follow one another
on a core, so no two are added at the same time.

The arguments are those of `reference.max_pool`, with at least one proposal;
`masks` None means a full mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import grid
from .xla import cell_dtype

LANES = 128
MAX_SUBLANES = 8
BLOCK_BYTES = 40 * 2**20  # at most, of a block of channels in VMEM
VMEM_BYTES = 60 * 2**20
# Grids whose blocks of 128 channels fit, as compiled for a v5e.
MAX_CELLS = 120_000
MAX_CELLS_OF_GRADIENT = 68_000
BITS = 32  # of a word of the masks


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
  pooled, cells = _pool(features, masks, boxes, output_size, True, interpret)
  return pooled, cells.astype(cell_dtype(features.shape[0] * features.shape[1]))


def add_gradient(
  gradient: jax.Array,
  argmax: jax.Array,
  boxes: jax.Array,
  grid_size: tuple[int, int],
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `xla.add_gradient`; walks through the cells of the boxes again."""
  num_proposals, oh, ow, channels = gradient.shape
  output_size = oh, ow
  num_bins = output_size[0] * output_size[1]
  height, width = grid_size
  _check_cells(height, width, MAX_CELLS_OF_GRADIENT)
  # The result has two buffers.
  sublanes = _sublanes(height * width, channels, BLOCK_BYTES // 2)
  block = sublanes * LANES
  num_blocks = pl.cdiv(channels, block)
  shape = num_proposals, num_bins, channels
  bins = pl.BlockSpec((None, num_bins, block), lambda c, p: (p, 0, c))
  total = pl.pallas_call(
    functools.partial(
      _add_kernel, width=width, output_size=output_size, sublanes=sublanes
    ),
    grid=(num_blocks, num_proposals),
    in_specs=[_scalars(2 * sum(output_size)), bins, bins],
    out_specs=pl.BlockSpec(
      (None, height * width, sublanes, LANES), lambda c, p: (c, 0, 0, 0)
    ),
    out_shape=jax.ShapeDtypeStruct(
      (num_blocks, height * width, sublanes, LANES), jnp.float32
    ),
    scratch_shapes=[
      pltpu.VMEM((num_bins, sublanes, LANES), dtype)
      for dtype in (jnp.float32, jnp.int32)
    ],
    compiler_params=_compiler_params(),
    interpret=interpret,
    name="moi_pool_gradient",
  )(
    _edges(boxes, output_size, grid_size),
    gradient.reshape(shape).astype(jnp.float32),
    argmax.reshape(shape).astype(jnp.int32),
  )
  total = total.swapaxes(0, 1).reshape(height, width, num_blocks * block)
  return total[..., :channels]


def _pool(features, masks, boxes, output_size, with_cells, interpret):
  height, width, channels = features.shape
  num_cells, num_bins = height * width, output_size[0] * output_size[1]
  types = (jnp.float32, jnp.int32)[: 1 + with_cells]
  _check_cells(height, width, MAX_CELLS)
  sublanes = _sublanes(num_cells, channels, BLOCK_BYTES)
  block = sublanes * LANES
  num_blocks = pl.cdiv(channels, block)
  # Maxima of float32 are exact for every narrower type.
  blocks = features.astype(jnp.float32).reshape(num_cells, channels)
  blocks = jnp.pad(blocks, ((0, 0), (0, num_blocks * block - channels)))
  blocks = blocks.reshape(num_cells, num_blocks, sublanes, LANES).swapaxes(0, 1)
  words = _pack(masks, len(boxes), num_cells)
  bins = pl.BlockSpec((None, num_bins, block), lambda c, p: (p, 0, c))
  found = pl.pallas_call(
    functools.partial(
      _pool_kernel, width=width, output_size=output_size, sublanes=sublanes
    ),
    grid=(num_blocks, len(boxes)),
    in_specs=[
      _scalars(2 * sum(output_size)),
      _scalars(words.shape[-1]),
      pl.BlockSpec(
        (None, num_cells, sublanes, LANES),
        lambda c, p: (c, 0, 0, 0),
        pipeline_mode=pl.Buffered(1),  # it changes once in P steps
      ),
    ],
    out_specs=(bins,) * len(types),
    out_shape=tuple(
      jax.ShapeDtypeStruct((len(boxes), num_bins, channels), t) for t in types
    ),
    scratch_shapes=[pltpu.VMEM((num_bins, sublanes, LANES), t) for t in types],
    compiler_params=_compiler_params(),
    interpret=interpret,
    name="moi_pool",
  )(_edges(boxes, output_size, (height, width)), words, blocks)
  found = tuple(x.reshape(-1, *output_size, channels) for x in found)
  return found[0].astype(features.dtype), *found[1:]


def _check_cells(height, width, most):
  if height * width > most:
    raise ValueError(
      f"features: {height} x {width} cells are more than {most:,}, the most of"
      f" 'pallas_tpu' (with a gradient {MAX_CELLS_OF_GRADIENT:,}); use 'xla'"
    )


def _sublanes(num_cells, channels, num_bytes):
  """Rows of 128 channels that a block has: as many as VMEM and C allow."""
  fitting = num_bytes // (num_cells * LANES * 4)
  limit = min(MAX_SUBLANES, max(fitting, 1), pl.cdiv(channels, LANES))
  return 1 << (limit.bit_length() - 1)


def _scalars(count):
  return pl.BlockSpec(
    (None, 1, count), lambda c, p: (p, 0, 0), memory_space=pltpu.SMEM
  )


def _compiler_params():
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
  )


def _edges(boxes, output_size, grid_size):
  """[P, 1, 2 oh + 2 ow]: top, bottom, left, right of the bins."""
  edges = grid.bin_edges(boxes, output_size=output_size, grid_size=grid_size)
  return jnp.concatenate(edges, axis=1)[:, None]


def _pack(masks, num_proposals, num_cells):
  """[P, 1, cells / 32] int32: the masks as bits."""
  shape = num_proposals, 1, pl.cdiv(num_cells, BITS)
  if masks is None:
    return jnp.full(shape, -1, jnp.int32)
  masks = masks.reshape(num_proposals, num_cells)
  masks = jnp.pad(masks, ((0, 0), (0, -num_cells % BITS)))
  masks = masks.reshape(*shape, BITS).astype(jnp.int32)
  places = jnp.arange(BITS)[None, None, None]
  return jnp.sum(masks << places, axis=-1, dtype=jnp.int32)


def _for_each_bin(edges_ref, output_size, body):
  """Calls body(bin, top, bottom, left, right)."""
  oh, ow = output_size

  def one_bin(i, _):
    u, v = lax.div(i, ow), lax.rem(i, ow)
    body(
      i,
      edges_ref[0, u],
      edges_ref[0, oh + u],
      edges_ref[0, 2 * oh + v],
      edges_ref[0, 2 * oh + ow + v],
    )
    return 0

  lax.fori_loop(0, oh * ow, one_bin, 0)


def _pool_kernel(
  edges_ref, masks_ref, features_ref, *refs, width, output_size, sublanes
):
  results, drafts = refs[: len(refs) // 2], refs[len(refs) // 2 :]
  shape = sublanes, LANES

  def one_bin(i, top, bottom, left, right):
    def one_row(y, carry):
      def one_cell(x, carry):
        pooled, place = carry
        cell = y * width + x
        word = masks_ref[0, lax.div(cell, BITS)]
        bit = (word >> lax.rem(cell, BITS)) & 1
        found = jnp.where(bit == 1, features_ref[cell], -jnp.inf)
        # The first in row order wins; NaN wins over all numbers.
        wins = (found > pooled) | ((found != found) & (pooled == pooled))
        return jnp.where(wins, found, pooled), jnp.where(wins, cell, place)

      return lax.fori_loop(left, right, one_cell, carry)

    start = (
      jnp.full(shape, -jnp.inf, jnp.float32),
      jnp.full(shape, features_ref.shape[0], jnp.int32),
    )
    found = lax.fori_loop(top, bottom, one_row, start)
    for draft, value in zip(drafts, found, strict=False):
      draft[i] = value

  # Bins are an axis of their own in the drafts, so that any can be written.
  _for_each_bin(edges_ref, output_size, one_bin)
  for result, draft in zip(results, drafts, strict=True):
    for j in range(sublanes):
      result[:, j * LANES : (j + 1) * LANES] = draft[:, j, :]


def _add_kernel(
  edges_ref,
  gradient_ref,
  argmax_ref,
  total_ref,
  *drafts,
  width,
  output_size,
  sublanes,
):
  @pl.when(pl.program_id(1) == 0)
  def _():
    total_ref[...] = jnp.zeros_like(total_ref)

  for draft, ref in zip(drafts, (gradient_ref, argmax_ref), strict=True):
    for j in range(sublanes):
      draft[:, j, :] = ref[:, j * LANES : (j + 1) * LANES]

  def one_bin(i, top, bottom, left, right):
    gradient, argmax = (draft[i] for draft in drafts)

    def one_row(y, _):
      def one_cell(x, _):
        cell = y * width + x
        total_ref[cell] += jnp.where(argmax == cell, gradient, 0.0)
        return 0

      return lax.fori_loop(left, right, one_cell, 0)

    lax.fori_loop(top, bottom, one_row, 0)

  _for_each_bin(edges_ref, output_size, one_bin)
