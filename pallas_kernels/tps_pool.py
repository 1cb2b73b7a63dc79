"""Shape-interpolation pooling: bend a segment into its box, then max-pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .grid import is_count
from .moi_pool.api import check_masks, check_pooling


def tps_pool(
  features: jax.Array,
  masks: jax.Array,
  boxes: jax.Array,
  *,
  output_size: tuple[int, int] = (7, 7),
  points_per_side: int = 5,
  samples_per_bin: int = 2,
) -> jax.Array:
  """Max-pools segments that a thin-plate spline has bent into rectangles.

  The paper's first variant of MoIPool (section 3.3, "shape-interpolation"),
  which leaves the control points open. Here:

  - 4 (points_per_side - 1) targets lie evenly on the border of the box. Each
    has as its control point the nearest available cell inside the box (the
    first in row order if several are equally near): a point of the segment's
    outer contour.
  - The spline takes the targets to their control points and bends least of all
    maps that do (Bookstein, 1989). The targets are the same for all segments,
    up to the box, and never coincide, so the spline always exists: a segment of
    one cell is taken for a rectangle of this cell's values, a line for one that
    varies along it. Holes are treated as filled.
  - Each bin of the rectangle is sampled at samples_per_bin x samples_per_bin
    regular points, bilinearly in the features, and takes the maximum.

  A segment without a cell in its box gives 0. The features get a gradient,
  masks and boxes none.

  Args:
    features: [Hf, Wf, C] float.
    masks: [P, Hf, Wf] bool, the available cells (see `superpixel_masks`).
    boxes: [P, 4] int32 inclusive grid boxes (y0, x0, y1, x1), see `grid_boxes`.
    output_size: (oh, ow).
    points_per_side: of the box, both corners among them; at least 2.
    samples_per_bin: samples of a bin along each axis.

  Returns:
    [P, oh, ow, C], dtype of the features.

  Raises:
    ValueError: an argument has the wrong shape or dtype, or an option is too
      small.
  """
  features, masks, boxes = map(jnp.asarray, (features, masks, boxes))
  check_pooling(features, boxes, output_size)
  check_masks(features, masks, boxes)
  if not is_count(points_per_side, least=2) or not is_count(samples_per_bin):
    raise ValueError(
      f"points_per_side, samples_per_bin: found {points_per_side},"
      f" {samples_per_bin}, wanted integers of at least 2 and 1"
    )
  oh, ow = output_size
  targets = _border(points_per_side)
  rows, columns = (
    (jnp.arange(n, dtype=float) + 0.5) / n
    for n in (oh * samples_per_bin, ow * samples_per_bin)
  )
  points = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1)
  spline = spline_matrix(targets, points.reshape(-1, 2))

  @jax.checkpoint  # the samples are several times as large as the result
  def pool(proposal):
    mask, box = proposal
    control, exists = control_points(mask, box, targets)
    sources = jnp.matmul(spline, control, precision=lax.Precision.HIGHEST)
    samples = _bilinear(features, sources)
    samples = samples.reshape(oh, samples_per_bin, ow, samples_per_bin, -1)
    samples = jnp.moveaxis(samples, 1, 2).reshape(
      oh, ow, samples_per_bin**2, -1
    )
    # By index: the gradient of `max` looks for samples that equal it, and finds
    # none where the backward pass computes them anew and rounds otherwise.
    best = lax.stop_gradient(samples).argmax(2, keepdims=True)
    pooled = jnp.take_along_axis(samples, best, axis=2)[:, :, 0]
    return jnp.where(exists, pooled, 0).astype(features.dtype)

  return lax.map(pool, (masks, boxes))


def control_points(
  mask: jax.Array, box: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The available cell nearest to each target on the border of the box.

  Args:
    mask: [Hf, Wf] bool.
    box: [4] int32, inclusive.
    targets: [K, 2] float32 in the unit square, which stands for the box.

  Returns:
    [K, 2] float32 rows and columns, and whether there is any available cell.
  """
  start, end = box[:2], jnp.maximum(box[2:], box[:2])
  start, end = (x.astype(targets.dtype)[None] for x in (start, end))
  aims = start + targets * (end - start)
  rows, columns = (jnp.arange(n, dtype=targets.dtype)[None] for n in mask.shape)
  in_rows = (rows >= start[:, :1]) & (rows <= end[:, :1])
  in_columns = (columns >= start[:, 1:]) & (columns <= end[:, 1:])
  inside = in_rows[0, :, None] & in_columns[0, None, :]
  distance = (rows - aims[:, :1])[:, :, None] ** 2
  distance += (columns - aims[:, 1:])[:, None, :] ** 2
  available = (mask & inside).reshape(-1)
  distance = distance.reshape(len(aims), len(available))
  distance = jnp.where(available[None], distance, jnp.inf)
  nearest = jnp.argmin(distance, axis=1)
  cells = jnp.stack(jnp.divmod(nearest, mask.shape[1]), -1)
  return cells.astype(jnp.float32), jnp.any(available)


def spline_matrix(targets: jax.Array, points: jax.Array) -> jax.Array:
  """The thin-plate spline as a matrix, which is linear in what it interpolates.

  Args:
    targets: [K, 2] float32, no two alike and not all on a line.
    points: [N, 2] float32.

  Returns:
    [N, K] float32: times the values at the targets, the values at the points.
  """

  def kernel(a, b):
    square = jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)
    return square * jnp.log(jnp.where(square > 0, square, 1))

  def affine(x):
    return jnp.concatenate([jnp.ones((len(x), 1)), x], axis=1)

  count = len(targets)
  system = jnp.block(
    [
      [kernel(targets, targets), affine(targets)],
      [affine(targets).T, jnp.zeros((3, 3))],
    ]
  )
  weights = jnp.linalg.inv(system)[:, :count]
  basis = jnp.concatenate([kernel(points, targets), affine(points)], axis=1)
  return jnp.matmul(basis, weights, precision=lax.Precision.HIGHEST)


def _border(points_per_side):
  """[4 (n - 1), 2]: points on the unit square's border, clockwise."""
  steps = jnp.arange(points_per_side - 1, dtype=float) / (points_per_side - 1)
  zeros, ones = jnp.zeros_like(steps), jnp.ones_like(steps)
  sides = (zeros, steps), (steps, ones), (ones, 1 - steps), (1 - steps, zeros)
  return jnp.concatenate([jnp.stack(side, -1) for side in sides])


def _bilinear(features, points):
  """[N, C]: features at rows and columns [N, 2], clipped to the grid."""
  height, width, channels = features.shape
  flat = features.reshape(height * width, channels)
  last = jnp.array([[height - 1, width - 1]], points.dtype)
  points = jnp.clip(points, 0, last)
  low = jnp.floor(points)
  part = points - low
  total = 0.0
  for i in range(2):
    for j in range(2):
      cell = low + jnp.array([[i, j]], points.dtype)
      cell = jnp.minimum(cell, last).astype(jnp.int32)
      weight = (part[:, 0] if i else 1 - part[:, 0]) * (
        part[:, 1] if j else 1 - part[:, 1]
      )
      value = flat[cell[:, 0] * width + cell[:, 1]]
      total += weight[:, None] * value.astype(points.dtype)
  return total
