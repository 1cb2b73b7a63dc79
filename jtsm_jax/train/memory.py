"""Whether a step fits into the memory of a device, before it is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from jtsm_jax.console import say
from jtsm_jax.train import caches, cost, feature_cache, fields, setup
from jtsm_jax.train.setup import Setup
from jtsm_jax.train.sharding import replicated
from jtsm_jax.types import Batch, InputError, PseudoMasks

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device when most of it is taken.

  Attributes:
    state: weights, their average and the slots of the optimizer.
    batch: images or features, and proposals; also of batches in flight.
    step: results and intermediate values, see `cost.peak_bytes`.
  """

  state: int
  batch: int
  step: int

  @property
  def total(self) -> int:
    return self.state + self.batch + self.step

  def __str__(self) -> str:
    return (
      f"about {_gib(self.total)} GiB per device (weights and optimizer "
      f"{_gib(self.state)}, batch {_gib(self.batch)}, step {_gib(self.step)})"
    )


def check_memory(run: Setup, first_step: int) -> None:
  """Says what the steps from `first_step` on will take, traced in seconds.

  Call it outside of any mesh.

  Args:
    run: the run.
    first_step: 0, or where the run goes on; the warm-up may be over.

  Raises:
    InputError: it is more than a device has; lists what takes less.
  """
  with contextlib.ExitStack() as stack:
    if _is_alone(run):
      stack.enter_context(
        jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh)
      )
    estimate, remedies = estimate_mining(run), _mining_remedies(run)
    warm_up = None
    if first_step < run.warm_up_steps:
      warm_up = estimate_warm_up(run)
  if warm_up and warm_up.total > estimate.total:
    estimate, remedies = warm_up, _warm_up_remedies(run)
  limit = run.config.train.memory_gib * GIB or device_bytes(run.mesh)
  of_limit = f", of {_gib(limit)} GiB" if limit else ""
  say(f"train: {estimate}{of_limit}")
  if limit and estimate.total > limit:
    remedies.append("train.memory_gib, if this estimate is wrong")
    raise InputError(
      f"a step takes {estimate}; a device has {_gib(limit)} GiB. What helps:"
      + "".join(f"\n  config.{remedy}" for remedy in remedies)
    )


def estimate_warm_up(run: Setup) -> Estimate:
  """What a step of the tag warm-up takes, on its largest canvas."""
  state, shardings = _placed(run, setup.shapes(run, 0)), setup.shardings(run, 0)
  batch = _largest_batch(run, run.config.warm_up.batch_size)
  # The new state takes the place of the old one.
  peak = cost.peak_bytes(run.tag_step, state, batch) - _bytes(state)
  return Estimate(_local_bytes(state, shardings), _bytes(batch), max(peak, 0))


def estimate_mining(run: Setup, *, platform: str | None = None) -> Estimate:
  """What a step of mining and branches takes, on its largest canvas.

  A device computes its share of the images with layers as large as without
  other devices: that the axis "model" divides activations is left out.

  Args:
    run: the run.
    platform: of the devices, see `cost.peak_bytes`; the one that there is.
  """
  peak_bytes = functools.partial(cost.peak_bytes, platform=platform)
  c, model = run.config.train, run.model
  state = _placed(run, setup.shapes(run, run.warm_up_steps))
  shardings = setup.shardings(run, run.warm_up_steps)
  batch = _largest_batch(run, c.batch_size)
  branches = run.learns_branches(run.last_step - 1)
  waiting = run.config.reestimation.lag if branches else 0
  # Of gradients a device holds what it holds of the parameters.
  gradients = _local_bytes(state.params, shardings.params)
  elsewhere = _bytes(state.params) - gradients

  moments = []  # (bytes of batches, bytes of the step)
  if model.extractor.frozen:
    images = batch
    batch = jax.eval_shape(run.extract_features, state.variables, images)
    batch = _placed(run, batch)
    if caches.caches_features(
      run.config, model, run.abstract, run.source, learning=True
    ):
      features = _shape(batch.features.shape, feature_cache.DTYPE)
      batch = batch.replace(features=_placed(run, features))
    else:
      peak = peak_bytes(run.extract_features, state.variables, images)
      moments.append((_bytes(images) + waiting * _bytes(batch), peak))
  batches = (1 + waiting) * _bytes(batch)

  grads, mined, _ = _placed(
    run, jax.eval_shape(run.mining_gradients, state, batch)
  )
  peak = peak_bytes(run.mining_gradients, state, batch) - elsewhere
  moments.append((batches, peak))
  parts = [grads]
  if branches:
    slots = (len(batch.valid), run.mining.num_slots)
    sides = (n // run.losses.mask_stride for n in batch.superpixels.shape[1:])
    pseudo = PseudoMasks(_shape((*slots, *sides), bool), _shape(slots, bool))
    pseudo = _placed(run, pseudo)
    peak = peak_bytes(run.branch_gradients, state, batch, mined, pseudo)
    moments.append((batches, gradients + peak - elsewhere + _bytes(pseudo)))
    parts.append(grads)
  # The new state takes the place of the old one.
  peak = max(peak_bytes(run.apply_gradients, state, *parts) - _bytes(state), 0)
  moments.append((batches, len(parts) * gradients + peak))
  return Estimate(_local_bytes(state, shardings), *max(moments, key=sum))


def device_bytes(mesh: Mesh) -> int | None:
  """Memory of a device of this process; None where it does not say.

  CPU devices share the machine's.
  """
  device = mesh.local_devices[0]
  if device.platform == "cpu":
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // len(mesh.local_devices)
  try:
    stats = device.memory_stats()
  except (jax.errors.JaxRuntimeError, NotImplementedError):
    return None
  return (stats or {}).get("bytes_limit")


def _mining_remedies(run: Setup) -> list[str]:
  """Fields that make the step smaller."""
  config, c, P = run.config, run.config.train, run.example.valid.shape[1]
  data = run.mesh.shape["data"]
  found = []
  block = c.proposal_block // 16 * 8 if c.proposal_block else 512
  if 0 < block < P:
    found.append(f"train.proposal_block={block}, pooled at a time")
  for parts in range(c.accumulation + 1, c.batch_size // data + 1):
    if c.batch_size % (parts * data) == 0:
      found.append(f"train.accumulation={parts} parts of the batch")
      break
  found += _shared_remedies(run, learns=config.backbone.freeze != "all")
  found.append(f"proposals.max_proposals, now {P}")
  count = jax.local_device_count()
  for model in range(c.model_parallel + 1, count + 1):
    if config.neck.widths and count % model == 0:
      found.append(f"train.model_parallel={model} devices that share the neck")
      break
  if data > 1 and not c.divide_optimizer:
    found.append("train.divide_optimizer=True")
  if data * c.accumulation < c.batch_size and jax.default_backend() != "cpu":
    found.append("train.batch_size, shared by more devices")
  return found


def _warm_up_remedies(run: Setup) -> list[str]:
  size = run.config.warm_up.batch_size
  return [
    *_shared_remedies(run, learns=True),
    f"warm_up.batch_size, now {size}",
  ]


def _shared_remedies(run: Setup, *, learns: bool) -> list[str]:
  found = []
  if run.config.train.precision == "float32":
    found.append("train.precision='bfloat16'")
  if learns and not run.config.train.remat:
    found.append("train.remat='backbone'")
  height, width = _largest_canvas(run.config)
  found.append(f"data.canvases, now up to {height} x {width} pixels")
  return found


def _largest_canvas(config: ml_collections.ConfigDict) -> tuple[int, int]:
  return max(fields.canvases(config, "data"), key=math.prod)


def _largest_batch(run: Setup, batch_size: int) -> Batch:
  """The shapes of one device's part of a batch, on the largest canvas."""
  count = batch_size // run.mesh.shape["data"]
  canvas = _largest_canvas(run.config)
  batch = jax.tree.map(
    lambda x: _shape((count, *x.shape[1:]), x.dtype), run.example
  )
  batch = batch.replace(
    images=_shape((count, *canvas, 3), np.uint8),
    superpixels=_shape((count, *canvas), batch.superpixels.dtype),
  )
  return _placed(run, batch)


def _is_alone(run: Setup) -> bool:
  return run.mesh.size == 1


def _placed(run: Setup, tree: Any) -> Any:
  """Shapes as a step sees them on one device, so that JAX traces it once."""
  if not _is_alone(run):
    return tree
  sharding = replicated(run.mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _shape(shape, dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _local_bytes(tree: Any, shardings: Any) -> int:
  """What one device holds of a tree of shapes."""
  local = jax.tree.map(
    lambda x, sharding: _shape(sharding.shard_shape(x.shape), x.dtype),
    tree,
    shardings,
  )
  return _bytes(local)


def _gib(count: float) -> str:
  count /= GIB
  if count < 1e-3:
    return "0"
  return f"{count:.0f}" if count >= 100 else f"{count:.2g}"
