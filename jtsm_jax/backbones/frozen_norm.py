"""Batch norm whose statistics are stored, not computed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class FrozenNorm(nn.Module):
  """Batch norm with stored statistics, in one multiply and one add.

  Attributes:
    epsilon: added to the variance.
    dtype: of the result; the arithmetic is float32, and so are the sums over
      cells that are the gradients.
  """

  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    mean = self.variable("batch_stats", "mean", jnp.zeros, shape).value
    var = self.variable("batch_stats", "var", jnp.ones, shape).value
    factor = scale * lax.rsqrt(var + self.epsilon)
    offset = bias - mean * factor
    return (x * factor + offset).astype(self.dtype)
