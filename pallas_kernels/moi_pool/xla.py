"""MoIPool's max-pooling in plain XLA operations.

All bins of a chunk of proposals walk through their cells in step, row by row:
step i of a proposal whose widest bin has w columns looks at cell (i // w,
i % w) of each of its bins. There are as many steps as the largest bin of the
chunk has cells, and several are taken at once, which saves traffic of the
running maxima. Nothing of size [P, Hf, Wf, C] exists, and beside the results
only a chunk's share of them.

On a CPU a chunk is one proposal: its maxima stay in the core's cache. Devices
that need more work at a time get larger chunks.

The arguments are those of `reference.max_pool`, with at least one proposal;
`masks` None means a full mask.
The functions are jitted by themselves so that a program which calls them often,
or in branches for several platforms, traces them once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import arrays, grid

STEPS_AT_ONCE = 8
CHUNK = 128  # proposals at a time where the device is no CPU


class _Bins(NamedTuple):
  """The bins of proposals, and what a walk through their cells takes."""

  top: jax.Array  # [P, oh], as the next three from `grid.bin_edges`
  bottom: jax.Array
  left: jax.Array  # [P, ow]
  right: jax.Array
  columns: jax.Array  # [P, 1], of the widest bin, or 1
  steps: jax.Array  # [P]
  masks: jax.Array | None  # [P, Hf * Wf]


class _Walk(NamedTuple):
  """A chunk of proposals, whose bins walk through their cells in step."""

  flat: jax.Array  # [Hf * Wf + 1, C] features, of the last cell -inf
  cells: Callable[[jax.Array], jax.Array]  # of a step, [bins]; the last: none
  steps: jax.Array
  shape: tuple[int, int]  # (bins, C)


@functools.partial(jax.jit, static_argnames=("output_size",))
def pooled_max(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> jax.Array:
  """[P, oh, ow, C] maximum over the available cells; -inf in empty bins."""
  shape = (len(boxes), *output_size, features.shape[-1])

  def pool(walk):
    return (_forwards(walk),)

  results = (jax.ShapeDtypeStruct(shape, features.dtype),)
  return _by_chunks(pool, results, features, masks, boxes)[0]


@functools.partial(jax.jit, static_argnames=("output_size",))
def pooled_argmax(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
  """The maxima of `pooled_max` and their cells.

  A second walk, from the last cell to the first, is faster on a CPU than one
  that carries the maximum and its cell.

  Returns:
    [P, oh, ow, C] maxima, and [P, oh, ow, C] the first cell y * Wf + x of each
    as unsigned integers of the smallest type that holds Hf * Wf, which marks
    the bins without a cell above -inf.
  """
  height, width, channels = features.shape
  shape = (len(boxes), *output_size, channels)
  dtype = cell_dtype(height * width)

  def pool(walk):
    pooled = _forwards(walk)
    return pooled, _backwards(walk, pooled).astype(dtype)

  results = tuple(
    jax.ShapeDtypeStruct(shape, d) for d in (features.dtype, dtype)
  )
  return _by_chunks(pool, results, features, masks, boxes)


def cell_dtype(num_cells: int) -> jnp.dtype:
  """The smallest unsigned integers that hold 0 .. num_cells."""
  if num_cells < 2**8:
    return jnp.uint8
  return jnp.uint16 if num_cells < 2**16 else jnp.uint32


@functools.partial(jax.jit, static_argnames=("grid_size",))
def add_gradient(
  gradient: jax.Array, argmax: jax.Array, grid_size: tuple[int, int]
) -> jax.Array:
  """Adds each gradient to the cell and channel that it came from.

  Args:
    gradient: [P, oh, ow, C] float.
    argmax: [P, oh, ow, C] from `pooled_argmax`.
    grid_size: (Hf, Wf).

  Returns:
    [Hf, Wf, C] float32, or float64 if the gradient is.
  """
  height, width = grid_size
  channels = gradient.shape[-1]
  dtype = arrays.wide(gradient.dtype)
  # What empty bins carry goes to a row past the grid.
  size = (height * width + 1) * channels
  total = jnp.zeros_like(gradient, dtype, shape=size)

  def add(gradient, argmax, total):
    index = argmax.astype(jnp.int32) * channels
    index += jnp.arange(channels, dtype=jnp.int32).reshape(
      (1,) * (index.ndim - 1) + (channels,)
    )
    return total.at[index.reshape(-1)].add(
      gradient.reshape(-1).astype(dtype), mode="promise_in_bounds"
    )

  def add_one_by_one(gradient, argmax, total):
    # The indices of a proposal stay in the core's cache.
    return lax.fori_loop(
      0, len(gradient), lambda p, t: add(gradient[p], argmax[p], t), total
    )

  total = lax.platform_dependent(
    gradient, argmax, total, cpu=add_one_by_one, default=add
  )
  return total[: height * width * channels].reshape(height, width, channels)


@functools.partial(jax.jit, static_argnames=("grid_size",))
def add_gradient_in_integers(
  gradient: jax.Array, argmax: jax.Array, grid_size: tuple[int, int]
) -> jax.Array:
  """`add_gradient` whose result does not depend on the order of the sums.

  GPUs add in any order, and sums of floats differ by it; sums of integers do
  not. Each gradient is a sum of three integers of so few bits that no sum of
  all of them overflows, on the scale of the largest: what is smaller than about
  2**-36 of it (for 4,000 proposals and 49 bins) is lost. A gradient that is not
  finite makes all results NaN.

  Args, Returns: as `add_gradient`, of at most 32 bits.
  """
  height, width = grid_size
  num_cells, channels = height * width, gradient.shape[-1]
  gradient = gradient.reshape(-1, channels).astype(jnp.float32)
  index = argmax.reshape(-1, channels).astype(jnp.int32)
  _, exponent = jnp.frexp(jnp.max(jnp.abs(gradient), initial=0))
  bits = 30 - len(gradient).bit_length()
  rest, total, unit = jnp.ldexp(gradient, -exponent), 0.0, 1.0
  columns = jnp.arange(channels, dtype=jnp.int32)[None]
  for _ in range(3):
    unit *= 2.0**-bits
    part = jnp.round(rest / unit)
    rest -= part * unit
    sums = jnp.zeros((num_cells + 1, channels), jnp.int32)
    sums = sums.at[index, columns].add(
      part.astype(jnp.int32), mode="promise_in_bounds"
    )
    total += sums[:num_cells].astype(jnp.float32) * unit
  total = jnp.where(jnp.all(jnp.isfinite(gradient)), total, jnp.nan)
  return jnp.ldexp(total, exponent).reshape(height, width, channels)


def _by_chunks(pool, results, features, masks, boxes):
  """Makes `results` [P, oh, ow, C] of what `pool` returns for each walk."""
  height, width, channels = features.shape
  num_proposals, oh, ow, _ = results[0].shape
  top, bottom, left, right = grid.bin_edges(
    boxes, output_size=(oh, ow), grid_size=(height, width)
  )
  columns = jnp.maximum(jnp.max(right - left, axis=1), 1)
  steps = jnp.max(bottom - top, axis=1) * columns
  if masks is not None:
    masks = masks.reshape(num_proposals, height * width)
  bins = _Bins(top, bottom, left, right, columns[:, None], steps, masks)
  nothing = jnp.full((1, channels), -jnp.inf, features.dtype)
  flat = features.reshape(height * width, channels)
  flat = jnp.concatenate([flat, nothing])

  def one_chunk(size, bins, flat, i, bits_so_far):
    # The last chunk may begin in the one before, and do a part of it again.
    start = jnp.minimum(i * size, num_proposals - size)
    bins = jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, size), bins
    )

    def cells(step):
      row = bins.top + step // bins.columns
      column = bins.left + step % bins.columns
      in_rows, in_columns = row < bins.bottom, column < bins.right
      available = in_rows[:, :, None] & in_columns[:, None, :]
      index = row[:, :, None] * width + column[:, None, :]
      index = jnp.where(available, index, 0)
      if bins.masks is not None:
        available &= jnp.take_along_axis(
          bins.masks, index.reshape(size, -1), axis=1
        ).reshape(index.shape)
      return jnp.where(available, index, height * width).reshape(-1)

    shape = size * oh * ow, channels
    found = pool(_Walk(flat, cells, jnp.max(bins.steps), shape))
    return tuple(
      lax.dynamic_update_slice_in_dim(
        whole,
        _bits(part.reshape(size, oh, ow, channels).astype(r.dtype)),
        start,
        0,
      )
      for whole, part, r in zip(bits_so_far, found, results, strict=True)
    )

  def all_chunks(size, dtype, bins, flat):
    return lax.fori_loop(
      0,
      -(-num_proposals // size),
      functools.partial(one_chunk, size, bins, flat.astype(dtype)),
      tuple(_bits(jnp.zeros_like(flat, r.dtype, r.shape)) for r in results),
    )

  # CPUs have no bfloat16: XLA would convert all features for each chunk.
  wide = arrays.wide(features.dtype)
  found = lax.platform_dependent(
    bins,
    flat,
    cpu=functools.partial(all_chunks, 1, wide),
    default=functools.partial(
      all_chunks, min(CHUNK, num_proposals), features.dtype
    ),
  )
  return tuple(
    whole
    if whole.dtype == r.dtype
    else lax.bitcast_convert_type(whole, r.dtype)
    for whole, r in zip(found, results, strict=True)
  )


def _bits(values):
  """16-bit floats as integers.

  When a CPU writes a chunk into an array of such floats, XLA would widen the
  whole array each time.
  """
  if values.dtype in (jnp.bfloat16, jnp.float16):
    return lax.bitcast_convert_type(values, jnp.uint16)
  return values


def _forwards(walk):
  """Maxima of a chunk, walking from the first cell to the last."""

  def body(i, pooled):
    for cells in _look_up(walk, i):
      pooled = jnp.maximum(pooled, walk.flat[cells])
    return pooled

  start = jnp.full_like(walk.flat, -jnp.inf, shape=walk.shape)
  return lax.fori_loop(0, _rounds(walk), body, start)


def _backwards(walk, pooled):
  """First cells that hold the maxima, walking from the last to the first."""
  rounds = _rounds(walk)

  def body(i, first):
    for cells in _look_up(walk, rounds - 1 - i)[::-1]:
      found = walk.flat[cells]
      equal = (found == pooled) | (jnp.isnan(found) & jnp.isnan(pooled))
      first = jnp.where(equal, cells[..., None], first)
    return first

  first = lax.fori_loop(0, rounds, body, jnp.zeros_like(pooled, jnp.int32))
  return jnp.where(pooled == -jnp.inf, len(walk.flat) - 1, first)


def _rounds(walk):
  return (walk.steps + STEPS_AT_ONCE - 1) // STEPS_AT_ONCE


def _look_up(walk, i):
  # The barrier keeps XLA from computing the cells once per channel.
  first = i * STEPS_AT_ONCE
  return lax.optimization_barrier(
    tuple(walk.cells(first + j) for j in range(STEPS_AT_ONCE))
  )
