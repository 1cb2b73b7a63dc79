"""The multiple-instance loss (Eq. 2) and the loss of the tag warm-up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def mil_loss(
  image_scores: jax.Array,
  tags: jax.Array,
  *,
  valid: jax.Array,
  reduction: str = "sum",
  count: jax.Array | None = None,
) -> jax.Array:
  """Binary cross-entropy of the image scores (Eq. 2), mean over images.

  Args:
    image_scores: [B, K] float32 in (0, 1), y.
    tags: [B, K] float32, 0 or 1, t.
    valid: [B] bool; padding examples do not count.
    reduction: over classes: "sum" (paper) or "mean" (the authors' code).
    count: images of the whole batch, where these are a part of it.

  Returns:
    A scalar.

  Raises:
    ValueError: `reduction` is neither.
  """
  if reduction not in ("sum", "mean"):
    raise ValueError(f"reduction is {reduction!r}; wanted 'sum' or 'mean'")
  loss = -(tags * jnp.log(image_scores) + (1 - tags) * jnp.log1p(-image_scores))
  loss = loss.sum(-1) if reduction == "sum" else loss.mean(-1)
  return masked_mean(loss, valid, count=count)


def tag_loss(
  logits: jax.Array, tags: jax.Array, *, valid: jax.Array
) -> jax.Array:
  """Sigmoid cross-entropy, summed over classes, mean over images.

  Args:
    logits: [B, K] float32.
    tags: [B, K] float32, 0 or 1.
    valid: [B] bool; padding examples do not count.

  Returns:
    A float32 scalar, at least 0.
  """
  loss = optax.sigmoid_binary_cross_entropy(logits, tags).sum(-1)
  return masked_mean(loss, valid)


def masked_mean(
  values: jax.Array, valid: jax.Array, *, count: jax.Array | None = None
) -> jax.Array:
  """Mean of the valid values; 0 when there is none.

  With `count`, their sum over it: the means of the parts of a batch, each over
  the count of the whole, sum up to the mean of the whole.
  """
  total = jnp.where(valid, values, 0).sum()
  count = valid.sum() if count is None else count
  return total / jnp.maximum(count, 1)
