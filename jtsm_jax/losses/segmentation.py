"""Losses of the instance branch (Eq. 9) and the semantic branch (Eq. 10)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jtsm_jax.losses.mil import masked_mean
from jtsm_jax.types import Mined, PseudoMasks

IGNORE = -1
"""Label of a pixel that no pseudo mask covers."""


def sample_instances(
  keys: jax.Array, mined: Mined, *, num_things: int, count: int
) -> tuple[jax.Array, jax.Array]:
  """Chooses the proposals that the instance branch learns from.

  All proposals labelled with a thing, or a random `count` of them.

  Args:
    keys: [B] random keys of the images.
    mined: pseudo labels.
    num_things: T.
    count: N.

  Returns:
    index [B, N] int32 of the proposals and valid [B, N] bool.
  """
  labelled = (mined.label < num_things) & (mined.weight > 0)
  P = labelled.shape[1]
  drawn = jax.vmap(lambda key: jax.random.uniform(key, (P,)))(keys)
  priority = jnp.where(labelled, drawn, -1.0)
  count = min(count, P)
  value, index = jax.lax.top_k(priority, count)
  return index, value >= 0


def instance_targets(
  masks: jax.Array, slot: jax.Array, boxes: jax.Array, *, size: int
) -> jax.Array:
  """Crops pseudo masks to boxes.

  Args:
    masks: [M, h, w] bool pseudo masks of one image.
    slot: [N] int32, the mask of each box.
    boxes: [N, 4] float32 in pixels of the masks.
    size: side of the target.

  Returns:
    [N, size, size] float32, 0 or 1: the mask at the centre of each target cell.
  """
  centre = (jnp.arange(size) + 0.5) / size
  y = boxes[:, :1] + centre * (boxes[:, 2:3] - boxes[:, :1])
  x = boxes[:, 1:2] + centre * (boxes[:, 3:4] - boxes[:, 1:2])
  y = jnp.clip(jnp.floor(y).astype(jnp.int32), 0, masks.shape[1] - 1)
  x = jnp.clip(jnp.floor(x).astype(jnp.int32), 0, masks.shape[2] - 1)
  target = masks[slot[:, None, None], y[:, :, None], x[:, None, :]]
  return target.astype(jnp.float32)


def instance_loss(
  logits: jax.Array,
  targets: jax.Array,
  category: jax.Array,
  weight: jax.Array,
  valid: jax.Array,
  *,
  count: jax.Array | None = None,
) -> jax.Array:
  """Binary cross-entropy of the assigned class's mask (Eq. 9).

  Args:
    logits: [B, N, m, m, T] float32.
    targets: [B, N, m, m] float32, 0 or 1.
    category: [B, N] int32 thing class.
    weight: [B, N] float32, y of the class; ones leave the loss unweighted.
    valid: [B, N] bool, the foreground proposals.
    count: foreground proposals of the whole batch, where these are a part.

  Returns:
    A scalar: mean over pixels, then over foreground proposals.
  """
  channel = jnp.clip(category, 0, logits.shape[-1] - 1)
  chosen = jnp.take_along_axis(
    logits, channel[:, :, None, None, None], axis=-1
  )[..., 0]
  loss = optax.sigmoid_binary_cross_entropy(chosen, targets).mean((2, 3))
  return masked_mean(loss * weight, valid, count=count)


def semantic_targets(
  pseudo: PseudoMasks, mined: Mined, *, num_things: int
) -> jax.Array:
  """Paints the pseudo masks into one label map.

  Stuff in ascending order of score, so that the better one wins; then things,
  which occlude stuff, as label 0.

  Args:
    pseudo: masks [B, M, h, w].
    mined: category and score of each mask.
    num_things: T.

  Returns:
    [B, h, w] int32: 0 a thing, 1 .. stuff class + 1, `IGNORE` if uncovered.
  """
  valid = pseudo.valid & mined.valid
  thing = mined.category < num_things
  value = jnp.where(thing, 0, mined.category - num_things + 1)
  # The painter's order as a rank: the pixel takes its highest-ranked mask.
  rank = jnp.where(thing, 2.0, 1.0) + mined.score / (1.0 + mined.score)
  rank = jnp.where(valid, rank, 0.0)
  painted = jnp.where(pseudo.masks, rank[..., None, None], 0.0)  # [B, M, h, w]
  winner = painted.argmax(1)
  label = jnp.take_along_axis(value, winner.reshape(len(value), -1), axis=1)
  return jnp.where(painted.max(1) > 0, label.reshape(winner.shape), IGNORE)


def semantic_loss(
  logits: jax.Array, targets: jax.Array, *, count: jax.Array | None = None
) -> jax.Array:
  """Pixel cross-entropy (Eq. 10), mean over the covered pixels.

  Args:
    logits: [B, Hf, Wf, 1 + stuff] float32; resized to the targets.
    targets: [B, h, w] int32, `IGNORE` where nothing is known.
    count: covered pixels of the whole batch, where these images are a part.

  Returns:
    A scalar.
  """
  shape = (*targets.shape, logits.shape[-1])
  logits = jax.image.resize(logits, shape, "linear")
  covered = targets != IGNORE
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(covered, targets, 0)
  )
  return masked_mean(loss, covered, count=count)
