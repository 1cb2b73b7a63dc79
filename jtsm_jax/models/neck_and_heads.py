"""The panoptic mining branch: neck, two-stream MIL head, refinement heads."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtsm_jax.models.mixed_precision import flat_product, wide_bias
from jtsm_jax.types import MiningOutputs

SCORE_EPSILON = 1e-6
"""Image scores keep this distance from 0 and 1: logarithms stay finite."""


class Neck(nn.Module):
  """Fully connected layers with ReLU and dropout; none with `widths = ()`.

  Attributes:
    widths: units of each layer; the authors have (4096, 4096).
    dropout: rate after each layer.
    input_dropout: rate on the pooled features themselves.
    share_input_dropout: all proposals of an image lose the same features, which
      is faster and keeps them comparable.
    dtype: of products and of the result; parameters are float32.
  """

  widths: tuple[int, ...] = (4096, 4096)
  dropout: float = 0.5
  input_dropout: float = 0.0
  share_input_dropout: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    keys: jax.Array | None = None,
    first: int | jax.Array = 0,
  ) -> jax.Array:
    """Maps [B, P, D] to [B, P, widths[-1]].

    Args:
      x: proposal features.
      keys: [B] random keys of the images, for dropout; None at test time.
      first: index of x[:, 0] among the image's proposals, where x is a part of
        them: each proposal has its own dropout, however they are divided.
    """
    # One stream of keys for the input and for each layer.
    streams = [None] * (1 + len(self.widths))
    if keys is not None:
      streams = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(key, len(streams)))(keys), 1, 0
      )
    x = dropout(
      streams[0],
      x,
      rate=self.input_dropout,
      first=first,
      shared=self.share_input_dropout,
    )
    for i, width in enumerate(self.widths):
      x = nn.Dense(
        width,
        kernel_init=nn.initializers.normal(0.005),
        bias_init=nn.initializers.constant(0.1),
        dtype=self.dtype,
        promote_dtype=wide_bias,
        dot_general=flat_product,
        name=f"fc{i + 1}",
      )(x)
      x = dropout(streams[i + 1], nn.relu(x), rate=self.dropout, first=first)
    return x.astype(self.dtype)


def dropout(
  keys: jax.Array | None,
  x: jax.Array,
  *,
  rate: float,
  first: int | jax.Array = 0,
  shared: bool = False,
) -> jax.Array:
  """Sets features to 0 with probability `rate`; the others make up for it.

  The keys are those of images, so that the result does not depend on how a
  batch is divided over devices and over the parts of a step.

  Args:
    keys: [B]; None changes nothing.
    x: [B, P, D].
    rate: in [0, 1).
    first: index of x[:, 0] among the image's proposals.
    shared: all proposals of an image lose the same features.
  """
  if keys is None or not rate:
    return x

  def kept(key: jax.Array) -> jax.Array:
    return jax.random.bernoulli(key, 1 - rate, x.shape[-1:])

  def of_image(key: jax.Array) -> jax.Array:
    if shared:
      return kept(key)[None]
    index = first + jnp.arange(x.shape[1])
    return jax.vmap(lambda i: kept(jax.random.fold_in(key, i)))(index)

  return jnp.where(jax.vmap(of_image)(keys), x / (1 - rate), 0)


class MiningHeads(nn.Module):
  """The MIL head (section 3.2) and n_r parallel refinement heads.

  Attributes:
    num_classes: K, things and stuff.
    num_refinements: n_r, 0 to any number; the paper has 4.
    zero_init: start the MIL head at zero, so that all proposals begin equal;
      otherwise Xavier, as the authors do.
    dtype: of what the products multiply; logits and parameters are float32.
  """

  num_classes: int
  num_refinements: int = 4
  zero_init: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array) -> MiningOutputs:
    """Scores proposals.

    Args:
      x: [B, P, D] proposal features.
      valid: [B, P] bool.
    """
    init = (
      nn.initializers.zeros
      if self.zero_init
      else nn.initializers.xavier_uniform()
    )
    # The sums are float32 and stay so: in bfloat16 the best proposals of a
    # class would have equal logits, and mining takes the best.
    dense = functools.partial(
      nn.Dense,
      dtype=self.dtype,
      promote_dtype=wide_bias,
      dot_general=functools.partial(
        flat_product, preferred_element_type=jnp.float32
      ),
    )
    classify = dense(self.num_classes, kernel_init=init, name="mil_classes")
    detect = dense(self.num_classes, kernel_init=init, name="mil_proposals")
    refinements = [
      dense(
        self.num_classes + 1,
        kernel_init=nn.initializers.normal(0.01),
        name=f"refinement_{r + 1}",
      )
      for r in range(self.num_refinements)
    ]
    scores = mil_scores(classify(x), detect(x), valid)
    return MiningOutputs(
      mil_scores=scores,
      image_scores=image_scores(scores),
      refinement_logits=tuple(head(x) for head in refinements),
    )


def mil_scores(
  classify: jax.Array, detect: jax.Array, valid: jax.Array
) -> jax.Array:
  """S^MIL: softmax over classes times softmax over the image's proposals.

  Args:
    classify: [B, P, K] logits of the classification stream, S^C.
    detect: [B, P, K] logits of the detection stream, S^D.
    valid: [B, P] bool; padded proposals get 0.

  Returns:
    [B, P, K] float32.
  """
  valid = valid[..., None]
  over_classes = jax.nn.softmax(classify.astype(jnp.float32), axis=2)
  # A finite floor: an image of padding alone must not give NaN.
  detect = jnp.where(valid, detect.astype(jnp.float32), -1e30)
  over_proposals = jax.nn.softmax(detect, axis=1)
  return jnp.where(valid, over_classes * over_proposals, 0.0)


def image_scores(scores: jax.Array) -> jax.Array:
  """y of Eq. 2: the sum of S^MIL over proposals, [B, P, K] to [B, K]."""
  return jnp.clip(scores.sum(1), SCORE_EPSILON, 1 - SCORE_EPSILON)


class TagHead(nn.Module):
  """Image-level tags from the globally pooled map, for the tag warm-up."""

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array, inside: jax.Array) -> jax.Array:
    """Tag logits.

    Args:
      features: [B, Hf, Wf, C].
      inside: [B, Hf, Wf] bool, cells that lie in the image.

    Returns:
      [B, K] float32 logits.
    """
    weight = inside[..., None].astype(jnp.float32)
    x = (features * weight).sum((1, 2)) / jnp.maximum(weight.sum((1, 2)), 1)
    return nn.Dense(self.num_classes)(x)
