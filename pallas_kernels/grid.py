"""Boxes, masks and bins on the feature grid."""

from __future__ import annotations

import functools
import math
import numbers
import struct
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROUNDED_CELLS = 1024  # see `bin_edges`
FARTHEST_CELL = 2**24  # of `grid_boxes`: float32 has all integers up to it


def grid_boxes(boxes: jax.Array, *, stride: float) -> jax.Array:
  """Rounds boxes to the cells of the feature grid, as RoIPool does.

  Each coordinate is divided by the stride and rounded half away from zero; the
  rounded end is a cell of the box. These are the numbers that
  `torchvision.ops.roi_pool(spatial_scale=1 / stride)` gets from the same input.
  The result is not clipped to the grid, only to +-2**24: pooling does that per
  bin.

  Args:
    boxes: [P, 4] float (y0, x0, y1, x1), half-open, canvas pixels.
    stride: pixels per cell.

  Returns:
    [P, 4] int32 (y0, x0, y1, x1), inclusive, cells. (PAPER Eq. 5.)

  Raises:
    ValueError: the boxes have the wrong shape or dtype, or the stride is not
      positive.
  """
  boxes = jnp.asarray(boxes)
  check_pixel_boxes(boxes, stride)
  cells = boxes.astype(jnp.float32) / stride
  # Not floor(cells + 0.5): that sum rounds 0.49999997 up to 1.
  whole = jnp.trunc(cells)
  up = jnp.abs(cells - whole) >= 0.5
  cells = whole + jnp.where(up, jnp.sign(cells), 0)
  return jnp.clip(cells, -FARTHEST_CELL, FARTHEST_CELL).astype(jnp.int32)


def superpixel_coverage(
  superpixels: jax.Array, membership: jax.Array, *, stride: int
) -> jax.Array:
  """How much of each cell a proposal covers, without a [P, H, W] mask.

  A cell is a block of stride x stride pixels. How many of its pixels a proposal
  holds is the sum, over its superpixels, of how many the superpixel holds.

  Args:
    superpixels: [H, W] integer ids 0 .. S-1; others, such as -1, are padding.
    membership: [P, S] bool, the superpixels of each proposal. Its shape cannot
      tell whether it is transposed.
    stride: pixels per cell; divides H and W.

  Returns:
    [P, H // stride, W // stride] float32, share of the cell's pixels, 0 to 1.

  Raises:
    ValueError: an argument has the wrong shape or dtype, or H or W is no
      multiple of the stride.
  """
  membership = jnp.asarray(membership)
  _check("membership", membership, jnp.bool_, (None, None), "bool[P, S]")
  num_superpixels = membership.shape[1]
  pixels = _pixels_in_cells(superpixels, num_superpixels, stride)
  counts = jnp.matmul(
    membership.astype(jnp.float32),
    pixels.reshape(num_superpixels, -1),
    # Up to 256 is exact in the accelerators' fast matmul (bfloat16 inputs).
    precision=lax.Precision.HIGHEST if stride > 16 else None,
  )
  return counts.reshape(len(membership), *pixels.shape[1:]) / stride**2


def superpixel_cells(
  superpixels: jax.Array, *, num_superpixels: int, stride: int
) -> jax.Array:
  """How much of each cell a superpixel covers.

  Args:
    superpixels: [H, W] integer ids 0 .. S-1; others, such as -1, are padding.
    num_superpixels: S.
    stride: pixels per cell; divides H and W.

  Returns:
    [S, H // stride, W // stride] float32, share of the cell's pixels, 0 to 1.

  Raises:
    ValueError: the map has the wrong shape or dtype, or H or W is no multiple
      of the stride.
  """
  return _pixels_in_cells(superpixels, num_superpixels, stride) / stride**2


def _pixels_in_cells(superpixels, num_superpixels, stride):
  """[S, Hf, Wf] float32: pixels of each superpixel in each cell."""
  superpixels = jnp.asarray(superpixels)
  wanted = "integers[H, W] of one image; vmap over images"
  _check("superpixels", superpixels, jnp.integer, (None, None), wanted)
  if not is_count(stride):
    raise ValueError(
      f"stride: found {stride}, wanted pixels per cell, a positive integer"
      " (static under jit)"
    )
  height, width = superpixels.shape
  if height % stride or width % stride:
    raise ValueError(
      f"superpixels: {height} x {width} pixels is no multiple of the stride"
      f" {stride}; pad the map with -1"
    )
  grid = height // stride, width // stride
  num_cells = grid[0] * grid[1]

  cell_rows = jnp.arange(height) // stride * grid[1]
  cells = cell_rows[:, None] + (jnp.arange(width) // stride)[None]
  superpixels = superpixels.astype(jnp.int32)  # room for the products below
  inside = (superpixels >= 0) & (superpixels < num_superpixels)
  index = jnp.where(
    inside, superpixels * num_cells + cells, num_superpixels * num_cells
  )
  pixels = jnp.zeros(num_superpixels * num_cells, jnp.float32)
  pixels = pixels.at[index.reshape(-1)].add(1, mode="drop")
  return pixels.reshape(num_superpixels, *grid)


def available_cells(
  coverage: jax.Array,
  boxes: jax.Array | None = None,
  *,
  availability: str = "any",
) -> jax.Array:
  """The cells that a proposal owns (Eq. 6), from how much it covers of them.

  Args:
    coverage: [P, Hf, Wf] float32 from `superpixel_coverage`.
    boxes: [P, 4] int32 inclusive grid boxes outside which no cell is available,
      or None.
    availability: "any": a cell with a pixel of the proposal (Eq. 6).
      "coverage": a cell that the proposal covers by half or more, and the
      first of the cells that it covers most, so that thin segments stay.

  Returns:
    [P, Hf, Wf] bool.

  Raises:
    ValueError: an argument has the wrong shape or dtype, or availability is
      unknown.
  """
  coverage = jnp.asarray(coverage)
  wanted = "float[P, Hf, Wf], see superpixel_coverage"
  _check("coverage", coverage, jnp.floating, (None,) * 3, wanted)
  if availability not in ("any", "coverage"):
    raise ValueError(
      f"availability: found {availability!r}, wanted 'any' or 'coverage'"
    )
  if boxes is not None:
    boxes = jnp.asarray(boxes)
    check_boxes(boxes, count=len(coverage))
    inside = cells_in_boxes(boxes, grid_size=coverage.shape[1:])
    coverage = jnp.where(inside, coverage, 0)
  available = coverage > 0
  if availability == "coverage":
    flat = coverage.reshape(len(coverage), math.prod(coverage.shape[1:]))
    best = jnp.arange(flat.shape[1])[None] == jnp.argmax(flat, axis=1)[:, None]
    available &= (coverage >= 0.5) | best.reshape(coverage.shape)
  return available


def superpixel_masks(
  superpixels: jax.Array,
  membership: jax.Array,
  boxes: jax.Array | None,
  *,
  stride: int,
  availability: str = "any",
) -> jax.Array:
  """The available cells of each proposal (Eq. 6) from its superpixels.

  `available_cells` of `superpixel_coverage`; see there.
  """
  coverage = superpixel_coverage(superpixels, membership, stride=stride)
  return available_cells(coverage, boxes, availability=availability)


def cells_in_boxes(
  boxes: jax.Array, *, grid_size: tuple[int, int]
) -> jax.Array:
  """The cells of each box; none of one that ends before it starts.

  Args:
    boxes: [P, 4] int32 inclusive grid boxes.
    grid_size: (Hf, Wf).

  Returns:
    [P, Hf, Wf] bool.

  Raises:
    ValueError: the boxes have the wrong shape or dtype.
  """
  boxes = jnp.asarray(boxes)
  check_boxes(boxes)
  y0, x0, y1, x1 = jnp.moveaxis(boxes, -1, 0)[..., None]
  rows = jnp.arange(grid_size[0])[None]
  columns = jnp.arange(grid_size[1])[None]
  rows = (rows >= y0) & (rows <= y1)
  columns = (columns >= x0) & (columns <= x1)
  return rows[:, :, None] & columns[:, None, :]


@functools.partial(jax.jit, static_argnames=("output_size", "grid_size"))
def bin_edges(
  boxes: jax.Array, *, output_size: tuple[int, int], grid_size: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """First and past-the-end row and column of the bins of each box (Eq. 5).

  Bin u of a box of h rows is y0 + [floor(u h / oh), ceil((u + 1) h / oh)),
  clipped to the grid; a box has at least one cell. RoIPool rounds h / oh and
  its product to float32, which for some h (57, 114, 121, ... of 7 bins) makes
  the last bin end one cell past the box. So it is here for up to 1,024 cells;
  beyond, the edges are exact.

  Args:
    boxes: [P, 4] int32 inclusive grid boxes.
    output_size: bins per column and per row, (oh, ow).
    grid_size: (Hf, Wf).

  Returns:
    top and bottom [P, oh], left and right [P, ow], int32 in [0, Hf] or [0, Wf].
  """

  def edges(first, last, bins, cells):
    first = first[:, None]
    extent = jnp.maximum(last[:, None] - first + 1, 1)
    u = jnp.arange(bins, dtype=jnp.int32)[None]
    # Of u * extent / bins: the product alone may have more than 32 bits.
    whole, rest = extent // bins, extent % bins
    exact = (
      whole * u + rest * u // bins,
      whole * (u + 1) + (rest * (u + 1) + bins - 1) // bins,
    )
    # Devices divide in different ways: the host makes a table.
    table = _rounded_edges(ROUNDED_CELLS, bins)
    row = jnp.minimum(extent[:, 0], ROUNDED_CELLS)
    return tuple(
      jnp.clip(
        first
        + jnp.where(extent <= ROUNDED_CELLS, jnp.array(t, jnp.int32)[row], e),
        0,
        cells,
      )
      for t, e in zip(table, exact, strict=True)
    )

  y0, x0, y1, x1 = jnp.moveaxis(boxes.astype(jnp.int32), -1, 0)
  return (
    *edges(y0, y1, output_size[0], grid_size[0]),
    *edges(x0, x1, output_size[1], grid_size[1]),
  )


@functools.lru_cache(maxsize=64)
def _rounded_edges(limit, bins):
  """Starts and ends [limit + 1, bins] of the bins of 0 .. limit cells."""

  def float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]

  sizes = [float32(extent / bins) for extent in range(limit + 1)]
  return (
    [[math.floor(float32(u * s)) for u in range(bins)] for s in sizes],
    [[math.ceil(float32(u * s)) for u in range(1, bins + 1)] for s in sizes],
  )


def available_bins(
  masks: jax.Array, boxes: jax.Array, *, output_size: tuple[int, int] = (7, 7)
) -> jax.Array:
  """The bins of each proposal that hold an available cell.

  Args:
    masks: [P, Hf, Wf] bool, the available cells.
    boxes: [P, 4] int32 inclusive grid boxes.
    output_size: (oh, ow).

  Returns:
    [P, oh, ow] bool.

  Raises:
    ValueError: an argument has the wrong shape or dtype, or output_size is not
      two positive integers.
  """
  masks, boxes = jnp.asarray(masks), jnp.asarray(boxes)
  check_output_size(output_size)
  _check("masks", masks, jnp.bool_, (None,) * 3, "bool[P, Hf, Wf]")
  check_boxes(boxes, count=len(masks))
  top, bottom, left, right = bin_edges(
    boxes, output_size=tuple(output_size), grid_size=masks.shape[1:]
  )
  rows = jnp.arange(masks.shape[1])[None, None]
  columns = jnp.arange(masks.shape[2])[None, None]
  rows = (rows >= top[..., None]) & (rows < bottom[..., None])
  columns = (columns >= left[..., None]) & (columns < right[..., None])
  # Sums of non-negative terms: positive in any precision.
  cells = jnp.einsum(
    "puh,phw,pvw->puv",
    rows.astype(jnp.float32),
    masks.astype(jnp.float32),
    columns.astype(jnp.float32),
  )
  return cells > 0


def check_boxes(boxes: jax.Array, *, count: int | None = None) -> None:
  """Raises ValueError unless these are boxes on the grid, `count` of them."""
  wanted = f"int32[{'P' if count is None else count}, 4] on the feature grid"
  _check("boxes", boxes, jnp.integer, (count, 4), f"{wanted}; see grid_boxes")


def check_pixel_boxes(boxes: jax.Array, stride: float) -> None:
  """Raises ValueError unless these are boxes of pixels, and a stride."""
  _check("boxes", boxes, jnp.number, (None, 4), "float[P, 4] in pixels")
  # A traced one has no value to check.
  if isinstance(stride, numbers.Real) and not stride > 0:
    raise ValueError(f"stride: found {stride}, wanted pixels per cell, above 0")


def check_output_size(output_size: tuple[int, int]) -> None:
  """Raises ValueError unless this is a pair of positive integers."""
  try:
    fits = [is_count(size) for size in output_size] == [True, True]
  except TypeError:  # a number
    fits = False
  if not fits:
    raise ValueError(
      f"output_size: found {output_size}, wanted two positive integers"
    )


def is_count(number: Any, *, least: int = 1) -> bool:
  """Whether this is an integer, of Python or numpy, of at least `least`."""
  return isinstance(number, numbers.Integral) and number >= least


def _check(name, array, dtype, shape, wanted):
  """Raises ValueError unless an array fits; None is an axis of any size."""
  fits = array.ndim == len(shape) and all(
    size in (None, found)
    for size, found in zip(shape, array.shape, strict=True)
  )
  if not fits or not jnp.issubdtype(array.dtype, dtype):
    raise ValueError(
      f"{name}: found {array.dtype}{list(array.shape)}, wanted {wanted}"
    )
