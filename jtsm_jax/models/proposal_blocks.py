"""The proposals of a batch a few at a time, where memory is short."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.types import Batch


def describe(
  model: JTSM,
  variables: Any,
  features: jax.Array,
  batch: Batch,
  *,
  keys: jax.Array | None = None,
  proposal_block: int = 0,
) -> jax.Array:
  """`JTSM.describe` of all proposals, a block after the other.

  The pooled features, P x bins x C numbers an image, exist for one block at a
  time: also in the backward pass, which computes them again.

  Args:
    model: the model.
    variables: what `model.apply` takes.
    features: [B, Hf, Wf, C].
    batch: its P proposals are described.
    keys: [B] random keys of the images, for dropout, which does not depend on
      the blocks; None at test time.
    proposal_block: proposals at a time, a multiple of 8; 0 for all at once.

  Returns:
    [B, P, D].

  Raises:
    ValueError: proposal_block is negative, or no multiple of 8.
  """
  block = proposal_block
  if block < 0 or block % 8:
    raise ValueError(
      f"proposal_block is {block}; wanted a multiple of 8, or 0 for all at once"
    )
  count = batch.valid.shape[1]
  if not 0 < block < count:
    return model.apply(variables, features, batch, keys=keys, method="describe")
  # The blocks' gradients are added up in the type that the blocks read.
  features = features.astype(jnp.float32)

  def describe_block(part):
    first, proposals = part
    return model.apply(
      variables,
      features,
      batch.replace(**proposals),
      keys=keys,
      first=first,
      method="describe",
    )

  firsts = jnp.arange(0, count, block)
  found = jax.lax.map(
    jax.checkpoint(describe_block, prevent_cse=False),
    (firsts, _blocks(batch, block)),
  )
  found = jnp.moveaxis(found, 0, 1)  # [B, blocks, block, D]
  # No len: in an export the number of images is a symbol.
  return found.reshape(found.shape[0], -1, found.shape[-1])[:, :count]


def _blocks(batch: Batch, size: int) -> dict[str, jax.Array]:
  """A batch's proposals in blocks, [blocks, B, ...]; the last is padded."""

  def split(array, axis, size):
    array = jnp.asarray(array)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % size)
    array = jnp.pad(array, padding)
    shape = (*array.shape[:axis], -1, size, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)

  return {
    "member_bits": split(batch.member_bits, 2, size // 8),
    "boxes": split(batch.boxes, 1, size),
    "valid": split(batch.valid, 1, size),
  }
