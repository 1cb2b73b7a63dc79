"""A convolution and its norm: what both kinds of ResNet are made of."""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtsm_jax.backbones.frozen_norm import FrozenNorm

BATCH_NORM_EPSILON = 1e-5

Norm = Literal["frozen", "batch", "group"]

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def scaled_channels(channels: int, *, width: float) -> int:
  """`channels * width` rounded to a multiple of 8, at least 8."""
  return max(8, int(channels * width / 8 + 0.5) * 8)


class ConvNorm(nn.Module):
  """A convolution without bias, padded to keep the size, and its norm."""

  channels: int
  kernel: int
  norm: Norm
  dtype: jnp.dtype
  stride: int = 1
  dilation: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.Conv(
      self.channels,
      (self.kernel, self.kernel),
      strides=self.stride,
      padding=self.dilation * (self.kernel // 2),
      kernel_dilation=self.dilation,
      use_bias=False,
      kernel_init=_he_fan_out,
      dtype=self.dtype,
      name="conv",
    )(x)
    match self.norm:
      case "frozen":
        return FrozenNorm(BATCH_NORM_EPSILON, self.dtype, name="norm")(x)
      case "batch":
        return nn.BatchNorm(
          use_running_average=not train,
          momentum=0.9,
          epsilon=BATCH_NORM_EPSILON,
          dtype=self.dtype,
          name="norm",
        )(x)
      case "group":
        return nn.GroupNorm(
          num_groups=math.gcd(32, self.channels),
          epsilon=BATCH_NORM_EPSILON,
          dtype=self.dtype,
          name="norm",
        )(x)
      case _:
        raise ValueError(
          f"norm is {self.norm!r}; it must be 'frozen', 'batch' or 'group'"
        )
