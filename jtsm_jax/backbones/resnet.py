"""ResNet (He et al., CVPR 2016), as torchvision has it, a backbone.

The stride of a bottleneck is in its 3x3 convolution ("v1.5"), as in the weights
that torchvision distributes.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtsm_jax.backbones.conv_norm import ConvNorm, Norm, scaled_channels
from jtsm_jax.types import Array

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in 0 .. 1, R, G, B."""

STAGE_CHANNELS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def normalise(images: Array) -> Array:
  """Maps uint8 RGB [..., 3] to float32 -2.2 .. 2.7, of mean 0, deviation 1."""
  xp = np if isinstance(images, np.ndarray) else jnp
  mean = xp.asarray(PIXEL_MEAN, xp.float32)
  std = xp.asarray(PIXEL_STD, xp.float32)
  return (images.astype(xp.float32) / 255 - mean) / std


class _Block(nn.Module):
  """A basic block, or a bottleneck.

  `first_dilation` is that of the 3x3 convolution with the stride. Where the
  stride was given up for dilation its input is still as dense as before it, and
  only what follows lies further apart.
  """

  channels: int  # inner width
  bottleneck: bool
  stride: int
  first_dilation: int
  dilation: int
  norm: Norm
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    layer = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
    strided = functools.partial(
      layer,
      self.channels,
      kernel=3,
      stride=self.stride,
      dilation=self.first_dilation,
    )
    if self.bottleneck:
      outputs = self.channels * BOTTLENECK_EXPANSION
      y = layer(self.channels, kernel=1, name="conv1")(x, train=train)
      y = strided(name="conv2")(nn.relu(y), train=train)
      y = layer(outputs, kernel=1, name="conv3")(nn.relu(y), train=train)
    else:
      outputs = self.channels
      y = strided(name="conv1")(x, train=train)
      y = layer(outputs, kernel=3, dilation=self.dilation, name="conv2")(
        nn.relu(y), train=train
      )

    if self.stride != 1 or x.shape[-1] != outputs:
      shortcut = layer(outputs, kernel=1, stride=self.stride, name="shortcut")
      x = shortcut(x, train=train)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet of 18, 50 or 101 layers, dilated to a stride of 8, 16 or 32.

  A stride beyond `output_stride` becomes 1 and the kernels after it are
  dilated (torchvision's `replace_stride_with_dilation`), so the coarse
  network's features are a subset of the fine one's cells.

  Attributes:
    depth: 18, 50 or 101.
    width: factor of all channel counts, which stay multiples of 8.
    norm: "frozen": stored statistics, and the optimizer is expected to mask
      scale and bias too; "batch": batch statistics while training; "group": up
      to 32 groups, for training from scratch.
    output_stride: pixels per cell of the last stage.
    dtype: of the computation; parameters are float32.
    remat: compute what lies within blocks again in the backward pass, instead
      of keeping it.
  """

  depth: int = 50
  width: float = 1.0
  norm: Norm = "frozen"
  output_stride: int = 32
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Computes the features of every stage.

    Args:
      images: [B, H, W, 3] float, RGB, as `normalise` gives them.
      train: whether "batch" norm uses and updates batch statistics.

    Returns:
      "res2" .. "res5", torchvision's layer1 .. layer4: [B, h, w, c] >= 0 with
      strides 4, 8, 16, 32, none above `output_stride`. h is H divided by 2 and
      rounded up at each halving.

    Raises:
      ValueError: unknown `depth`, `norm` or `output_stride`.
    """
    if self.depth not in BLOCKS:
      raise ValueError(
        f"depth is {self.depth}; it must be one of {tuple(BLOCKS)}"
      )
    if self.output_stride not in (8, 16, 32):
      raise ValueError(
        f"output_stride is {self.output_stride}; it must be 8, 16 or 32"
      )
    x = images.astype(self.dtype)
    x = ConvNorm(
      scaled_channels(64, width=self.width),
      kernel=7,
      stride=2,
      norm=self.norm,
      dtype=self.dtype,
      name="stem",
    )(x, train=train)
    x = nn.max_pool(
      nn.relu(x), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
    )

    block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
    stride, dilation = 4, 1
    features = {}
    stages = zip(BLOCKS[self.depth], STAGE_CHANNELS, strict=True)
    for stage, (blocks, channels) in enumerate(stages, start=2):
      step = 1 if stage == 2 else 2
      keep = stride * step > self.output_stride
      before = dilation
      if keep:
        dilation *= step
      else:
        stride *= step
      for i in range(blocks):
        x = block(
          channels=scaled_channels(channels, width=self.width),
          bottleneck=self.depth >= 50,
          stride=step if i == 0 and not keep else 1,
          first_dilation=before if i == 0 else dilation,
          dilation=dilation,
          norm=self.norm,
          dtype=self.dtype,
          name=f"res{stage}_{i}",
        )(x, train)
      features[f"res{stage}"] = x
    return features
