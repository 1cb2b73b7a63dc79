"""The training run, from the first step to the last, as one straight line."""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.experimental.multihost_utils import broadcast_one_to_all

from jtsm_jax.console import progress, say
from jtsm_jax.data.pipeline import with_fallback
from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.proposals.store import ProposalStore
from jtsm_jax.train import caches, checkpoints, origin, reestimation, setup
from jtsm_jax.train.cost import matmul_flops, peak_flops
from jtsm_jax.train.feature_cache import FeatureCache
from jtsm_jax.train.guards import check_finite
from jtsm_jax.train.memory import check_memory
from jtsm_jax.train.meter import Meter, summary
from jtsm_jax.train.metrics import MetricWriter
from jtsm_jax.train.reestimation import InFlight
from jtsm_jax.train.sharding import local_rows, put_batch, to_host
from jtsm_jax.train.state import TrainState
from jtsm_jax.train.stopping import Stopped, Stopping
from jtsm_jax.types import Batch, Mined

Variables = dict[str, Any]
Pictures = dict[str, np.ndarray]
Evaluate = Callable[[Variables], tuple[dict[str, float], Pictures]]
ShowMined = Callable[[Batch, Mined, reestimation.Futures | None], Pictures]


def train(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  data: PreparedData,
  store: ProposalStore,
  stopping: Stopping,
  evaluate: Evaluate | None = None,
  measured_by: Mapping[str, Any] | None = None,
  show_mined: ShowMined | None = None,
  profile: tuple[int, int] | None = None,
) -> None:
  """Trains, or goes on training, in `workdir`.

  Reads images, tags and proposals; no mask and no box. With several processes
  all of them call it, and `workdir` is a folder that they share.

  Args:
    config: see configs/base.py.
    workdir: checkpoints, metrics and caches are kept here.
    data: the split "train" is read.
    store: proposals of its images.
    stopping: listens to signals.
    evaluate: called every `config.train.evaluate_every` steps (0: never), the
      last one included where it is a multiple, by the first process, with
      variables; returns metrics, whose first one decides the best checkpoint,
      and pictures.
    measured_by: {"measure": the name of that first one} and whatever else
      decides its value, for JSON; values of other kinds are not compared.
    show_mined: called every `config.train.images_every` steps (0: never) and in
      the last one, with a batch, its mined segments and, with branches, the
      futures of their masks; returns pictures.
    profile: the first and the last step of a trace that is kept in the workdir.

  Raises:
    InputError: a field of `config` is at fault, no checkpoint can be read, or
      the data have other classes than it.
    FloatingPointError: a loss or a gradient is not finite.
    Stopped: a signal has come; the state is saved.
  """
  origin.check_classes(workdir / "checkpoints", data.categories)
  run = setup.set_up(config, workdir, data=data, store=store)
  source, model, mesh = run.source, run.model, run.mesh
  lag = config.reestimation.lag
  settings = config.to_dict()
  learned_from = origin.describe(data, store)
  told = origin.told_by(workdir / "checkpoints")
  writes = jax.process_index() == 0
  with (
    checkpoints.open_checkpoints(
      workdir / "checkpoints", keep_last=config.train.keep_checkpoints
    ) as manager,
    checkpoints.open_checkpoints(workdir / "best", keep_last=1) as best,
    caches.open_reestimator(config, workdir, source, store) as reestimator,
    MetricWriter(workdir, active=writes) as writer,
    contextlib.ExitStack() as stack,
  ):
    # State: a new one, or the newest checkpoint of the workdir.
    restored = checkpoints.restore_latest(
      manager, functools.partial(setup.checkpoint_template, run)
    )
    if restored is None:
      first = setup.first_variables(run, data.categories)
      restored = setup.begin(run, first, 0), []
    state, waiting = restored
    first_step = int(state.step)
    changed = ""
    if origin.is_other(told, learned_from):
      changed = ", with other training images, tags or proposals than before"
      waiting = []  # those segments are of the ones before
    writer.truncate_after(first_step)

    def is_evaluated(step: int) -> bool:
      return (
        evaluate is not None
        and step > run.warm_up_steps
        and config.train.evaluate_every
        and step % config.train.evaluate_every == 0
      )

    # Perhaps the run before was stopped just after an evaluation.
    is_known = np.bool_(writer.has("val/", step=first_step))
    evaluated = first_step if broadcast_one_to_all(is_known) else None
    if first_step == run.last_step and (
      not is_evaluated(first_step) or first_step == evaluated
    ):
      if changed:
        changed = (
          f"{changed}, which nothing is learned from: to do so give another"
          f" --workdir, with --init_from={workdir}"
        )
      say(f"train: all {run.last_step} steps are done{changed}")
      return
    if first_step:
      say(f"train: going on from step {first_step} of {run.last_step}{changed}")

    check_memory(run, first_step)

    meter, flops = Meter(), {}
    peak = peak_flops(jax.local_devices()[0])

    # What serves them on the host.
    def open_cache() -> FeatureCache | None:
      variables = to_host(state.variables)
      return caches.open_feature_cache(
        config,
        workdir,
        model,
        variables,
        source,
        split="train",
        learning=True,
      )

    def call(part: Callable, variables: Any, batch: Batch, *rest: Any) -> Any:
      """Calls a jitted part of a step, whose operations are counted."""
      key = part, batch.superpixels.shape
      with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        if key not in flops:
          stack.enter_context(meter.paused())  # it is compiled
          flops[key] = matmul_flops(part, variables, batch, *rest) / mesh.size
        meter.count(flops=flops[key])
        return part(variables, batch, *rest)

    def on_devices(batch: Batch) -> tuple[Batch, Batch]:
      """A batch that is mined, on the host and on the devices."""
      batch = cache.attach(batch) if cache else batch
      device_batch = put_batch(batch, mesh)
      if model.extractor.frozen and not cache:
        # Once, for both parts of the step.
        device_batch = call(run.extract_features, state.variables, device_batch)
      return batch, device_batch

    get_proposals = with_fallback(store)

    def ask_for_masks(item: InFlight) -> None:
      if item.futures is None:
        item.futures = reestimation.submit(
          reestimator,
          item.batch,
          local_rows(item.mined, mesh),
          source=source,
          get_proposals=get_proposals,
        )

    def save(
      manager: ocp.CheckpointManager, *, score: float | None = None
    ) -> None:
      mined = [item.mined for item in in_flight]
      checkpoints.save(
        manager,
        state,
        mined,
        config=settings,
        data=learned_from,
        score=score,
        measured_by=measured_by,
      )

    # Input, and what the run before has mined without learning from it.
    mines = first_step > run.warm_up_steps or not run.warm_up_steps
    cache = open_cache() if mines else None
    in_flight = collections.deque()
    for age, mined in zip(range(len(waiting), 0, -1), waiting, strict=True):
      batches = setup.batches_from(
        run, first_step - age, load_images=cache is None
      )
      in_flight.append(InFlight(*on_devices(next(batches)), mined))
    batches = setup.batches_from(run, first_step, load_images=cache is None)

    # What is told on the way.
    if not first_step:
      measures = [f"val/{measured_by['measure']}"] if evaluate else []
      writer.describe(
        flatten_dict(settings, sep="."), measures=["loss/total", *measures]
      )
    bar = stack.enter_context(
      progress(
        description="train",
        total=run.last_step,
        initial=first_step,
        unit="step",
      )
    )

    # The trace, which is written whenever the run ends within its steps.
    trace = stack.enter_context(contextlib.ExitStack())
    first_traced, last_traced = profile or (0, 0)
    first_traced = max(first_traced, first_step)
    last_traced = min(last_traced, run.last_step)
    if profile and first_traced >= last_traced:
      say(f"profile    none: the steps are {first_step} to {run.last_step}")

    # The steps.
    stopping.defer()
    check = None
    for step in range(first_step, run.last_step + 1):
      if is_evaluated(step) and step != evaluated:
        with stopping.at_once(), meter.paused():
          values, pictures, score = _evaluate(evaluate, state)
          if score > checkpoints.best_score(best, measured_by):
            save(best, score=score)
            checkpoints.check_saved(best, wait=True)
          if writes:
            writer.write(step, values)
            writer.write_images(step, pictures)
      if step == run.last_step:
        break
      if step == run.warm_up_steps > 0:
        with stopping.at_once(), meter.paused():
          state = setup.begin(run, to_host(state.variables), step)
          cache = open_cache()
          batches = setup.batches_from(run, step, load_images=cache is None)
      if step == run.branch_start > 0 and run.learns_branches(step):
        say(f"train: from step {step} on the branches learn; steps take longer")
      if step == first_traced < last_traced:
        trace.enter_context(jax.profiler.trace(workdir / "profile"))

      with meter.waiting("input"):
        batch = next(batches)
      learnt = {"batch": batch}
      if step < run.warm_up_steps:
        state, metrics = call(run.tag_step, state, put_batch(batch, mesh))
      else:
        shown = current = InFlight(*on_devices(batch))
        grads, current.mined, metrics = call(
          run.mining_gradients, state, current.device_batch
        )
        grads = [grads]
        if run.learns_branches(step):
          in_flight.append(current)
          # With a lag the host need not wait for what is mined right now.
          for item in [*in_flight][: len(in_flight) - min(lag, 1)]:
            ask_for_masks(item)
          if len(in_flight) > lag:
            shown = due = in_flight.popleft()
            with meter.waiting("reestimation"):
              pseudo = reestimation.collect(
                due.futures, due.batch, mask_stride=run.losses.mask_stride
              )
            branch_grads, branch_metrics = call(
              run.branch_gradients,
              state,
              due.device_batch,
              due.mined,
              put_batch(pseudo, mesh),
            )
            grads.append(branch_grads)
            metrics |= branch_metrics
            learnt["branches"] = due.batch
        state, update_metrics = run.apply_gradients(state, *grads)
        metrics |= update_metrics

      done = step + 1
      if check is not None:
        check()  # of the step before: the devices are busy with this one
      check = functools.partial(
        check_finite,
        metrics,
        step=done,
        batches=learnt,
        source=source,
        workdir=workdir,
      )
      meter.count(images=len(batch.image_index) * jax.process_count())
      meter.add(metrics)
      bar.update()
      if first_traced < last_traced == done:
        jax.block_until_ready(state)
        trace.close()
        say(
          f"profile    {workdir}/profile/plugins/profile/*/*.trace.json.gz: "
          "open it at https://ui.perfetto.dev, or the folder with tensorboard "
          "and its plugin xprof"
        )
      if done % config.train.log_every == 0 or done == run.last_step:
        check()
        values = meter.read(peak_flops=peak)
        if run.learns_branches(step):
          values["reestimation/queue"] = reestimator.queue_depth
          values["reestimation/hits"] = reestimator.hits
          values["reestimation/misses"] = reestimator.misses
          values["reestimation/hit_rate"] = reestimator.hit_rate
        writer.write(done, values)
        bar.set_postfix_str(summary(values), refresh=False)
      if (
        show_mined is not None
        and step >= run.warm_up_steps
        and config.train.images_every
        and (done % config.train.images_every == 0 or done == run.last_step)
      ):
        pictures = show_mined(
          shown.batch, local_rows(shown.mined, mesh), shown.futures
        )
        writer.write_images(done, pictures)
      signal = stopping.asked(done)
      if (
        done % config.train.checkpoint_every == 0
        or is_evaluated(done)
        or done in (run.warm_up_steps, run.last_step)
        or signal
      ):
        check()
        save(manager)
      checkpoints.check_saved(manager, wait=bool(signal))
      if signal:
        raise Stopped(signal)


def _evaluate(
  evaluate: Evaluate, state: TrainState
) -> tuple[dict[str, float], Pictures, float]:
  """Metrics and pictures, in the first process, and the score, in all of them.

  All processes call it: arrays that are divided among them come together.
  """
  variables = to_host(state.variables)
  averaged = to_host(state.averaged_variables) if state.ema else None
  values, pictures, score = {}, {}, 0.0
  if jax.process_index() == 0:
    found, pictures = evaluate(variables)
    values = {f"val/{name}": value for name, value in found.items()}
    score = next(iter(found.values()))
    if averaged is not None:
      found, _ = evaluate(averaged)
      values |= {f"val_averaged/{name}": v for name, v in found.items()}
  return values, pictures, float(broadcast_one_to_all(np.float32(score)))
