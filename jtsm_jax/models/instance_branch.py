"""The instance segmentation branch (section 3.4): a mask for each thing box."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jtsm_jax.models.mixed_precision import flat_product, wide_bias

MASK_SIZE = 28


class InstanceBranch(nn.Module):
  """RoIAlign 14 x 14, 4 convolutions, a deconvolution, one mask per class.

  Attributes:
    num_things: T.
    channels: of the convolutions; the paper has 256.
    num_convs: the paper has 4.
    stride: pixels per cell of the feature map.
    dtype: of products; parameters are float32.
  """

  num_things: int
  channels: int = 256
  num_convs: int = 4
  stride: int = 8
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
    x = jax.vmap(
      lambda f, b: pk.roi_align(f, b, stride=self.stride, output_size=(14, 14))
    )(features, boxes)
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
    deconv = nn.ConvTranspose(
      self.channels,
      (2, 2),
      strides=(2, 2),
      kernel_init=init,
      dtype=self.dtype,
      promote_dtype=wide_bias,
      name="deconv",
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
