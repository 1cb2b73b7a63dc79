"""The loss of the cell head: the M-step of expectation-maximisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cell_loss(
  logits: jax.Array, targets: jax.Array, *, count: jax.Array | None = None
) -> jax.Array:
  """Cross-entropy of all classes, mean over the cells of each image.

  Args:
    logits: [B, Hf, Wf, K] float32.
    targets: [B, Hf, Wf, K] float32, from `mining.cells.assign_cells`; a cell
      counts as much as its targets sum up to.
    count: images of the whole batch that have such cells, where these are a
      part of it.

  Returns:
    A scalar, the mean over images.
  """
  targets = jax.lax.stop_gradient(targets)
  cells = targets.sum((1, 2, 3))
  terms = -(targets * jax.nn.log_softmax(logits)).sum((1, 2, 3))
  count = (cells > 0).sum() if count is None else count
  return (terms / jnp.maximum(cells, 1)).sum() / jnp.maximum(count, 1)
