"""RoIPool: max-pooling of boxes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.moi_pool import api, vjp


def roi_pool(
  features: jax.Array,
  boxes: jax.Array,
  *,
  output_size: tuple[int, int] = (7, 7),
) -> jax.Array:
  """Max-pools each box into a fixed number of bins.

  It is `moi_pool` with a full mask. Neighbouring bins may share cells; a bin
  outside the grid gives 0. The gradient goes to the first maximum of each bin.

  Args:
    features: [Hf, Wf, C] float.
    boxes: [P, 4] int32 inclusive grid boxes (y0, x0, y1, x1), see `grid_boxes`.
    output_size: (oh, ow).

  Returns:
    [P, oh, ow, C], dtype of the features.

  Raises:
    ValueError: an argument has the wrong shape or dtype.
  """
  features, boxes = jnp.asarray(features), jnp.asarray(boxes)
  api.check_pooling(features, boxes, output_size)
  return vjp.max_pool(features, None, boxes, tuple(output_size))
