"""The tag warm-up: a backbone that starts from scratch learns the tags.

It stands in for ImageNet weights where there are none, and is part of no paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jtsm_jax.losses import mil
from jtsm_jax.models.colours import coloured_images
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.train import random_keys
from jtsm_jax.train.objectives import Metrics
from jtsm_jax.train.state import TrainState, keep_if_finite
from jtsm_jax.types import Batch


def make_tag_step(
  key: jax.Array,
  model: JTSM,
  optimizer: optax.GradientTransformation,
  *,
  shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The jitted step of the tag warm-up: backbone and tag head learn the tags.

  Images are turned by quarters and have their colour channels shuffled: from
  scratch, a network learns too few tags without. A batch is not divided into
  parts here: batch norm looks at all of it.

  Args:
    key: of the run.
    model: the model.
    optimizer: of the warm-up.
    shardings: of the state; where XLA wants, without.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def tag_step(state: TrainState, batch: Batch):
    keys = random_keys.image_keys(
      key, state.step, batch.image_index, stream=random_keys.AUGMENT
    )
    images = augment(keys, coloured_images(batch), batch.size)

    def loss_fn(params):
      variables = {"params": params, **state.model_state}
      stages, updated = model.apply(
        variables, images, train=True, mutable=["batch_stats"], method="stages"
      )
      logits = model.apply(variables, stages, batch.size, method="tag_logits")
      valid = batch.image_index >= 0
      loss = mil.tag_loss(logits, batch.tags, valid=valid)
      accuracy = ((logits > 0) == (batch.tags > 0)).mean(1)
      metrics = {
        "loss/tags": loss,
        "tags/accuracy": mil.masked_mean(accuracy, valid),
      }
      return loss, (updated, metrics)

    grads, (updated, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = optax.tree.norm(grads), optax.tree.norm(params)
    metrics["gradient/norm"], metrics["params/norm"] = norms
    after = state.replace(
      step=state.step + 1,
      params=params,
      model_state=state.model_state | updated,
      opt_state=opt_state,
    )
    return keep_if_finite(norms, after, state, shardings=shardings), metrics

  return tag_step


def augment(keys: jax.Array, images: jax.Array, size: jax.Array) -> jax.Array:
  """Random quarter turns and colour-channel orders.

  Args:
    keys: [B] random keys of the images.
    images: [B, H, W, 3].
    size: [B, 2] int32; only an image that fills a square canvas is turned.
  """

  def one(key, image, size):
    turn, order = jax.random.split(key)
    image = image[..., jax.random.permutation(order, 3)]
    if image.shape[0] != image.shape[1]:
      return image
    turns = [lambda x, k=k: jnp.rot90(x, k) for k in range(4)]
    turned = jax.lax.switch(jax.random.randint(turn, (), 0, 4), turns, image)
    return jnp.where((size == image.shape[0]).all(), turned, image)

  return jax.vmap(one)(keys, images, size)
