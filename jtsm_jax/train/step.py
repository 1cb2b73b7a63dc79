"""The jitted pieces of a training step.

The loss is L_PM + L_IS + L_SS (Eq. 1). Its gradient is the sum of two parts,
because the masks that the second part learns from are re-estimated on the host
from segments that the first part mines:

    mining_gradients(state, batch)           -> grads of L_PM, mined segments
    re-estimation on host threads            -> pseudo masks
    branch_gradients(state, batch, masks)    -> grads of L_IS + L_SS
    apply_gradients(state, sum of both)      -> next state
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jtsm_jax.losses import mil, refinement, segmentation
from jtsm_jax.mining import labels
from jtsm_jax.models.colours import coloured_images
from jtsm_jax.models.instance_branch import MASK_SIZE
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.models.proposal_features import area_share
from jtsm_jax.train.state import TrainState
from jtsm_jax.types import Batch, Mined, PseudoMasks

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MiningSettings:
  """How segments are mined; the fields are those of `mining.labels.mine`."""

  num_things: int
  num_slots: int
  segments_per_thing: int = 1
  segments_per_stuff: int = 3
  score_ratio: float = 0.5
  foreground_iou: float = 0.5
  background_iou: tuple[float, float] = (0.0, 0.5)


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """How losses are reduced and what the instance branch learns from."""

  mil_reduction: str = "sum"
  refinement_reduction: str = "mean"
  instances_per_image: int = 64
  weight_instances: bool = True  # Eq. 9; the authors' code does not
  mask_stride: int = 4  # canvas pixels per cell of a pseudo mask


def mining_loss(
  model: JTSM,
  variables: Any,
  batch: Batch,
  key: jax.Array,
  *,
  mining: MiningSettings,
  losses: LossSettings,
) -> tuple[jax.Array, tuple[Mined, Metrics]]:
  """L_PM (Eq. 4) of a batch, and what the last head mines."""
  options = dataclasses.asdict(mining)
  # Norm layers keep the statistics of the warm-up: batches are small from now.
  features = model.apply(variables, batch, method="features")
  outputs = model.apply(
    variables,
    features,
    batch,
    train=True,
    method="mine",
    rngs={"dropout": key},
  )
  examples = batch.image_index >= 0
  loss = mil.mil_loss(
    outputs.image_scores,
    batch.tags,
    valid=examples,
    reduction=losses.mil_reduction,
  )
  metrics = {"loss/mil": loss}
  # Head r learns from the scores of the head before it; S^MIL is the first.
  scores = outputs.mil_scores
  for r, logits in enumerate(outputs.refinement_logits):
    mined = labels.mine(scores, outputs.image_scores, batch, **options)
    term = refinement.refinement_loss(
      logits, mined, valid=batch.valid, reduction=losses.refinement_reduction
    )
    metrics[f"loss/refinement_{r + 1}"] = term
    loss += term
    scores = jax.nn.softmax(logits)
  mined = labels.mine(scores, outputs.image_scores, batch, **options)
  metrics |= mining_metrics(mined, outputs.image_scores, batch)
  return loss, (mined, metrics)


def mining_metrics(
  mined: Mined, image_scores: jax.Array, batch: Batch
) -> Metrics:
  """What tells good mining from bad without any mask.

  The area of the mined segments matters most: a run that mines the tiniest or
  the largest proposals is lost, and its losses do not show it.
  """
  share = jax.vmap(area_share)(batch.superpixels, batch.membership)
  area = jnp.take_along_axis(share, mined.proposal, axis=1)
  predicted = (image_scores > 0.5).astype(jnp.float32)
  return {
    "tags/accuracy": mil.masked_mean(
      (predicted == batch.tags).mean(1), batch.image_index >= 0
    ),
    "mining/area": mil.masked_mean(area, mined.valid),
    "mining/score": mil.masked_mean(mined.score, mined.valid),
    "mining/positive": mil.masked_mean(
      (mined.label < batch.tags.shape[1]).astype(jnp.float32), batch.valid
    ),
  }


def branch_loss(
  model: JTSM,
  variables: Any,
  batch: Batch,
  mined: Mined,
  pseudo: PseudoMasks,
  key: jax.Array,
  *,
  num_things: int,
  losses: LossSettings,
) -> tuple[jax.Array, Metrics]:
  """L_IS + L_SS of a batch with re-estimated masks; absent branches add 0."""
  features = model.apply(variables, batch, method="features")
  loss = jnp.zeros(())
  metrics = {}
  if model.instance is not None:
    index, valid = segmentation.sample_instances(
      key,
      mined,
      batch.boxes,
      num_things=num_things,
      count=losses.instances_per_image,
    )

    def take(x):
      return jax.vmap(lambda row, i: row[i])(x, index)

    boxes, slot = take(batch.boxes), take(mined.slot)
    valid &= jnp.take_along_axis(pseudo.valid, slot, axis=1)
    targets = jax.vmap(
      lambda masks, slots, box: segmentation.instance_targets(
        masks, slots, box / losses.mask_stride, size=MASK_SIZE
      )
    )(pseudo.masks, slot, boxes)
    weight = take(mined.weight)
    term = segmentation.instance_loss(
      model.apply(variables, features, boxes, method="instance_logits"),
      targets,
      take(mined.label),
      weight if losses.weight_instances else jnp.ones_like(weight),
      valid,
    )
    metrics["loss/instance"] = term
    loss += term
  if model.semantic is not None:
    term = segmentation.semantic_loss(
      model.apply(variables, features, method="semantic_logits"),
      segmentation.semantic_targets(pseudo, mined, num_things=num_things),
    )
    metrics["loss/semantic"] = term
    loss += term
  return loss, metrics


def make_mining_gradients(
  key: jax.Array, model: JTSM, *, mining: MiningSettings, losses: LossSettings
) -> Callable[[TrainState, Batch], tuple[Any, Mined, Metrics]]:
  """The jitted first part of a step: gradients of L_PM and mined segments.

  Step t uses the random key `fold_in(key, t)`, here and in the other parts.
  """

  @jax.jit
  def mining_gradients(state: TrainState, batch: Batch):
    def function(params):
      return mining_loss(
        model,
        {"params": params, **state.model_state},
        batch,
        jax.random.fold_in(key, state.step),
        mining=mining,
        losses=losses,
      )

    grads, (mined, metrics) = jax.grad(function, has_aux=True)(state.params)
    return grads, mined, metrics

  return mining_gradients


def make_branch_gradients(
  key: jax.Array, model: JTSM, *, num_things: int, losses: LossSettings
) -> Callable[[TrainState, Batch, Mined, PseudoMasks], tuple[Any, Metrics]]:
  """The jitted second part of a step: gradients of L_IS + L_SS."""

  @jax.jit
  def branch_gradients(
    state: TrainState, batch: Batch, mined: Mined, pseudo: PseudoMasks
  ):
    def function(params):
      return branch_loss(
        model,
        {"params": params, **state.model_state},
        batch,
        mined,
        pseudo,
        jax.random.fold_in(key, state.step),
        num_things=num_things,
        losses=losses,
      )

    return jax.grad(function, has_aux=True)(state.params)

  return branch_gradients


def make_apply_gradients(
  optimizer: optax.GradientTransformation,
) -> Callable[..., TrainState]:
  """The jitted last part of a step; the old state's memory is given back."""

  @functools.partial(jax.jit, donate_argnums=0)
  def apply_gradients(state: TrainState, *grads: Any) -> TrainState:
    total = jax.tree.map(lambda *g: sum(g), *grads)
    updates, opt_state = optimizer.update(total, state.opt_state, state.params)
    return state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )

  return apply_gradients


def make_tag_step(
  key: jax.Array, model: JTSM, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The jitted step of the tag warm-up: backbone and tag head learn the tags.

  Images are turned by quarters and have their colour channels shuffled: from
  scratch, a network learns too few tags without.
  """

  @jax.jit
  def tag_step(state: TrainState, batch: Batch):
    step_key = jax.random.fold_in(key, state.step)
    images = augment(step_key, coloured_images(batch), batch.size)

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
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      model_state=state.model_state | updated,
      opt_state=opt_state,
    )
    return state, metrics

  return tag_step


def augment(key: jax.Array, images: jax.Array, size: jax.Array) -> jax.Array:
  """Random quarter turns and colour-channel orders.

  Args:
    key: random key.
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

  return jax.vmap(one)(jax.random.split(key, len(images)), images, size)
