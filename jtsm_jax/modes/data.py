"""Preparing a data set, and checking what was prepared."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import ml_collections

from jtsm_jax.beam import run_shards
from jtsm_jax.data import coco, folder, prepared, shapes, voc
from jtsm_jax.data import prepare as preparation
from jtsm_jax.data.audit import audit, audit_table
from jtsm_jax.data.files import AnyPath, data_path, is_folder
from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.data.source import Source
from jtsm_jax.data.things import things_only
from jtsm_jax.data.verify import verify
from jtsm_jax.types import InputError

Config = ml_collections.ConfigDict

DATA_SETS = (
  "shapes",
  "folder",
  "voc_panoptic",
  "voc_detection",
  "coco_panoptic",
  "coco_instances",
)

SHARED_FOLDER = "it must be a folder that all machines share, or a bucket's URL"


def prepare(
  config: Config,
  workdir: pathlib.Path,
  *,
  shard: int = 0,
  num_shards: int = 1,
  beam: str = "",
) -> PreparedData | None:
  """Prepares the data set unless it is prepared, and opens it.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    shard, num_shards: which part of the data set to prepare. The last one to
      finish completes it.
    beam: options of a pipeline that prepares all parts; "" for none.

  Returns:
    The data, or None while other shards are missing.
  """
  directory = prepared_directory(config, workdir)
  if prepared.is_prepared(directory):
    preparation.remove_leftovers(directory)
  elif beam:
    _prepare_with_beam(config, directory, num_shards, beam)
  else:
    is_complete = preparation.prepare(
      data_source(config),
      directory,
      max_bad_fraction=config.data.max_bad_fraction,
      shard=shard,
      num_shards=num_shards,
    )
    if not is_complete:
      print(f"shard {shard} of {num_shards} is written; others are missing")
      return None
  data = prepared.open_prepared(directory)
  _check_classes(config, data)
  _check_settings(config, data, directory)
  _check_state(config, data, directory)
  counts = ", ".join(f"{len(s)} {name}" for name, s in data.splits.items())
  print(f"data: {data.name}, {counts} images, {len(data.categories)} classes")
  return data


def _check_classes(config, data: Source | PreparedData) -> None:
  """Whether there is anything that tags can tell apart."""
  names = data.categories.names
  if len(names) > 1:
    return
  found = f"one class, {names[0]!r}" if names else "no class"
  remark = "; stuff counts with config.task='panoptic' alone"
  raise InputError(
    f"the data set {data.name!r} has {found}; wanted at least two: where every"
    " proposal is of one class, nothing is learned. Name a second one, such as"
    " the stuff 'background', tag every image with it, and add images that have"
    f" no other tag{'' if config.task == 'panoptic' else remark}"
  )


def _check_settings(config, data, directory) -> None:
  """Whether a folder, perhaps of another run, holds what is asked for."""
  for field, wanted in data_settings(config).items():
    found = data.settings.get(field, wanted)  # older ones tell nothing
    if found != wanted:
      raise InputError(
        f"{directory}: was prepared with {field} = {found!r}, and the"
        f" configuration has {wanted!r}; choose another data.prepared, or none"
      )


def _check_state(config, data, directory) -> None:
  """Whether a folder is as it was when it was prepared."""
  c = config.data
  if c.name != "folder" or not c.root or not is_folder(data_path(c.root)):
    return  # only what is cheap to look at, and only where it is still there
  if data.state and data.state != folder.folder_state(c.root):
    raise InputError(
      f"{c.root}: has changed since {directory} was prepared from it. To train"
      " on what it holds now, give another --workdir, with --init_from to begin"
      f" with the weights of this one. Or remove {directory}: the same command"
      " prepares it anew, and of the training only the steps that are left, if"
      " any, learn from it"
    )


def _prepare_with_beam(config, directory, num_shards, beam) -> None:
  run_shards(
    functools.partial(_prepare_shard, config, directory, num_shards),
    num_shards,
    beam,
  )
  is_complete = preparation.complete(
    data_source(config),
    directory,
    max_bad_fraction=config.data.max_bad_fraction,
  )
  if not is_complete:
    raise InputError(
      f"{directory}: what the workers of the pipeline have written is not"
      f" there; {SHARED_FOLDER}"
    )


def _prepare_shard(config, directory, num_shards, shard) -> None:
  """Runs in a worker of a pipeline."""
  preparation.write_shard(
    data_source(config),
    directory,
    max_bad_fraction=config.data.max_bad_fraction,
    shard=shard,
    num_shards=num_shards,
  )


def audit_data(config: Config, workdir: pathlib.Path) -> None:
  """Prints what the prepared data hold.

  Raises:
    InputError: training records hold more than image, id and tags.
  """
  directory = prepared_directory(config, workdir)
  result = audit(directory)
  print(audit_table(result))
  if result.faults:
    raise InputError(
      f"{directory}: {len(result.faults)} faults, see above; remove the folder"
      " and prepare the data set again"
    )


def verify_data(config: Config, workdir: pathlib.Path) -> None:
  """Reads all of the prepared data, and prints each bad record.

  Raises:
    InputError: there is any.
  """
  directory = prepared_directory(config, workdir)
  faults = verify(directory)
  for fault in faults:
    print(fault)
  if faults:
    raise InputError(
      f"{directory}: {len(faults)} bad records, see above; remove the folder"
      " and prepare the data set again"
    )
  print(f"{directory}: every record is as it was prepared")


def prepared_directory(config: Config, workdir: pathlib.Path) -> AnyPath:
  """Where the prepared data are."""
  return data_path(config.data.prepared or workdir / "data")


def data_source(config: Config) -> Source:
  """The data set that `config.data` names, with the classes of `config.task`.

  Raises:
    InputError: there is none of this name, its root is not given, or it has
      less than two classes.
  """
  source = _named_source(config.data)
  if config.task != "panoptic":
    source = things_only(source)
  _check_classes(config, source)
  return dataclasses.replace(source, settings=data_settings(config))


def data_settings(config: Config) -> dict[str, Any]:
  """What a prepared data set depends on beside the files, by field."""
  c = config.data
  settings = {
    "data.name": c.name,
    "classes": "all" if config.task == "panoptic" else "things",
  }
  fields = []
  if c.name == "shapes":
    settings |= {f"data.shapes.{k}": v for k, v in c.shapes.items()}
  elif c.name != "folder":
    fields += ["train_set", "val_set"]
  if c.name.startswith("voc"):
    fields += ["year"]
  if c.name == "voc_panoptic":
    settings["data.sbd"] = bool(c.sbd)  # wherever it lies
    fields += ["annotation_source"]
  return settings | {f"data.{field}": c[field] for field in fields}


def _named_source(c: Config) -> Source:
  if c.name == "shapes":
    return shapes.shapes_source(**c.shapes)
  if c.name not in DATA_SETS:
    raise InputError(
      f"config.data.name is {c.name!r}; wanted one of {DATA_SETS}"
    )
  if not c.root:
    raise InputError(
      "config.data.root is empty; give the folder of the data set:"
      " --config.data.root=DIR (docs/data.md)"
    )
  sets = {k: c[k] for k in ("train_set", "val_set") if c[k]}
  if c.name == "folder":
    return folder.folder_source(c.root)
  if c.name == "coco_panoptic":
    return coco.coco_panoptic_source(c.root, **sets)
  if c.name == "coco_instances":
    return coco.coco_instances_source(c.root, **sets)
  if c.name == "voc_detection":
    return voc.voc_detection_source(c.root, year=c.year, **sets)
  return voc.voc_panoptic_source(
    c.root,
    year=c.year,
    sbd=c.sbd,
    annotation_source=c.annotation_source,
    **sets,
  )
