"""Mask of Interest Pooling: the public functions and their checks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .. import arrays, grid
from . import reference, vjp

COMPENSATIONS = ("bins", "official", "features", None)
IMPLEMENTATIONS = (
  "xla",
  "pallas_tpu",
  "pallas_triton",
  "pallas_mosaic_gpu",
  "reference",
  None,
)
EMULATED = ("pallas_tpu", "pallas_triton")  # with interpret=True


def moi_pool(
  features: jax.Array,
  masks: jax.Array,
  boxes: jax.Array,
  *,
  output_size: tuple[int, int] = (7, 7),
  compensation: str | None = "bins",
  implementation: str | None = None,
  deterministic: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Shape-invariant MoIPool of segments, PAPER Eq. 5 to 8.

  Each box is divided into oh x ow bins as in RoIPool; a bin takes the maximum
  of its cells that are available, per channel, or 0 if none is. The gradient
  goes to the cell of the maximum (the first in row order if several are equal);
  masks, boxes and psi carry none. For the maximum a cell of -inf counts as not
  available, psi goes by the mask; an available NaN is the maximum of its bins.
  The result is multiplied by a compensation psi, so that a segment that fills
  few bins is not weaker than one that fills all:

  - "bins": oh * ow / max(available bins, 1). A full mask gives RoIPool.
  - "official": oh * ow / (available bins + 1), as the authors' code.
  - "features": Eq. 7 to the letter, oh * ow / sum of the pooled features, per
    proposal and channel. Meant for features >= 0: where the sum is 1e-6 or
    less, psi is 1.
  - None: psi is 1.

  Args:
    features: [Hf, Wf, C] float.
    masks: [P, Hf, Wf] bool, the available cells (see `superpixel_masks`).
    boxes: [P, 4] int32 inclusive grid boxes (y0, x0, y1, x1), see `grid_boxes`.
      They may reach over the border of the grid; a traced one outside gives 0.
      Along an axis on which one ends before it starts it is one cell.
    output_size: (oh, ow).
    compensation: see above.
    implementation: "xla" runs anywhere; "pallas_tpu", "pallas_triton" (NVIDIA
      GPUs from Ampere on) and "pallas_mosaic_gpu" (from Hopper on) run on their
      device or raise; "reference" is the definition, slow. None takes the
      fastest one that was measured for the device.
    deterministic: on a GPU, make the gradient the same in each run: its sums
      are made in integers. Elsewhere it always is. Not for "reference", and
      not for float64, nor are the kernels of Pallas.
    interpret: let Pallas emulate "pallas_tpu" or "pallas_triton", on any
      device: slow, for tests.

  Returns:
    [P, oh, ow, C], dtype of the features.

  Raises:
    ValueError: an argument has the wrong shape or dtype, a box that is not
      traced lies outside the grid, or an option is unknown or does not go with
      the others.
  """
  features, masks, boxes = map(jnp.asarray, (features, masks, boxes))
  check_pooling(features, boxes, output_size)
  check_masks(features, masks, boxes)
  if compensation not in COMPENSATIONS:
    raise ValueError(
      f"compensation: found {compensation!r}, wanted one of {COMPENSATIONS}"
    )
  output_size = tuple(output_size)
  pooled = max_pool(
    features,
    masks,
    boxes,
    output_size,
    implementation=implementation,
    deterministic=deterministic,
    interpret=interpret,
  )
  if compensation is None:
    return pooled

  num_bins = output_size[0] * output_size[1]
  if compensation == "features":
    total = jnp.sum(
      lax.stop_gradient(pooled),
      axis=(1, 2),
      keepdims=True,
      dtype=jnp.float32,
    )
    psi = jnp.where(total > 1e-6, num_bins / jnp.maximum(total, 1e-6), 1.0)
  else:
    bins = grid.available_bins(masks, boxes, output_size=output_size)
    bins = jnp.sum(bins, axis=(1, 2), keepdims=True, dtype=jnp.float32)[
      ..., None
    ]
    bins = bins + 1 if compensation == "official" else jnp.maximum(bins, 1)
    psi = num_bins / bins
  dtype = arrays.wide(features.dtype)
  return (pooled.astype(dtype) * psi.astype(dtype)).astype(features.dtype)


def max_pool(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
  *,
  implementation: str | None,
  deterministic: bool,
  interpret: bool,
) -> jax.Array:
  """`moi_pool` without compensation, of checked arrays.

  `masks` None means a full mask.

  Raises:
    ValueError: unknown implementation, or it does not take the features or
      the other options.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation: found {implementation!r}, wanted one of"
      f" {IMPLEMENTATIONS}"
    )
  if interpret and implementation not in EMULATED:
    raise ValueError(
      f"interpret: found True with {implementation=}, wanted one of {EMULATED}"
    )
  if deterministic and implementation == "reference":
    raise ValueError(
      "deterministic: found True with implementation='reference', wanted one"
      " whose gradient can be summed in integers; 'xla' can"
    )
  if features.dtype == jnp.float64 and (
    deterministic or (implementation or "").startswith("pallas")
  ):
    raise ValueError(
      f"features: found float64, wanted at most 32 bits with {implementation=}"
      f" and {deterministic=}; 'xla' keeps float64, with deterministic=False"
    )
  if implementation == "reference":
    if masks is None:
      masks = jnp.ones((len(boxes), *features.shape[:2]), bool)
    return reference.max_pool(features, masks, boxes, output_size)
  return vjp.max_pool(
    features,
    masks,
    boxes,
    output_size,
    implementation=implementation or "xla",
    deterministic=deterministic,
    interpret=interpret,
  )


def masked_average(features: jax.Array, masks: jax.Array) -> jax.Array:
  """The mean of the features over the cells of each proposal.

  As this is a product of matrices, one feature that is not finite spoils its
  channel of all proposals.

  Args:
    features: [Hf, Wf, C] float.
    masks: [P, Hf, Wf] bool, or float weights >= 0 such as
      `superpixel_coverage`.

  Returns:
    [P, C] float32; 0 for a proposal without a cell.

  Raises:
    ValueError: an argument has the wrong shape or dtype.
  """
  features, masks = jnp.asarray(features), jnp.asarray(masks)
  _check_features(features)
  _check_grid(features, masks, weights=True)
  height, width, channels = features.shape
  weights = masks.reshape(len(masks), height * width).astype(jnp.float32)
  total = jnp.matmul(
    weights,
    features.reshape(height * width, channels).astype(jnp.float32),
    precision=lax.Precision.HIGHEST,
  )
  weight = jnp.sum(weights, axis=1, keepdims=True)
  return total / jnp.where(weight > 0, weight, 1)


def check_pooling(
  features: jax.Array, boxes: jax.Array, output_size: tuple[int, int]
) -> None:
  """Raises ValueError unless the arguments suit a max-pooling of boxes."""
  _check_features(features)
  grid.check_boxes(boxes)
  grid.check_output_size(output_size)
  if not isinstance(boxes, jax.core.Tracer):
    height, width = features.shape[:2]
    # On the host: under jit, jax's own operations would be traced.
    boxes = jax.device_get(boxes)
    # A box is one cell where its end is before its start.
    starts, ends = boxes[:, :2], boxes[:, 2:]
    outside = (starts >= (height, width)) | ((starts < 0) & (ends < 0))
    if outside.any():
      p = outside.any(axis=1).argmax()
      raise ValueError(
        f"boxes: box {p} is {boxes[p].tolist()}, outside the grid of {height} x"
        f" {width} cells; wanted (y0, x0, y1, x1) in cells, see grid_boxes"
      )


def _check_features(features):
  if features.ndim != 3 or not jnp.issubdtype(features.dtype, jnp.floating):
    raise ValueError(
      f"features: found {features.dtype}{list(features.shape)}, wanted"
      " float[Hf, Wf, C] of one image; vmap over images"
    )


def check_masks(
  features: jax.Array, masks: jax.Array, boxes: jax.Array
) -> None:
  """Raises ValueError unless there is a mask on the grid for each box."""
  _check_grid(features, masks)
  if masks.shape[0] != boxes.shape[0]:
    raise ValueError(
      f"masks, boxes: found {masks.shape[0]} masks and {boxes.shape[0]} boxes,"
      " wanted one of each per proposal"
    )


def _check_grid(features, masks, *, weights=False):
  is_float = jnp.issubdtype(masks.dtype, jnp.floating)
  if (
    masks.ndim != 3
    or masks.shape[1:] != features.shape[:2]
    or not (masks.dtype == jnp.bool_ or (weights and is_float))
  ):
    height, width, _ = features.shape
    kind = "bool or float" if weights else "bool"
    raise ValueError(
      f"masks: found {masks.dtype}{list(masks.shape)}, wanted"
      f" {kind}[P, {height}, {width}] on the grid of the features"
    )
