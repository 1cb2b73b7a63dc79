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

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.train import random_keys
from jtsm_jax.train.accumulation import accumulate
from jtsm_jax.train.objectives import (
  BranchTargets,
  LossSettings,
  Metrics,
  MiningSettings,
  branch_counts,
  branch_loss,
  branch_targets,
  mining_counts,
  mining_loss,
  mining_metrics,
)
from jtsm_jax.train.state import TrainState, keep_if_finite
from jtsm_jax.types import Batch, Mined, PseudoMasks


def make_extract_features(model: JTSM) -> Callable[[Any, Batch], Batch]:
  """The jitted pass of a frozen backbone, done once for both parts of a step.

  Returns:
    A function of (variables, batch), which gives the batch features in place of
    images.
  """

  @jax.jit
  def extract_features(variables: Any, batch: Batch) -> Batch:
    features = model.apply(variables, batch, method="features")
    return batch.replace(images=None, colour=None, features=features)

  return extract_features


def stop_gradients(params: Any, patterns: tuple[str, ...]) -> Any:
  """Parameters some of which have a gradient of 0, and cost none.

  Where the first stages are stopped, none of the backward pass is done there.

  Args:
    params: tree of arrays.
    patterns: regular expressions of the paths ("neck/fc1/kernel") of those,
      matched from the start.
  """

  def stop(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    stopped = any(re.match(p, name) for p in patterns)
    return jax.lax.stop_gradient(array) if stopped else array

  return jax.tree_util.tree_map_with_path(stop, params)


def make_mining_gradients(
  key: jax.Array,
  model: JTSM,
  *,
  mining: MiningSettings,
  losses: LossSettings,
  frozen: tuple[str, ...] = (),
  accumulation: int = 1,
  proposal_block: int = 0,
) -> Callable[[TrainState, Batch], tuple[Any, Mined, Metrics]]:
  """The jitted first part of a step: gradients of L_PM and mined segments.

  Args:
    key: of the run.
    model: the model.
    mining: how segments are mined.
    losses: how losses are reduced.
    frozen: patterns of parameters that do not learn, see `stop_gradients`.
    accumulation: parts of a batch that follow one another; the result is the
      same.
    proposal_block: see `objectives.mining_loss`.
  """

  @jax.jit
  def mining_gradients(state: TrainState, batch: Batch):
    keys = random_keys.dropout_keys(key, state.step, batch.image_index)
    counts = mining_counts(batch)

    def gradients(part: tuple[Batch, random_keys.DropoutKeys]):
      def function(params):
        return mining_loss(
          model,
          {"params": stop_gradients(params, frozen), **state.model_state},
          *part,
          counts=counts,
          mining=mining,
          losses=losses,
          proposal_block=proposal_block,
        )

      grads, (metrics, *rows) = jax.grad(function, has_aux=True)(state.params)
      return (grads, metrics), rows

    (grads, metrics), (mined, image_scores) = accumulate(
      gradients, (batch, keys), parts=accumulation
    )
    return grads, mined, metrics | mining_metrics(mined, image_scores, batch)

  return mining_gradients


def make_branch_gradients(
  key: jax.Array,
  model: JTSM,
  *,
  num_things: int,
  losses: LossSettings,
  frozen: tuple[str, ...] = (),
  accumulation: int = 1,
) -> Callable[[TrainState, Batch, Mined, PseudoMasks], tuple[Any, Metrics]]:
  """The jitted second part of a step: gradients of L_IS + L_SS.

  Args:
    key: of the run.
    model: the model.
    num_things: T.
    losses: how losses are reduced.
    frozen: see `make_mining_gradients`.
    accumulation: see `make_mining_gradients`.
  """

  @jax.jit
  def branch_gradients(
    state: TrainState, batch: Batch, mined: Mined, pseudo: PseudoMasks
  ):
    keys = random_keys.image_keys(
      key, state.step, batch.image_index, stream=random_keys.INSTANCES
    )
    targets = branch_targets(
      model, batch, mined, pseudo, keys, num_things=num_things, losses=losses
    )
    counts = branch_counts(targets)

    def gradients(part: tuple[Batch, BranchTargets]):
      def function(params):
        stopped = stop_gradients(params, frozen)
        variables = {"params": stopped, **state.model_state}
        return branch_loss(model, variables, *part, counts=counts)

      return jax.grad(function, has_aux=True)(state.params), ()

    sums, _ = accumulate(gradients, (batch, targets), parts=accumulation)
    return sums

  return branch_gradients


def make_apply_gradients(
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_start: int = 0,
  shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The jitted last part of a step; the old state's memory is given back.

  Gradients or parameters that are not finite leave the state as it is, the step
  included, and show in the metrics "gradient/norm" and "params/norm".

  Args:
    optimizer: of the phase.
    ema_decay: of the moving average of the parameters, where the state has one.
      It is smaller in the first steps: (1 + t) / (10 + t) after t of them.
    ema_start: the step in which the average began.
    shardings: of the state; where XLA wants, without.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def apply_gradients(state: TrainState, *grads: Any):
    total = jax.tree.map(lambda *g: sum(g), *grads)
    norm = optax.tree.norm(total)
    updates, opt_state = optimizer.update(total, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      t = state.step - ema_start
      share = 1 - jnp.minimum(ema_decay, (1 + t) / (10 + t))
      ema = jax.tree.map(
        lambda old, new: old + share * (new - old), ema, params
      )
    after = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state, ema=ema
    )
    metrics = {"gradient/norm": norm, "params/norm": optax.tree.norm(params)}
    norms = tuple(metrics.values())
    return keep_if_finite(norms, after, state, shardings=shardings), metrics

  return apply_gradients
