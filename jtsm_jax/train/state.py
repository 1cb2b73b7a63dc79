"""Everything that a training run carries from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.types import Batch, InputError


@flax.struct.dataclass
class TrainState:
  """The state of a run; all of it is saved in a checkpoint.

  Attributes:
    step: int32 scalar, updates done.
    params: trained (and frozen) parameters.
    model_state: collections that are not trained: "batch_stats" of norm layers
      and "constants" set by calibration.
    opt_state: of the optimizer of the present phase.
    ema: moving average of the parameters, or None.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  ema: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {"params": self.params, **self.model_state}

  @property
  def averaged_variables(self) -> dict[str, Any]:
    """The same with the averaged parameters."""
    return {"params": self.ema, **self.model_state}


def keep_if_finite(
  norms: tuple[jax.Array, ...],
  after: TrainState,
  before: TrainState,
  *,
  shardings: TrainState | None = None,
) -> TrainState:
  """The state after a step, or the one before it, the last good one.

  Args:
    norms: of the step's gradients, of its parameters; inf or NaN keeps
      `before`.
    after: the state with the step's update.
    before: the state without.
    shardings: where the result is to lie; where XLA wants, without.
  """
  finite = jnp.isfinite(jnp.stack(norms)).all()
  state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)
  if shardings is not None:
    state = jax.lax.with_sharding_constraint(state, shardings)
  return state


def initial_variables(
  key: jax.Array,
  model: JTSM,
  batch: Batch,
  *,
  pretrained: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """What `model.apply` takes, before any step.

  Args:
    key: random key.
    model: the model.
    batch: any batch with the shapes of the run.
    pretrained: variables that replace the random ones; a part of the model's
      tree, such as {"params": {"neck": ...}}.

  Raises:
    InputError: `pretrained` has what the model has not, or not in that shape
      and dtype; the message lists every case.
  """
  variables = jax.jit(model.init)(key, batch)
  if pretrained is not None:
    variables = _replace(variables, pretrained)
  return variables


def create_state(
  variables: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  *,
  step: int = 0,
  averages: bool = False,
) -> TrainState:
  """The state at the beginning of a phase.

  Args:
    variables: what `model.apply` takes.
    optimizer: of the phase.
    step: updates done before.
    averages: whether an average of the parameters begins here.
  """
  model_state = dict(variables)
  params = model_state.pop("params")
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.array, params) if averages else None,
  )


def _replace(variables: Any, given: dict[str, Any]) -> dict[str, Any]:
  """`variables` with the leaves that `given` has."""
  flat, new = (flax.traverse_util.flatten_dict(t) for t in (variables, given))
  faults = []
  for path, value in new.items():
    name = "/".join(path)
    if path not in flat:
      faults.append(f"{name} is not part of the model")
      continue
    found, wanted = (f"{x.dtype} {x.shape}" for x in (value, flat[path]))
    if found != wanted:
      faults.append(f"{name} is {found}, the model has {wanted}")
  if faults:
    raise InputError(
      "the pretrained weights do not fit the model of this configuration:\n  "
      + "\n  ".join(sorted(faults))
    )
  return flax.traverse_util.unflatten_dict(flat | new)
