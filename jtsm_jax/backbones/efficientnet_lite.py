"""EfficientNet-Lite0 (Tan and Le, 2019; its Lite variant of 2020), a backbone.

The Lite variant drops squeeze-and-excitation, uses ReLU6 and scales neither the
stem nor the head. Batch norm always uses its stored statistics: the network is
a pretrained feature extractor (see `pretrained.load_efficientnet_lite0`).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jtsm_jax.backbones.frozen_norm import FrozenNorm
from jtsm_jax.types import Array

BATCH_NORM_EPSILON = 1e-3
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


@dataclasses.dataclass(frozen=True)
class Stage:
  """One row of EfficientNet-B0's table; `stride` is that of its first block."""

  kernel: int
  stride: int
  expansion: int
  channels: int
  blocks: int


STAGES = (
  Stage(kernel=3, stride=1, expansion=1, channels=16, blocks=1),
  Stage(kernel=3, stride=2, expansion=6, channels=24, blocks=2),
  Stage(kernel=5, stride=2, expansion=6, channels=40, blocks=2),
  Stage(kernel=3, stride=2, expansion=6, channels=80, blocks=3),
  Stage(kernel=5, stride=1, expansion=6, channels=112, blocks=3),
  Stage(kernel=5, stride=2, expansion=6, channels=192, blocks=4),
  Stage(kernel=3, stride=1, expansion=6, channels=320, blocks=1),
)


def normalise(images: Array) -> Array:
  """Maps uint8 RGB [..., 3] to the float32 that the weights expect, (-1, 1]."""
  xp = np if isinstance(images, np.ndarray) else jnp
  return (images.astype(xp.float32) - 127.0) / 128.0


def same_padding(
  size: int, kernel: int, *, stride: int = 1, dilation: int = 1
) -> tuple[int, int]:
  """TensorFlow's SAME padding of one axis: the odd pixel goes to the end.

  With stride 2 the padding depends on the parity of `size`, which is why the
  network cannot use a fixed padding.
  """
  span = (kernel - 1) * dilation + 1
  total = max((-(-size // stride) - 1) * stride + span - size, 0)
  return total // 2, total - total // 2


def depthwise_conv(
  x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1
) -> jax.Array:
  """Convolves every channel with its own kernel, with SAME padding.

  XLA's grouped convolution is many times slower on a CPU than a sum of
  shifted copies, so CPUs get the sum; accelerators keep the convolution.

  Args:
    x: [B, H, W, C] float.
    kernel: [k, k, C] float.
    stride: step of the output grid, cells.
    dilation: distance between the kernel's taps, cells.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), C] of x's dtype.
  """
  padding = tuple(
    same_padding(size, len(kernel), stride=stride, dilation=dilation)
    for size in x.shape[1:3]
  )

  def grouped(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel[:, :, None],
      window_strides=(stride, stride),
      padding=padding,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1],
    )

  def shifted(x, kernel):
    height, width = (-(-size // stride) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    total = jnp.zeros((), x.dtype)
    for i in range(kernel.shape[0]):
      for j in range(kernel.shape[1]):
        y0, x0 = i * dilation, j * dilation
        y1, x1 = y0 + (height - 1) * stride + 1, x0 + (width - 1) * stride + 1
        total += x[:, y0:y1:stride, x0:x1:stride] * kernel[i, j]
    return total

  return lax.platform_dependent(x, kernel, cpu=shifted, default=grouped)


class _DepthwiseConv(nn.Module):
  size: int
  stride: int
  dilation: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1])
    init = nn.initializers.normal(np.sqrt(2 / self.size**2))  # He, fan out
    kernel = self.param("kernel", init, shape)
    return depthwise_conv(
      x,
      kernel.astype(self.dtype),
      stride=self.stride,
      dilation=self.dilation,
    )


class _Block(nn.Module):
  """MBConv without squeeze-and-excitation: expand, depthwise, project."""

  kernel: int
  stride: int
  dilation: int
  expansion: int
  channels: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def pointwise(channels: int, name: str) -> nn.Dense:
      init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
      return nn.Dense(
        channels,
        use_bias=False,
        kernel_init=init,
        dtype=self.dtype,
        name=name,
      )

    y = x
    if self.expansion > 1:
      y = pointwise(self.expansion * x.shape[-1], "expand")(y)
      y = nn.relu6(
        FrozenNorm(BATCH_NORM_EPSILON, self.dtype, name="expand_norm")(y)
      )
    y = _DepthwiseConv(
      self.kernel, self.stride, self.dilation, self.dtype, name="depthwise"
    )(y)
    y = nn.relu6(
      FrozenNorm(BATCH_NORM_EPSILON, self.dtype, name="depthwise_norm")(y)
    )
    y = pointwise(self.channels, "project")(y)
    y = FrozenNorm(BATCH_NORM_EPSILON, self.dtype, name="project_norm")(y)
    return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
  """EfficientNet-Lite0, dilated to an output stride of 8, 16 or 32.

  A stride beyond `output_stride` becomes 1 and the kernels after it are
  dilated, so the coarse network's features are a subset of the fine one's
  cells.

  Attributes:
    output_stride: pixels per cell of the last stages.
    num_classes: adds the ImageNet classifier's "logits" where > 0.
    dtype: of the computation; parameters are float32.
    remat: compute what lies within blocks again in the backward pass, instead
      of keeping it.
  """

  output_stride: int = 16
  num_classes: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> dict[str, jax.Array]:
    """Computes the features of every stage.

    Args:
      images: [B, H, W, 3] float, RGB, as `normalise` gives them.
      train: has no effect: the statistics are always the stored ones.

    Returns:
      "stage1" .. "stage7": [B, h, w, c], linear outputs of the MBConv stages;
      "head": [B, h, w, 1280] in [0, 6]; h = ceil(H / stride of the stage), up
      to rounding in steps of 2. "logits": [B, num_classes] where asked for.

    Raises:
      ValueError: `output_stride` is not 8, 16 or 32.
    """
    del train
    if self.output_stride not in (8, 16, 32):
      raise ValueError(
        f"output_stride is {self.output_stride}; it must be 8, 16 or 32"
      )
    features = {}
    x = images.astype(self.dtype)
    x = nn.Conv(
      STEM_CHANNELS,
      (3, 3),
      strides=2,
      padding=[same_padding(size, 3, stride=2) for size in x.shape[1:3]],
      use_bias=False,
      dtype=self.dtype,
      name="stem",
    )(x)
    x = nn.relu6(
      FrozenNorm(BATCH_NORM_EPSILON, self.dtype, name="stem_norm")(x)
    )

    block = nn.remat(_Block) if self.remat else _Block
    stride, dilation, index = 2, 1, 0
    for number, stage in enumerate(STAGES, start=1):
      for i in range(stage.blocks):
        step = stage.stride if i == 0 else 1
        keep = stride * step > self.output_stride
        x = block(
          kernel=stage.kernel,
          stride=1 if keep else step,
          dilation=dilation,
          expansion=stage.expansion,
          channels=stage.channels,
          dtype=self.dtype,
          name=f"block{index}",
        )(x)
        index += 1
        if keep:
          dilation *= step  # for the blocks after this one
        else:
          stride *= step
      features[f"stage{number}"] = x

    x = nn.Dense(HEAD_CHANNELS, use_bias=False, dtype=self.dtype, name="head")(
      x
    )
    x = nn.relu6(
      FrozenNorm(BATCH_NORM_EPSILON, self.dtype, name="head_norm")(x)
    )
    features["head"] = x
    if self.num_classes:
      pooled = x.mean(axis=(1, 2))
      features["logits"] = nn.Dense(
        self.num_classes, dtype=self.dtype, name="classifier"
      )(pooled)
    return features
