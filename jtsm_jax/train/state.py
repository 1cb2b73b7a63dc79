"""Everything that a training run carries from one step to the next."""

from __future__ import annotations

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
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {"params": self.params, **self.model_state}


def create_state(
  key: jax.Array,
  model: JTSM,
  batch: Batch,
  optimizer: optax.GradientTransformation,
  *,
  pretrained: dict[str, Any] | None = None,
) -> TrainState:
  """Initialises a run.

  Args:
    key: random key.
    model: the model.
    batch: any batch with the shapes of the run.
    optimizer: of the first phase.
    pretrained: variables that replace the random ones; a part of the model's
      tree, such as {"params": {"neck": ...}}.

  Raises:
    InputError: `pretrained` has what the model has not, or not in that shape
      and dtype; the message lists every case.
  """
  variables = jax.jit(model.init)(key, batch)
  if pretrained is not None:
    variables = _replace(variables, pretrained)
  params = variables.pop("params")
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=variables,
    opt_state=optimizer.init(params),
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
