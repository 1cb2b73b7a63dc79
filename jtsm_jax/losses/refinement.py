"""The panoptic refinement loss (Eq. 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jtsm_jax.losses.mil import masked_mean
from jtsm_jax.types import Mined


def refinement_loss(
  logits: jax.Array,
  mined: Mined,
  *,
  valid: jax.Array,
  reduction: str = "mean",
  count: jax.Array | None = None,
) -> jax.Array:
  """Weighted cross-entropy of one refinement head with its pseudo labels.

  Args:
    logits: [B, P, K + 1] float32.
    mined: labels and weights, from the head before.
    valid: [B, P] bool.
    reduction: over an image's proposals: "mean" over the valid ones, or "sum"
      (Eq. 3 to the letter). Images are averaged.
    count: images with proposals of the whole batch, where these are a part.

  Returns:
    A scalar.

  Raises:
    ValueError: `reduction` is neither.
  """
  if reduction not in ("sum", "mean"):
    raise ValueError(f"reduction is {reduction!r}; wanted 'sum' or 'mean'")
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, mined.label)
  weight = jax.lax.stop_gradient(mined.weight) * valid
  loss = (loss * weight).sum(1)
  proposals = valid.sum(1)
  if reduction == "mean":
    loss = loss / jnp.maximum(proposals, 1)
  return masked_mean(loss, proposals > 0, count=count)
