"""Random exposure and saturation, on the device: part of a training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jtsm_jax.types import Batch


def coloured_images(batch: Batch) -> jax.Array:
  """The images of a batch in the colours that it asks for: [B, H, W, 3].

  uint8 where it asks for none, else float32, 0 to 255.
  """
  if batch.colour is None:
    return batch.images
  return change_hsv(batch.images, batch.colour)


def change_hsv(images: jax.Array, factors: jax.Array) -> jax.Array:
  """Multiplies saturation and value of the HSV space, each up to its limit.

  Args:
    images: [B, H, W, 3] uint8 RGB.
    factors: [B, 2] float32, of saturation and of value.

  Returns:
    [B, H, W, 3] float32 RGB, 0 to 255.
  """
  # Value is the top t of the channels, saturation (t - low) / t: a channel c
  # becomes (t - (t - c) * by) * gain, where neither may exceed 1.
  pixels = images.astype(jnp.float32)
  saturation, value = factors.T[..., None, None]
  # One by one: on CPUs a reduction over 3 channels takes 25 times as long.
  r, g, b = (pixels[..., k] for k in range(3))
  top = jnp.maximum(jnp.maximum(r, g), b)
  low = jnp.minimum(jnp.minimum(r, g), b)
  by = jnp.minimum(saturation, top / jnp.maximum(top - low, 1))
  gain = jnp.minimum(value, 255 / jnp.maximum(top, 1))
  offset = top * gain * (1 - by)
  return pixels * (by * gain)[..., None] + offset[..., None]
