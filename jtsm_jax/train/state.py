"""Everything that a training run carries from one step to the next."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.types import Batch


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
    pretrained: variables of the backbone ({"params", "batch_stats"}) that
      replace the random ones.
  """
  variables = jax.jit(model.init)(key, batch)
  params = variables.pop("params")
  if pretrained is not None:
    params["extractor"]["backbone"] = pretrained["params"]
    variables["batch_stats"]["extractor"]["backbone"] = pretrained[
      "batch_stats"
    ]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=variables,
    opt_state=optimizer.init(params),
  )
