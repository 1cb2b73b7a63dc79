"""What main.py starts: a workdir is claimed and a mode is run in it.

The configuration is read here and in the modes, and handed on as plain
arguments.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import pathlib
import platform

import jax
import ml_collections
from flax.traverse_util import flatten_dict

from jtsm_jax.data import prepared
from jtsm_jax.data.audit import class_table
from jtsm_jax.data.files import (
  PathOrUrl,
  absolute_path,
  cache_folder,
  full_path,
  is_local,
)
from jtsm_jax.modes.data import (
  audit_data,
  prepare,
  prepared_directory,
  verify_data,
)
from jtsm_jax.modes.evaluation import run_evaluation
from jtsm_jax.modes.export import export
from jtsm_jax.modes.prediction import predict_images
from jtsm_jax.modes.proposals import (
  fill_proposals,
  open_proposals,
  propose,
  report_proposals,
)
from jtsm_jax.modes.report import run_report
from jtsm_jax.modes.training import run_training
from jtsm_jax.proposals import store as stores
from jtsm_jax.train import checkpoints, fields, setup
from jtsm_jax.train.claim import alone_in
from jtsm_jax.types import InputError

Config = ml_collections.ConfigDict

FREE_FIELDS = (
  "data.prepared",
  "data.max_bad_fraction",
  "proposals.store",
  "proposals.num_workers",
  "backbone.cache_dir",
  "reestimation.cache_dir",
  "reestimation.threads",
  "train.log_every",
  "train.images_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.evaluate_every",
  "train.accumulation",
  "train.model_parallel",
  "train.divide_optimizer",
  "train.loader_threads",
  "train.loader_workers",
  "train.memory_gib",
  "train.proposal_block",
  "train.remat",
  "evaluation",
  "report",
)
"""Fields that may change between two runs in one workdir."""

START_FIELDS = ("train.init_from", "train.init_skip")
"""Fields that the first start alone reads: later ones may leave them out."""

PLACE_FIELDS = ("data.root", "data.sbd")
"""Fields that a trained workdir knows: later calls may leave them out."""

PATH_FIELDS = (
  *PLACE_FIELDS,
  "data.prepared",
  "proposals.source",
  "proposals.store",
  "backbone.pretrained",
  "backbone.cache_dir",
  "reestimation.cache_dir",
  "train.init_from",
)
"""Fields that may be spelt in another way, if they lead to the same place."""

DATA_FIELDS = (
  "task",
  "data.name",
  "data.root",
  "data.year",
  "data.train_set",
  "data.val_set",
  "data.sbd",
  "data.annotation_source",
  "data.shapes",
)
"""Fields that the prepared data depend on."""


def run(
  config: Config,
  workdir: pathlib.Path,
  *,
  mode: str,
  images: PathOrUrl | None = None,
  shard: int = 0,
  num_shards: int = 1,
  beam: str = "",
  profile: tuple[int, int] | None = None,
) -> None:
  """Runs a mode of main.py.

  Args:
    config: see configs/base.py.
    workdir: folder of the run; made if absent.
    mode: "all", "prepare", "audit", "verify", "propose", "proposal_quality",
      "train", "evaluate", "predict", "report" or "export".
    images: folder, pattern or file of images, or its URL, for "predict".
    shard, num_shards: which part of the images, for "prepare" and "propose".
    beam: options of an Apache Beam pipeline that does all parts; "" for none.
    profile: the first and the last step of a trace, for training.

  Raises:
    InputError: a path, a file or a field of the configuration is at fault.
    OSError: the disk is full, or a folder cannot be written.
  """
  needs_weights = ("evaluate", "predict", "report", "export")
  if mode in needs_weights and not _is_trained(workdir):
    raise InputError(
      f"{workdir / 'checkpoints'}: there are no checkpoints; train first "
      "(--mode=train), or check --workdir"
    )
  # What is wrong is told now, not after the proposals.
  fields.check_fields(config)
  config = _with_absolute_paths(config)
  if not _is_trained(workdir):
    fields.check_schedule(config)
    if mode in ("all", "train"):
      _check_start(config)
  _keep_compiled_programs()
  config = claim_workdir(workdir, config)
  if mode == "predict":
    return predict_images(config, workdir, images)
  if mode == "export":
    return export(config, workdir)
  shards = dict(shard=shard, num_shards=num_shards, beam=beam)
  if mode == "prepare":
    data = prepare(config, workdir, **shards)
    if data is not None:
      print(class_table(data))
    return None
  if mode == "audit":
    return audit_data(config, workdir)
  if mode == "verify":
    return verify_data(config, workdir)
  if jax.process_count() > 1:  # they would make the same things twice
    directory = prepared_directory(config, workdir)
    if not prepared.is_prepared(directory):
      raise InputError(
        f"{directory}: the data set is not prepared; run the same command on "
        "one host, without --distributed and with --mode=propose, first"
      )
    data = prepared.open_prepared(directory)
    store = open_proposals(config, workdir, data)
    return _train(config, workdir, data, store, profile=profile)
  if mode == "propose" and beam:
    data = prepare(config, workdir, num_shards=num_shards, beam=beam)
  else:
    data = prepare(config, workdir)
  if mode == "proposal_quality":
    return report_proposals(config, workdir, data)
  if mode == "propose":
    path = fill_proposals(config, workdir, data, **shards)
    # To count those in a bucket they would have to be copied.
    count = (
      f" ({len(stores.open_store(path))} images)" if is_local(path) else ""
    )
    print(f"proposals  {path}{count}")
    return None
  store = propose(config, workdir, data)
  if mode in ("all", "train"):
    _train(config, workdir, data, store, profile=profile)
  if mode == "evaluate":
    _print_devices(1)
  if mode in ("all", "evaluate"):
    run_evaluation(config, workdir, data, store, logs=mode == "all")
  if mode == "report":
    run_report(config, workdir, data, store)
  return None


def claim_workdir(
  workdir: pathlib.Path, config: Config, *, alone: bool = False
) -> Config:
  """Writes the configuration into a new workdir, or compares it with its own.

  Fields are fixed by what was made with them: those of the data once they are
  prepared, the others by the first checkpoint. So a try that fails before does
  not spoil the workdir. The weights that a run began with may be left out
  afterwards; others are refused, not overlooked. While another process trains
  there, nothing is written: its first checkpoint will belong to the settings
  that it has found.

  Args:
    workdir: folder of the run; made if absent.
    config: see configs/base.py.
    alone: whether the caller is inside `alone_in(workdir)`.

  Returns:
    The configuration, with `PLACE_FIELDS` of a trained workdir where it has
    none.

  Raises:
    InputError: the workdir cannot be made, or belongs to other settings.
  """
  path = workdir / "config.json"
  mine = json.loads(config.to_json_best_effort())
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    theirs = json.loads(path.read_text()) if path.exists() else mine
  except OSError as error:
    raise InputError(
      f"--workdir={workdir}: {error.strerror}; give a folder that can be "
      "written"
    ) from error
  except ValueError as error:
    raise InputError(f"{path} is damaged ({error}); remove it") from error
  trained = _is_trained(workdir)
  is_prepared = prepared.is_prepared(prepared_directory(config, workdir))

  def is_fixed(name: str) -> bool:
    if trained and name in START_FIELDS + PLACE_FIELDS:
      return bool(a.get(name))
    if trained:
      return not _is_among(name, FREE_FIELDS)
    return is_prepared and _is_among(name, DATA_FIELDS)

  def is_same(name: str) -> bool:
    values = a.get(name), b.get(name)
    if name in PATH_FIELDS and all(values):
      values = tuple(map(full_path, values))
    return values[0] == values[1]

  a, b = (flatten_dict(tree, sep=".") for tree in (mine, theirs))
  changed = [
    f"{name} = {a.get(name)!r}, there {b.get(name)!r}"
    for name in sorted(a.keys() | b.keys())
    if is_fixed(name) and not is_same(name)
  ]
  if changed:
    raise InputError(
      f"--workdir={workdir} belongs to a run of other settings: config."
      + "; config.".join(changed)
      + ". Give another --workdir, or the same settings"
    )
  if trained:
    config = config.copy_and_resolve_references()
    left_out = [f for f in PLACE_FIELDS if b.get(f) and not a.get(f)]
    config.update_from_flattened_dict({f: b[f] for f in left_out})
  if trained or jax.process_index() > 0:
    return config
  claim = contextlib.nullcontext() if alone else alone_in(workdir)
  with contextlib.suppress(InputError), claim:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(mine, indent=1))
    os.replace(draft, path)
  return config


def _with_absolute_paths(config: Config) -> Config:
  """Later calls find the same places from other folders."""
  values = {f: operator.attrgetter(f)(config) for f in PATH_FIELDS}
  if values["backbone.pretrained"] == "imagenet":  # is no path
    del values["backbone.pretrained"]
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(
    {f: absolute_path(value) for f, value in values.items() if value}
  )
  return config


def _check_start(config: Config) -> None:
  if config.train.init_from:  # perhaps with the backbone
    checkpoints.checkpoint_at(pathlib.Path(config.train.init_from))
  else:
    fields.check_start(config)


def _train(config, workdir, data, store, *, profile) -> None:
  used = setup.mesh_of(config).size
  larger = setup.sizes_for_all_devices(config)
  sizes = " and ".join(f"config.{field}={n}" for field, n in larger.items())
  _print_devices(used, f"; {sizes} would use all" if sizes else "")
  is_first = jax.process_index() == 0  # the others share its claim
  with alone_in(workdir) if is_first else contextlib.nullcontext():
    # Again: another one may have begun to train in the meantime.
    claim_workdir(workdir, config, alone=True)
    run_training(config, workdir, data, store, profile=profile)


def _print_devices(used: int, remedy: str = "") -> None:
  """On what it computes: a missing driver is easily overlooked."""
  count, kind = jax.device_count(), jax.devices()[0].device_kind
  share = f"{used} of {count}" if used < count else count
  print(f"devices: {share} x {kind} ({jax.default_backend()}){remedy}")


def _keep_compiled_programs() -> None:
  """The same program is compiled once on a machine, not in every run."""
  chosen = jax.config.jax_compilation_cache_dir  # by the user
  # On some CPUs XLA doubts, at length, what it has compiled there itself.
  if not chosen and jax.default_backend() != "cpu":
    folder = cache_folder() / "compiled" / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _is_trained(workdir: pathlib.Path) -> bool:
  return bool(checkpoints.steps_in(workdir / "checkpoints"))


def _is_among(name: str, group: tuple[str, ...]) -> bool:
  return any(name == f or name.startswith(f + ".") for f in group)
