"""The semantic segmentation branch (section 3.4): stuff, pixel by pixel."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtsm_jax.models.mixed_precision import flat_product, wide_bias


class SemanticBranch(nn.Module):
  """Two 3 x 3 convolutions and a 1 x 1 on the full-image feature map.

  Attributes:
    num_stuff: stuff classes; the output has one channel more, 0 = a thing.
    channels: of the convolutions; the paper has 256.
    dtype: of products; parameters are float32.
  """

  num_stuff: int
  channels: int = 256
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps [B, Hf, Wf, C] to logits [B, Hf, Wf, 1 + num_stuff] float32."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    x = features
    for i in range(2):
      conv = nn.Conv(
        self.channels,
        (3, 3),
        kernel_init=init,
        dtype=self.dtype,
        promote_dtype=wide_bias,
        name=f"conv{i + 1}",
      )
      x = nn.relu(conv(x))
    x = nn.Dense(
      1 + self.num_stuff,
      kernel_init=nn.initializers.normal(0.01),
      dtype=self.dtype,
      promote_dtype=wide_bias,
      dot_general=flat_product,
      name="predictor",
    )(x)
    return x.astype(jnp.float32)
