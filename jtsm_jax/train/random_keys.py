"""Random numbers of a step that do not depend on how its batch is divided."""

from __future__ import annotations

import jax

DROPOUT, INSTANCES, AUGMENT = range(3)
"""The streams of random numbers of a step."""


def image_keys(
  key: jax.Array, step: jax.Array, image_index: jax.Array, *, stream: int
) -> jax.Array:
  """One random key [B] for each image of a step.

  A pure function of the run's key, the step, the image and the stream: neither
  the devices nor the parts of a step that share a batch have a say.
  """
  key = jax.random.fold_in(jax.random.fold_in(key, step), stream)
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(image_index)


def branch_off(keys: jax.Array) -> jax.Array:
  """Other keys [B] than those that the neck derives from `keys` [B]."""
  number = 2**31  # the neck counts from 0
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
