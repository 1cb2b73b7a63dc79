"""A classifier of the cells of the feature map; part of no paper."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtsm_jax.models.mixed_precision import flat_product, wide_bias
from jtsm_jax.models.neck_and_heads import dropout


class CellHead(nn.Module):
  """One linear layer: which class each cell of the feature map belongs to.

  It learns from tags by expectation-maximisation, see `mining.cells`.

  Attributes:
    num_classes: K, things and stuff.
    dropout: rate on the features.
    gain: factor on the logits. As large a step of the parameters changes the
      logits so much more: beside heads that see the features of whole segments
      the layer would be slow.
    dtype: of what the product multiplies; logits and parameters are float32.
  """

  num_classes: int
  dropout: float = 0.5
  gain: float = 10.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, features: jax.Array, *, keys: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, Hf, Wf, C] to logits [B, Hf, Wf, K] float32.

    Args:
      features: the feature map.
      keys: [B] random keys of the images, for dropout; None at test time.
    """
    batch, *_, channels = features.shape  # a symbol, in an export
    cells = features.reshape(batch, -1, channels)
    cells = dropout(keys, cells, rate=self.dropout)
    logits = nn.Dense(
      self.num_classes,
      # Not zero: expectation-maximisation begins from differences.
      kernel_init=nn.initializers.normal(0.001),
      dtype=self.dtype,
      promote_dtype=wide_bias,
      dot_general=functools.partial(
        flat_product, preferred_element_type=jnp.float32
      ),
      name="classify",
    )(cells)
    return self.gain * logits.reshape(*features.shape[:3], self.num_classes)
