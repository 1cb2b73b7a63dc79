"""RoIAlign: bilinear pooling of boxes, without rounding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from . import arrays, grid

_CHUNK = 8  # proposals per step of the gradient; more of them miss the cache

# In float32 on accelerators, too.
_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def roi_align(
  features: jax.Array,
  boxes: jax.Array,
  *,
  stride: float,
  output_size: tuple[int, int] = (7, 7),
  sampling_ratio: int | None = 2,
) -> jax.Array:
  """Averages bilinear samples of the features in each bin of each box.

  Pixel y lies at y / stride - 0.5 on the grid, whose cell centres have integer
  coordinates ("aligned"). Each bin is sampled at sampling_ratio x
  sampling_ratio regular points. A point up to one cell outside the grid takes
  the border's value, one farther out gives 0. The features get a gradient, the
  boxes none; forward-mode differentiation is not defined for an integer
  sampling_ratio. (He et al., Mask R-CNN, ICCV 2017, section 3;
  `torchvision.ops.roi_align(aligned=True)`.)

  Args:
    features: [Hf, Wf, C] float.
    boxes: [P, 4] float (y0, x0, y1, x1), half-open, canvas pixels.
    stride: pixels per cell.
    output_size: (oh, ow).
    sampling_ratio: points per bin and axis; None: as many as a bin of the box
      has cells, rounded up, which differs from box to box; as it takes products
      of matrices, one feature that is not finite spoils its channel of all
      boxes.

  Returns:
    [P, oh, ow, C], dtype of the features.

  Raises:
    ValueError: an argument has the wrong shape or dtype, or an option is not
      positive.
  """
  features, boxes = jnp.asarray(features), jnp.asarray(boxes)
  if features.ndim != 3 or not jnp.issubdtype(features.dtype, jnp.floating):
    raise ValueError(
      f"features: found {features.dtype}{list(features.shape)}, wanted"
      " float[Hf, Wf, C] of one image; vmap over images"
    )
  grid.check_pixel_boxes(boxes, stride)
  grid.check_output_size(output_size)
  if sampling_ratio is not None and not grid.is_count(sampling_ratio):
    raise ValueError(
      f"sampling_ratio: found {sampling_ratio}, wanted a positive integer, or"
      " None"
    )
  features, boxes = arrays.vary_alike(features, boxes)
  if boxes.shape[0] == 0:  # no len, which a symbolic size has not
    return jnp.zeros_like(features, shape=(0, *output_size, features.shape[-1]))
  boxes = boxes.astype(jnp.float32) / stride - 0.5
  if sampling_ratio is None:
    return _align_adaptively(features, lax.stop_gradient(boxes), output_size)
  rows = _samples(
    boxes[:, 0], boxes[:, 2], output_size[0], sampling_ratio, features.shape[0]
  )
  columns = _samples(
    boxes[:, 1], boxes[:, 3], output_size[1], sampling_ratio, features.shape[1]
  )
  return _align(
    features,
    lax.stop_gradient(rows),
    lax.stop_gradient(columns),
    features.shape[:2],
  )


def _samples(start, end, bins, ratio, cells):
  """Sample points along one axis: cell [2, P, bins, ratio] and its weight.

  The two entries of the first axis are the cells on either side of the point.
  """
  step = (end - start) / (bins * ratio)
  middles = jnp.arange(bins * ratio, dtype=jnp.float32)[None] + 0.5
  points = start[:, None] + step[:, None] * middles
  inside = (points >= -1) & (points <= cells)
  points = jnp.clip(points, 0, cells - 1)
  low = jnp.floor(points)
  high = jnp.minimum(low + 1, cells - 1)
  weight = jnp.stack([1 - (points - low), points - low])
  weight = weight * inside[None].astype(jnp.float32) / ratio
  cell = jnp.stack([low, high]).astype(jnp.int32)
  shape = (2, start.shape[0], bins, ratio)
  return cell.reshape(shape), weight.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _align(features, rows, columns, grid_size):
  """Gathers the samples: on CPU 10 times faster than two matmuls."""
  height, width = grid_size
  flat = features.reshape(height * width, features.shape[-1])
  (y, weight_y), (x, weight_x) = rows, columns
  dtype = arrays.wide(features.dtype)
  total = 0.0
  for i in range(2):
    for j in range(2):
      for m in range(y.shape[-1]):
        for n in range(x.shape[-1]):
          index = y[i, :, :, None, m] * width + x[j, :, None, :, n]
          weight = weight_y[i, :, :, None, m] * weight_x[j, :, None, :, n]
          weight = weight[..., None].astype(dtype)
          total += weight * flat[index].astype(dtype)
  return total.astype(features.dtype)


def _forward(features, rows, columns, grid_size):
  return _align(features, rows, columns, grid_size), (rows, columns)


def _backward(grid_size, residuals, gradient):
  """The transposed interpolation as two small matmuls; no scatter of rows."""
  rows, columns = residuals
  height, width = grid_size
  rows_matrix = _matrix(*rows, height)
  columns_matrix = _matrix(*columns, width)
  dtype = arrays.wide(gradient.dtype)
  chunks = []
  for x in (rows_matrix, columns_matrix, gradient):
    x = x.astype(dtype)
    x = jnp.pad(x, [(0, -x.shape[0] % _CHUNK)] + [(0, 0)] * (x.ndim - 1))
    chunks.append(x.reshape(-1, _CHUNK, *x.shape[1:]))

  def add(total, chunk):
    rows, columns, gradient = chunk
    wide = _product("puvc,pvw->puwc", gradient, columns)
    return total + _product("puh,puwc->hwc", rows, wide), None

  shape = height, width, gradient.shape[-1]
  total = jnp.zeros_like(gradient, dtype, shape)
  total, _ = lax.scan(add, total, tuple(chunks))
  return total.astype(gradient.dtype), None, None


def _matrix(cell, weight, cells):
  """[P, bins, cells] interpolation weights of one axis."""
  index = jnp.arange(cells, dtype=cell.dtype).reshape(1, 1, 1, 1, cells)
  one_hot = cell[..., None] == index
  return jnp.sum(jnp.where(one_hot, weight[..., None], 0), axis=(0, 3))


_align.defvjp(_forward, _backward)


def _align_adaptively(features, boxes, output_size):
  """Interpolates rows, then columns: the number of points is no shape then."""

  dtype = arrays.wide(features.dtype)

  def align(box):
    rows = _adaptive_matrix(box[0], box[2], output_size[0], features.shape[0])
    columns = _adaptive_matrix(
      box[1], box[3], output_size[1], features.shape[1]
    )
    wide = _product("uh,hwc->uwc", rows.astype(dtype), features.astype(dtype))
    pooled = _product("vw,uwc->uvc", columns.astype(dtype), wide)
    return pooled.astype(features.dtype)

  return lax.map(align, boxes)


def _adaptive_matrix(start, end, bins, cells):
  """[bins, cells]: weights of the cells in the mean of a bin's points."""
  size = (end - start) / bins
  # Not ceil(size): devices divide in different ways.
  ratio = jnp.floor(size)
  ratio = ratio + (ratio * bins < end - start).astype(jnp.float32)

  def add_point(i, matrix):
    middle = (i.astype(jnp.float32) + 0.5) / ratio
    points = start + size * (jnp.arange(bins, dtype=jnp.float32) + middle)
    inside = (points >= -1) & (points <= cells)
    points = jnp.clip(points, 0, cells - 1)
    index = jnp.arange(cells, dtype=jnp.float32)[None]
    near = jnp.maximum(1 - jnp.abs(points[:, None] - index), 0)
    return matrix + near * inside[:, None].astype(jnp.float32) / ratio

  matrix = jnp.zeros_like(start, shape=(bins, cells))
  return lax.fori_loop(0, ratio.astype(jnp.int32), add_point, matrix)
