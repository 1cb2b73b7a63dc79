"""The training run, from the first step to the last, as one straight line."""

from __future__ import annotations

import collections
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from jtsm_jax.console import progress, say
from jtsm_jax.data.pipeline import make_pipeline, with_fallback
from jtsm_jax.data.prepared import PreparedData, RecordSource
from jtsm_jax.proposals.store import ProposalStore
from jtsm_jax.train import build, checkpoints, reestimation
from jtsm_jax.train import step as step_parts
from jtsm_jax.train.calibrate import calibrate
from jtsm_jax.train.feature_cache import FeatureCache
from jtsm_jax.train.metrics import MetricWriter
from jtsm_jax.train.sharding import make_mesh, put_batch, replicated
from jtsm_jax.train.state import TrainState, create_state
from jtsm_jax.types import Batch, InputError, Mined

Pictures = dict[str, np.ndarray]
Evaluate = Callable[[TrainState], tuple[dict[str, float], Pictures]]
ShowMined = Callable[[Batch, Mined, reestimation.Futures | None], Pictures]


def train(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  data: PreparedData,
  store: ProposalStore,
  evaluate: Evaluate | None = None,
  show_mined: ShowMined | None = None,
) -> TrainState:
  """Trains, or goes on training, in `workdir`.

  Reads images, tags and proposals; no mask and no box.

  Args:
    config: see configs/base.py.
    workdir: checkpoints, metrics and caches are kept here.
    data: the split "train" is read.
    store: proposals of its images.
    evaluate: called every `config.train.evaluate_every` steps; returns metrics,
      whose first one decides the best checkpoint, and pictures.
    show_mined: called every `config.train.images_every` steps and in the last
      one, with a batch, its mined segments and, with branches, the futures of
      their masks; returns pictures.

  Returns:
    The state after the last step.

  Raises:
    InputError: a field of `config` is at fault, no checkpoint can be read, or
      there are several processes.
  """
  if jax.process_count() > 1:
    raise InputError(
      f"there are {jax.process_count()} processes; training runs in one "
      "process so far, on all devices of its machine"
    )
  source = data.splits["train"]
  categories = data.categories
  warm_up_steps = config.warm_up.steps
  last_step = warm_up_steps + config.train.steps
  key = jax.random.key(config.seed)

  # The model and its settings.
  model = build.build_model(config, categories)
  losses = build.loss_settings(config)
  mining = build.mining_settings(
    config, num_things=categories.num_things, tags=source.tags
  )

  # Input: the batches are a pure function of the step, in each phase.
  def pipeline(step: int, *, start: int = 0, load_images: bool = True):
    warming_up = step < warm_up_steps
    return make_pipeline(
      source,
      store,
      seed=config.seed,
      canvases=build.canvases(config, "data"),
      batch_size=(config.warm_up if warming_up else config.train).batch_size,
      max_proposals=config.proposals.max_proposals,
      max_superpixels=config.proposals.num_superpixels,
      start_step=start,
      num_steps=warm_up_steps if warming_up else config.train.steps,
      load_images=load_images,
      flip=config.data.flip,
      crop=config.data.crop,
      colour_factor=config.data.colour_factor,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=config.train.loader_threads,
      num_workers=config.train.loader_workers,
    )

  # State: a new one, or the newest checkpoint of the workdir.
  mesh = make_mesh(
    config.train.batch_size,
    *([config.warm_up.batch_size] if warm_up_steps else []),
  )
  example = jax.tree.map(lambda x: x[:1], next(pipeline(last_step))[1])
  pretrained = build.load_pretrained(config, workdir / "weights")
  abstract = jax.eval_shape(model.init, key, example)
  warm_up_optimizer = build.warm_up_optimizer(config, abstract["params"])
  optimizer = build.main_optimizer(config, abstract["params"])
  is_cached = build.caches_features(
    config, model, abstract, source, split="train"
  )

  def batches_from(step: int):
    loads = step < warm_up_steps or not is_cached
    return pipeline(step, load_images=loads)

  def new_state(step: int) -> TrainState:
    return create_state(
      key,
      model,
      example,
      warm_up_optimizer if step < warm_up_steps else optimizer,
      pretrained=pretrained,
    )

  def begin_mining(state: TrainState) -> TrainState:
    batches = pipeline(last_step)
    count = -(-config.train.calibration_images // config.train.batch_size)
    batches = [next(batches)[1] for _ in range(min(count, config.train.steps))]
    state = calibrate(model, state, batches, seed=config.seed)
    state = state.replace(opt_state=optimizer.init(state.params))
    # Placed as the steps leave it, or every part would be compiled twice.
    return jax.device_put(state, replicated(mesh))

  has_branches = model.instance is not None or model.semantic is not None
  branch_start = warm_up_steps + config.reestimation.start
  lag = config.reestimation.lag

  def checkpoint_template(step: int):
    flying = min(max(step - branch_start, 0), lag) if has_branches else 0

    def place(tree):
      return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=replicated(mesh)
        ),
        tree,
      )

    state = jax.eval_shape(lambda: new_state(step))
    mined = mined_zeros(config.train.batch_size, mining.num_slots, example)
    return place(state), [place(mined)] * flying, batches_from(step)

  manager = checkpoints.open_checkpoints(workdir / "checkpoints")
  restored = checkpoints.restore_latest(manager, checkpoint_template)
  if restored is None:
    state, waiting, batches = new_state(0), [], batches_from(0)
    if not warm_up_steps:
      state = begin_mining(state)
    state = jax.device_put(state, replicated(mesh))
  else:
    state, waiting, batches = restored
    if int(state.step) < last_step:
      print(f"train: going on from step {int(state.step)} of {last_step}")
  first_step = int(state.step)

  # The jitted parts of a step, and what serves them on the host.
  tag_step = step_parts.make_tag_step(key, model, warm_up_optimizer)
  mining_gradients = step_parts.make_mining_gradients(
    key, model, mining=mining, losses=losses
  )
  branch_gradients = step_parts.make_branch_gradients(
    key, model, num_things=categories.num_things, losses=losses
  )
  apply_gradients = step_parts.make_apply_gradients(optimizer)
  reestimator = build.open_reestimator(config, workdir, source, store)
  submit = functools.partial(
    reestimation.submit,
    reestimator,
    source=source,
    get_proposals=with_fallback(store),
  )

  def open_cache(state: TrainState) -> FeatureCache | None:
    return build.open_feature_cache(
      config, workdir, model, state.variables, source, split="train"
    )

  cache = open_cache(state) if first_step >= warm_up_steps else None
  in_flight = collections.deque()
  for i, mined in enumerate(waiting):
    mined_at = first_step - len(waiting) + i
    _, batch = next(pipeline(mined_at, start=mined_at - warm_up_steps))
    batch = cache.attach(batch) if cache else batch
    in_flight.append((batch, mined, submit(batch, mined)))

  # The steps.
  writer = MetricWriter(workdir, active=jax.process_index() == 0)
  writer.truncate_after(first_step)
  if not first_step:
    best = {"panoptic": "pq", "instance": "map50", "detection": "map"}
    measures = [f"val/{best[config.task]}"] if evaluate else []
    settings = flatten_dict(config.to_dict(), sep=".")
    writer.describe(settings, measures=["loss/total", *measures])
  meter = Meter()
  bar = progress(
    description="train", total=last_step, initial=first_step, unit="step"
  )
  for step in range(first_step, last_step):
    if step == branch_start > 0 and has_branches:
      say(f"train: from step {step} on the branches learn; steps take longer")
    _, batch = next(batches)
    meter.count(len(batch.image_index) * jax.process_count())
    if step < warm_up_steps:
      with jax.set_mesh(mesh):
        state, metrics = tag_step(state, put_batch(batch, mesh))
      if step + 1 == warm_up_steps:
        state, batches = begin_mining(state), batches_from(last_step)
        cache = open_cache(state)
    else:
      batch = cache.attach(batch) if cache else batch
      device_batch = put_batch(batch, mesh)
      with jax.set_mesh(mesh):
        grads, mined, metrics = mining_gradients(state, device_batch)
      grads, mined, futures = [grads], jax.device_get(mined), None
      if has_branches and step >= branch_start:
        in_flight.append((batch, mined, submit(batch, mined)))
        if len(in_flight) > lag:
          batch, mined, futures = in_flight.popleft()
          pseudo = reestimation.collect(
            futures, batch, mask_stride=losses.mask_stride
          )
          with jax.set_mesh(mesh):
            branch_grads, branch_metrics = branch_gradients(
              state, *put_batch((batch, mined, pseudo), mesh)
            )
          grads.append(branch_grads)
          metrics |= branch_metrics
      state = apply_gradients(state, *grads)
      if show_mined is not None and (
        (step + 1) % config.train.images_every == 0 or step + 1 == last_step
      ):
        writer.write_images(step + 1, show_mined(batch, mined, futures))
    meter.add(metrics)
    bar.update()

    done = step + 1
    if done % config.train.log_every == 0 or done == last_step:
      values = meter.read()
      check_finite(values, step=done, batch=batch, source=source)
      if has_branches:
        values["reestimation/queue"] = reestimator.queue_depth
        values["reestimation/hits"] = reestimator.hits
        values["reestimation/misses"] = reestimator.misses
      writer.write(done, values)
      bar.set_postfix_str(summary(values), refresh=False)
    evaluated = None
    if evaluate is not None and (
      done % config.train.evaluate_every == 0
      and warm_up_steps < done < last_step
    ):
      evaluated, pictures = evaluate(state)
      writer.write(done, {f"val/{k}": v for k, v in evaluated.items()})
      writer.write_images(done, pictures)
    if (
      done % config.train.checkpoint_every == 0
      or evaluated is not None
      or done == last_step
    ):
      check_finite(metrics, step=done, batch=batch, source=source)
      checkpoints.save(
        manager,
        state,
        [mined for _, mined, _ in in_flight],
        batches,
        score=evaluated and next(iter(evaluated.values())),
      )
  bar.close()
  reestimator.close()
  writer.close()
  manager.close()
  return state


class Meter:
  """Means of the metrics since they were last read, and images per second."""

  def __init__(self):
    self._reset()

  def _reset(self):
    self._start = time.monotonic()
    self._images = 0
    self._sums = {}

  def count(self, images: int) -> None:
    """Notes that `images` more were trained on."""
    self._images += images

  def add(self, metrics: dict[str, jax.Array]) -> None:
    """Adds the metrics of a step, which stay on the device."""
    for name, value in metrics.items():
      total, number = self._sums.get(name, (0.0, 0))
      self._sums[name] = (total + value, number + 1)

  def read(self) -> dict[str, float]:
    """The means, with the total loss and the speed; starts afresh."""
    values = {k: float(v) / n for k, (v, n) in self._sums.items()}
    values["loss/total"] = sum(
      v for k, v in values.items() if k.startswith("loss/")
    )
    seconds = time.monotonic() - self._start
    values["speed/images_per_second"] = self._images / max(seconds, 1e-9)
    self._reset()
    return values


def summary(values: dict[str, float]) -> str:
  """The loss terms and the speed, for the progress line."""
  terms = {
    k.removeprefix("loss/"): v for k, v in values.items() if "loss/" in k
  }
  line = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
  return f"{line} | {values['speed/images_per_second']:.1f} images/s"


def check_finite(
  metrics: dict[str, jax.Array | float],
  *,
  step: int,
  batch: Batch,
  source: RecordSource,
) -> None:
  """Stops a run whose loss is not a number any more, before it is saved.

  Raises:
    FloatingPointError: names the step, the values and the last images.
  """
  losses = {k: float(v) for k, v in metrics.items() if k.startswith("loss/")}
  if not np.isfinite(list(losses.values())).all():
    ids = [source.image_ids[i] for i in batch.image_index if i >= 0]
    raise FloatingPointError(
      f"the loss is not finite at step {step}: {losses}; the last images were "
      f"{ids}. The checkpoint before it is kept; try a lower "
      "--config.train.learning_rate"
    )


def mined_zeros(batch_size: int, num_slots: int, example: Batch) -> Mined:
  """A `Mined` of the shapes of a run."""
  slots = (batch_size, num_slots)
  proposals = (batch_size, example.valid.shape[1])
  return Mined(
    proposal=np.zeros(slots, np.int32),
    category=np.zeros(slots, np.int32),
    score=np.zeros(slots, np.float32),
    valid=np.zeros(slots, bool),
    label=np.zeros(proposals, np.int32),
    weight=np.zeros(proposals, np.float32),
    slot=np.zeros(proposals, np.int32),
  )
