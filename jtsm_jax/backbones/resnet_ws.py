"""ResNet-WS, the backbone of the paper (Shen et al., ECCV 2020; "v2" layout).

A ResNet for weak supervision: a stem of three 3x3 convolutions, and max-pooling
instead of strided convolutions, so that no activation is skipped on the way
down. The last two stages are dilated, which keeps the output stride at 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtsm_jax.backbones.conv_norm import ConvNorm, Norm, scaled_channels
from jtsm_jax.types import Array

PIXEL_MEAN = (122.7717, 115.9465, 102.9801)
"""Mean of the training pixels in 0 .. 255, R, G, B. The standard deviation of
the authors' models is 1. Their weights take B, G, R: the first kernel's input
axis is flipped when they are loaded."""

STAGE_CHANNELS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def normalise(images: Array) -> Array:
  """Subtracts the mean: uint8 RGB [..., 3] -> float32, about -123 .. 153."""
  xp = np if isinstance(images, np.ndarray) else jnp
  return images.astype(xp.float32) - xp.asarray(PIXEL_MEAN, xp.float32)


class _Block(nn.Module):
  """A basic block, or a bottleneck; `pool` comes first (the v2 layout)."""

  channels: int  # inner width
  bottleneck: bool
  dilation: int
  pool: Callable[[jax.Array], jax.Array] | None
  norm: Norm
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    layer = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
    spatial = functools.partial(layer, kernel=3, dilation=self.dilation)
    if self.pool is not None:
      x = self.pool(x)

    if self.bottleneck:
      outputs = self.channels * BOTTLENECK_EXPANSION
      y = layer(self.channels, kernel=1, name="conv1")(x, train=train)
      y = spatial(self.channels, name="conv2")(nn.relu(y), train=train)
      y = layer(outputs, kernel=1, name="conv3")(nn.relu(y), train=train)
    else:
      outputs = self.channels
      y = spatial(self.channels, name="conv1")(x, train=train)
      y = spatial(self.channels, name="conv2")(nn.relu(y), train=train)

    if x.shape[-1] != outputs:
      x = layer(outputs, kernel=1, name="shortcut")(x, train=train)
    return nn.relu(x + y)


def _halve(x: jax.Array) -> jax.Array:
  """2x2 maxima with stride 2; an odd last row or column is dropped."""
  return nn.max_pool(x, (2, 2), strides=(2, 2))


def _pool_in_place(x: jax.Array) -> jax.Array:
  """2x2 maxima with stride 1 at the same size: out[i] = max(x[i], x[i + 1]).

  The padding, bottom and right, stands for zeros: x is never negative here.
  """
  return nn.max_pool(x, (2, 2), strides=(1, 1), padding=((0, 1), (0, 1)))


class ResNetWS(nn.Module):
  """ResNet-WS of 18, 50 or 101 layers.

  Attributes:
    depth: 18, 50 or 101.
    width: factor of all channel counts, which stay multiples of 8.
    norm: "frozen": stored statistics, and the optimizer is expected to mask
      scale and bias too (the authors' setting); "batch": batch statistics while
      training; "group": up to 32 groups, for training from scratch.
    dilated: keep stride 8 by dilating res4 and res5 instead of pooling before
      res4; otherwise the output stride is 16, as in ImageNet training.
    dtype: of the computation; parameters are float32.
    remat: compute what lies within blocks again in the backward pass, instead
      of keeping it.
  """

  depth: int = 18
  width: float = 1.0
  norm: Norm = "frozen"
  dilated: bool = True
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Computes the features of every stage.

    Args:
      images: [B, H, W, 3] float, RGB, as `normalise` gives them.
      train: whether "batch" norm uses and updates batch statistics.

    Returns:
      "res2" .. "res5": [B, h, w, c] >= 0 with strides 4, 8, 8, 8 if dilated and
      4, 8, 16, 16 otherwise. With H a multiple of the stride, h = H / stride.

    Raises:
      ValueError: unknown `depth` or `norm`.
    """
    if self.depth not in BLOCKS:
      raise ValueError(
        f"depth is {self.depth}; it must be one of {tuple(BLOCKS)}"
      )
    layer = functools.partial(
      ConvNorm,
      scaled_channels(64, width=self.width),
      kernel=3,
      norm=self.norm,
      dtype=self.dtype,
    )
    x = images.astype(self.dtype)
    x = nn.relu(layer(stride=2, name="stem1")(x, train=train))
    x = nn.relu(layer(name="stem2")(x, train=train))
    x = nn.relu(layer(name="stem3")(x, train=train))
    x = _halve(x)

    pools = {3: _halve, 4: _pool_in_place if self.dilated else _halve}
    block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
    features = {}
    stages = zip(BLOCKS[self.depth], STAGE_CHANNELS, strict=True)
    for stage, (blocks, channels) in enumerate(stages, start=2):
      for i in range(blocks):
        x = block(
          channels=scaled_channels(channels, width=self.width),
          bottleneck=self.depth >= 50,
          dilation=2 if self.dilated and stage >= 4 else 1,
          pool=pools.get(stage) if i == 0 else None,
          norm=self.norm,
          dtype=self.dtype,
          name=f"res{stage}_{i}",
        )(x, train)
      features[f"res{stage}"] = x
    return features
