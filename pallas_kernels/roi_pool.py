"""RoIPool: max-pooling of boxes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .moi_pool import api


def roi_pool(
  features: jax.Array,
  boxes: jax.Array,
  *,
  output_size: tuple[int, int] = (7, 7),
  implementation: str | None = None,
  deterministic: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Max-pools each box into a fixed number of bins.

  It is `moi_pool` with a full mask. Neighbouring bins may share cells; a bin
  outside the grid gives 0. The gradient goes to the first maximum of each bin.

  Args:
    features: [Hf, Wf, C] float.
    boxes: [P, 4] int32 inclusive grid boxes (y0, x0, y1, x1), see `grid_boxes`.
    output_size: (oh, ow).
    implementation: as the next two, see `moi_pool`.
    deterministic: of the gradient.
    interpret: for tests.

  Returns:
    [P, oh, ow, C], dtype of the features.

  Raises:
    ValueError: an argument has the wrong shape or dtype, a box that is not
      traced lies outside the grid, or an option is unknown or does not go with
      the others.
  """
  features, boxes = jnp.asarray(features), jnp.asarray(boxes)
  api.check_pooling(features, boxes, output_size)
  return api.max_pool(
    features,
    None,
    boxes,
    tuple(output_size),
    implementation=implementation,
    deterministic=deterministic,
    interpret=interpret,
  )
