"""The instance segmentation branch (section 3.4): a mask for each thing box."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jtsm_jax.models.mixed_precision import flat_product, wide_bias

MASK_SIZE = 28


class Deconvolution(nn.Module):
  """flax.linen.ConvTranspose of 2 x 2 and stride 2: twice the height and width.

  Its windows do not overlap, so it is one matrix product, whose results are put
  in their places. XLA for CPUs multiplies the zeros between the cells as well,
  and takes more time for this layer than for the rest of the branch.

  Attributes:
    channels: of the result.
    kernel_init: initialiser of the kernel, [2, 2, C, channels].
    dtype: of products; parameters are float32.
  """

  channels: int
  kernel_init: nn.initializers.Initializer
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, C] to [N, 2 H, 2 W, channels]."""
    n, height, width, depth = x.shape
    kernel = self.param(
      "kernel", self.kernel_init, (2, 2, depth, self.channels)
    )
    bias = self.param("bias", nn.initializers.zeros, (self.channels,))
    x, kernel, bias = wide_bias(x, kernel, bias, dtype=self.dtype)
    # As in ConvTranspose, the last row of the kernel makes the first of two.
    kernel = kernel[::-1, ::-1].transpose(2, 0, 1, 3)
    x = x.reshape(-1, depth) @ kernel.reshape(depth, -1)
    x = x.reshape(n, height, width, 2, 2, self.channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, 2 * height, 2 * width, self.channels) + bias


class InstanceBranch(nn.Module):
  """RoIAlign 14 x 14, 4 convolutions, a deconvolution, one mask per class.

  Attributes:
    num_things: T.
    channels: of the convolutions; the paper has 256.
    num_convs: the paper has 4.
    stride: pixels per cell of the feature map.
    sampling_ratio: of RoIAlign, see `pallas_kernels.roi_align`.
    dtype: of products; parameters are float32.
  """

  num_things: int
  channels: int = 256
  num_convs: int = 4
  stride: int = 8
  sampling_ratio: int | None = 2
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, boxes: jax.Array) -> jax.Array:
    """Mask logits of boxes.

    Args:
      features: [B, Hf, Wf, C].
      boxes: [B, N, 4] float32, canvas pixels.

    Returns:
      [B, N, 28, 28, T] float32 logits in the frame of each box.
    """
    align = functools.partial(
      pk.roi_align,
      stride=self.stride,
      output_size=(14, 14),
      sampling_ratio=self.sampling_ratio,
    )
    x = jax.vmap(align)(features, boxes)
    lead = x.shape[:2]
    x = x.reshape(-1, *x.shape[2:])
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    for i in range(self.num_convs):
      conv = nn.Conv(
        self.channels,
        (3, 3),
        kernel_init=init,
        dtype=self.dtype,
        promote_dtype=wide_bias,
        name=f"conv{i + 1}",
      )
      x = nn.relu(conv(x))
    deconv = Deconvolution(
      self.channels, kernel_init=init, dtype=self.dtype, name="deconv"
    )
    x = nn.relu(deconv(x))
    x = nn.Dense(
      self.num_things,
      kernel_init=nn.initializers.normal(0.001),
      dtype=self.dtype,
      promote_dtype=wide_bias,
      dot_general=flat_product,
      name="predictor",
    )(x)
    return x.reshape(*lead, *x.shape[1:]).astype(jnp.float32)
