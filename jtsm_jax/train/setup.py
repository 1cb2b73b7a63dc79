"""What stays the same from the first step of a run to its last.

And what follows from it: the batches from any step on, the state that a phase
begins with, and the form of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from jtsm_jax.data.pipeline import make_batch, make_pipeline, with_fallback
from jtsm_jax.data.prepared import PreparedData, RecordSource
from jtsm_jax.data.sampling import batch_plan
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.proposals.store import ProposalStore
from jtsm_jax.train import build, checkpoints, fields, origin
from jtsm_jax.train import step as step_parts
from jtsm_jax.train.calibrate import calibrate
from jtsm_jax.train.objectives import LossSettings, MiningSettings
from jtsm_jax.train.sharding import (
  make_mesh,
  place,
  put_batch,
  state_shardings,
)
from jtsm_jax.train.state import TrainState, create_state, initial_variables
from jtsm_jax.train.warm_up import make_tag_step
from jtsm_jax.types import Batch, Categories, InputError, Mined

BACKBONE = "(params|batch_stats)/extractor/backbone/"
"""Pattern of the paths of its variables."""


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run. Steps count through both of its phases: warm-up, then mining.

  Attributes:
    config: see configs/base.py.
    workdir: checkpoints, metrics and caches are kept here.
    source: the training split.
    store: proposals of its images.
    num_things: T.
    key: random key of the run.
    mesh: of the devices.
    model: the model.
    mining: how segments are mined.
    losses: how losses are reduced.
    example: a batch of one example, for shapes.
    abstract: shapes of the variables.
    warm_up_optimizer: of the first phase; None without.
    optimizer: of the second phase.
    warm_up_steps: of the first phase.
    branch_start: the step from which on the branches learn.
    last_step: where the run ends.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  source: RecordSource
  store: ProposalStore
  num_things: int
  key: jax.Array
  mesh: Mesh
  model: JTSM
  mining: MiningSettings
  losses: LossSettings
  example: Batch
  abstract: Any
  warm_up_optimizer: optax.GradientTransformation | None
  optimizer: optax.GradientTransformation
  warm_up_steps: int
  branch_start: int
  last_step: int

  def learns_branches(self, step: int) -> bool:
    """Whether the instance or the semantic branch learns in `step`."""
    branches = (self.model.instance, self.model.semantic)
    return step >= self.branch_start and any(b is not None for b in branches)

  # The jitted parts of a step, made once: what is traced for the estimate of
  # the memory need not be traced again.

  @functools.cached_property
  def tag_step(self):
    """A step of the warm-up, see `warm_up.make_tag_step`."""
    return make_tag_step(
      self.key,
      self.model,
      self.warm_up_optimizer,
      shardings=shardings(self, 0),
    )

  @functools.cached_property
  def extract_features(self):
    """See `step.make_extract_features`."""
    return step_parts.make_extract_features(self.model)

  @functools.cached_property
  def mining_gradients(self):
    """See `step.make_mining_gradients`."""
    return step_parts.make_mining_gradients(
      self.key,
      self.model,
      mining=self.mining,
      losses=self.losses,
      frozen=build.frozen_parameters(self.config),
      accumulation=self.config.train.accumulation,
      proposal_block=self.config.train.proposal_block,
    )

  @functools.cached_property
  def branch_gradients(self):
    """See `step.make_branch_gradients`."""
    return step_parts.make_branch_gradients(
      self.key,
      self.model,
      num_things=self.num_things,
      losses=self.losses,
      frozen=build.frozen_parameters(self.config),
      accumulation=self.config.train.accumulation,
    )

  @functools.cached_property
  def apply_gradients(self):
    """See `step.make_apply_gradients`."""
    return step_parts.make_apply_gradients(
      self.optimizer,
      ema_decay=self.config.train.ema_decay,
      ema_start=self.warm_up_steps,
      shardings=shardings(self, self.warm_up_steps),
    )


def set_up(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  data: PreparedData,
  store: ProposalStore,
) -> Setup:
  """Reads the configuration.

  Raises:
    InputError: a field is at fault.
  """
  source, num_things = data.splits["train"], data.categories.num_things
  warm_up_steps = config.warm_up.steps
  key = jax.random.key(config.seed)
  model = build.build_model(config, data.categories)
  mesh = mesh_of(config)
  (example,) = _first_images(config, source, store, count=1, at_a_time=1)
  abstract = jax.eval_shape(model.init, key, example)
  return Setup(
    config=config,
    workdir=workdir,
    source=source,
    store=store,
    num_things=num_things,
    key=key,
    mesh=mesh,
    model=model,
    mining=build.mining_settings(
      config, num_things=num_things, tags=source.tags
    ),
    losses=build.loss_settings(config),
    example=example,
    abstract=abstract,
    warm_up_optimizer=build.warm_up_optimizer(config, abstract["params"]),
    optimizer=build.main_optimizer(config, abstract["params"]),
    warm_up_steps=warm_up_steps,
    branch_start=warm_up_steps + config.reestimation.start,
    last_step=warm_up_steps + config.train.steps,
  )


def mesh_of(config: ml_collections.ConfigDict) -> Mesh:
  """Of the devices that share the batches of both phases; see `make_mesh`."""
  c, warm_up = config.train, config.warm_up
  return make_mesh(
    c.batch_size // c.accumulation,
    *([warm_up.batch_size] if warm_up.steps else []),
    model=c.model_parallel,
  )


def sizes_for_all_devices(config: ml_collections.ConfigDict) -> dict[str, int]:
  """The next larger batches that all devices share, by field; {} if they do."""
  c, warm_up = config.train, config.warm_up
  ways = jax.device_count() // c.model_parallel
  units = {"train.batch_size": (c.batch_size, ways * c.accumulation)}
  if warm_up.steps:
    units["warm_up.batch_size"] = (warm_up.batch_size, ways)
  return {
    field: -(-size // unit) * unit
    for field, (size, unit) in units.items()
    if size % unit
  }


def batches_from(
  setup: Setup, step: int, *, load_images: bool = True
) -> Iterator[Batch]:
  """This process's part of each batch, to the end of the phase of `step`.

  The batches are a pure function of the seed and the step.
  """
  return _batches(
    setup.config, setup.source, setup.store, step, load_images=load_images
  )


def _batches(
  config: ml_collections.ConfigDict,
  source: RecordSource,
  store: ProposalStore,
  step: int,
  *,
  load_images: bool = True,
) -> Iterator[Batch]:
  warms_up = step < config.warm_up.steps
  phase = config.warm_up if warms_up else config.train
  pipeline = make_pipeline(
    source,
    store,
    batch_size=phase.batch_size,
    start_step=step if warms_up else step - config.warm_up.steps,
    num_steps=phase.steps,
    load_images=load_images,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.train.loader_threads,
    num_workers=config.train.loader_workers,
    **_plan_options(config),
    **_size_options(config),
  )
  return (batch for _, batch in pipeline)


def _first_images(
  config: ml_collections.ConfigDict,
  source: RecordSource,
  store: ProposalStore,
  *,
  count: int,
  at_a_time: int,
) -> Iterator[Batch]:
  """The first images of the mining, the same for every process."""
  c = config.train
  get_proposals = with_fallback(store)
  for step in range(math.ceil(count / c.batch_size)):
    plan = batch_plan(
      step,
      sizes=source.sizes,
      batch_size=c.batch_size,
      **_plan_options(config),
    )
    stop = min(count - step * c.batch_size, c.batch_size)
    for start in range(0, stop, at_a_time):
      yield make_batch(
        plan.part(slice(start, min(start + at_a_time, stop))),
        source,
        get_proposals,
        **_size_options(config),
      )


def _plan_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """How batches are made up, beside their size."""
  return dict(
    seed=config.seed,
    canvases=fields.canvases(config, "data"),
    flip=config.data.flip,
    crop=config.data.crop,
    colour_factor=config.data.colour_factor,
  )


def _size_options(config: ml_collections.ConfigDict) -> dict[str, int]:
  return dict(
    max_proposals=config.proposals.max_proposals,
    max_superpixels=config.proposals.num_superpixels,
  )


def first_variables(setup: Setup, categories: Categories) -> dict[str, Any]:
  """What `model.apply` takes: random, pretrained, or from another run.

  Raises:
    InputError: see `build.load_pretrained` and `checkpoints.weights_from`; or
      the other run has other classes, and what belongs to them is not skipped.
  """
  config = setup.config
  if config.train.init_from:
    _check_classes(setup, categories)
  pretrained = build.load_pretrained(
    config,
    setup.workdir / "weights",
    backbone_anew=_starts_anew(setup, BACKBONE),
    neck_anew=_starts_anew(setup, "params/neck/"),
  )
  variables = initial_variables(
    setup.key, setup.model, setup.example, pretrained=pretrained
  )
  if config.train.init_from:
    variables = checkpoints.weights_from(
      pathlib.Path(config.train.init_from),
      variables,
      skip=tuple(config.train.init_skip),
    )
  return variables


def _check_classes(setup: Setup, categories: Categories) -> None:
  c = setup.config.train
  told = origin.told_by(checkpoints.checkpoint_at(pathlib.Path(c.init_from)))
  others = origin.other_classes(told, categories)
  owned = {x for kind in others for x in _owned_by(setup, categories, kind)}
  taken = [
    name
    for name in sorted(owned)
    if not checkpoints.is_skipped(name, tuple(c.init_skip))
  ]
  if taken:
    raise InputError(
      f"--init_from={c.init_from}: the weights are of other classes:"
      f" {', '.join(others.values())}. These arrays belong to them:\n  "
      + "\n  ".join(taken)
      + "\nTo start them anew, name them in config.train.init_skip, such as"
      " \"('params/heads/',)\"; or give the classes of that run, in their order"
    )


def _owned_by(setup: Setup, categories: Categories, kind: str) -> list[str]:
  """Paths of the arrays that grow with the number of "things" or "stuff"."""
  one = {"id": 0, "name": "", "isthing": kind == "things"}
  more = Categories.from_list([*categories.to_list(), one])
  model = build.build_model(setup.config, more)
  grown = jax.eval_shape(model.init, setup.key, setup.example)
  a, b = (flatten_dict(tree, sep="/") for tree in (setup.abstract, grown))
  return [name for name in a if a[name].shape != b[name].shape]


def _starts_anew(setup: Setup, part: str) -> bool:
  """Whether any array of a part of the model is not another run's.

  Args:
    setup: the run.
    part: a pattern of paths; False where the model has no such part.
  """
  c = setup.config.train
  return any(
    not c.init_from or checkpoints.is_skipped(name, tuple(c.init_skip))
    for name in map("/".join, flatten_dict(setup.abstract))
    if re.match(part, name)
  )


def begin(setup: Setup, variables: Any, step: int) -> TrainState:
  """Enters the phase of `step`: calibrates, and places the state.

  Args:
    setup: the run.
    variables: what `model.apply` takes, whole, on this host.
    step: 0, or the first one of the mining.
  """
  if step == setup.warm_up_steps:
    variables = _calibrated(setup, variables)
  state = jax.device_get(_new_state(setup, variables, step))
  return place(state, shardings(setup, step))


def _calibrated(setup: Setup, variables: Any) -> Any:
  """Sets the constants that are not another run's, or no more fit what is."""
  anew = functools.partial(_starts_anew, setup)
  # Each is computed from what the one before has made.
  backbone = setup.warm_up_steps > 0 or anew(BACKBONE)
  projection = backbone or anew("constants/extractor/")
  center = projection or anew("constants/")
  if "constants" not in setup.abstract or not center:
    return variables
  variables = calibrate(
    setup.model,
    jax.device_put(variables),  # once, not with every batch
    list(_calibration_batches(setup)),
    seed=setup.config.seed,
    projection=projection,
  )
  # Hosts of other kinds round otherwise, and axes of like weight turn freely.
  constants = broadcast_one_to_all(variables["constants"])
  return {**variables, "constants": constants}


def _calibration_batches(setup: Setup) -> Iterator[Batch]:
  """So many images at a time as a device has."""
  c = setup.config.train
  return _first_images(
    setup.config,
    setup.source,
    setup.store,
    count=min(c.calibration_images, c.steps * c.batch_size),
    at_a_time=c.batch_size // c.accumulation // setup.mesh.shape["data"],
  )


def _new_state(setup: Setup, variables: Any, step: int) -> TrainState:
  if step < setup.warm_up_steps:
    return create_state(variables, setup.warm_up_optimizer, step=step)
  return create_state(
    variables,
    setup.optimizer,
    step=step,
    averages=bool(setup.config.train.ema_decay),
  )


def shapes(setup: Setup, step: int) -> TrainState:
  """The shapes of the state before `step`."""
  return jax.eval_shape(lambda v: _new_state(setup, v, step), setup.abstract)


def shardings(setup: Setup, step: int) -> TrainState:
  """Where the state before `step` lies."""
  return state_shardings(
    shapes(setup, step),
    setup.mesh,
    divide_optimizer=setup.config.train.divide_optimizer,
  )


def checkpoint_template(
  setup: Setup, step: int
) -> tuple[TrainState, list[Mined]]:
  """What the checkpoint before `step` holds: state, segments in flight."""
  # The last one of the warm-up is as that has left it, see `begin`.
  phase = step - 1 if step == setup.warm_up_steps > 0 else step
  state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    shapes(setup, phase),
    shardings(setup, phase),
  )
  flying = 0
  if setup.learns_branches(step):
    lag = setup.config.reestimation.lag
    flying = min(step - setup.branch_start, lag)
  rows = setup.config.train.batch_size // jax.process_count()
  slots = (rows, setup.mining.num_slots)
  proposals = (rows, setup.example.valid.shape[1])
  mined = Mined(
    proposal=np.zeros(slots, np.int32),
    category=np.zeros(slots, np.int32),
    score=np.zeros(slots, np.float32),
    valid=np.zeros(slots, bool),
    label=np.zeros(proposals, np.int32),
    weight=np.zeros(proposals, np.float32),
    slot=np.zeros(proposals, np.int32),
  )
  return state, [put_batch(mined, setup.mesh)] * flying
