"""Random numbers of a step that do not depend on how its batch is divided."""

from __future__ import annotations

from typing import NamedTuple

import jax

NECK, INSTANCES, AUGMENT, CELLS = range(4)
"""The streams of random numbers of a step."""


class DropoutKeys(NamedTuple):
  """Keys [B] of the images for the dropout of each part; None for none."""

  neck: jax.Array | None
  cells: jax.Array | None


def image_keys(
  key: jax.Array, step: jax.Array, image_index: jax.Array, *, stream: int
) -> jax.Array:
  """One random key [B] for each image of a step.

  A pure function of the run's key, the step, the image and the stream: neither
  the devices nor the parts of a step that share a batch have a say.
  """
  key = jax.random.fold_in(jax.random.fold_in(key, step), stream)
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(image_index)


def dropout_keys(
  key: jax.Array, step: jax.Array, image_index: jax.Array
) -> DropoutKeys:
  """The keys of a step's dropout, see `image_keys`."""
  return DropoutKeys(
    *(
      image_keys(key, step, image_index, stream=stream)
      for stream in (NECK, CELLS)
    )
  )
