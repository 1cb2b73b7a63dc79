"""The modes of main.py, from preparing the data to exporting the model.

Each function does one mode and nothing that is already done. This is where the
configuration is read and handed on as plain arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from jtsm_jax.beam import run_shards
from jtsm_jax.console import progress, say
from jtsm_jax.data import coco, folder, prepared, shapes, voc
from jtsm_jax.data import prepare as preparation
from jtsm_jax.data.audit import audit, audit_table, class_table
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  folder_name,
  is_folder,
  is_local,
  read_bytes,
)
from jtsm_jax.data.image_files import ImageFiles, digest, find_images
from jtsm_jax.data.pipeline import with_fallback
from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.data.source import Source
from jtsm_jax.data.things import things_only
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.data.verify import verify
from jtsm_jax.evaluation.class_calibration import (
  ClassCalibration,
  load_calibration,
  save_calibration,
)
from jtsm_jax.evaluation.evaluate import (
  evaluate,
  has_truth,
  localisation,
  write_metrics,
)
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import (
  DetectionSettings,
  Steps,
  make_steps,
)
from jtsm_jax.evaluation.predict import (
  PredictionSettings,
  learn_calibration,
  predict,
)
from jtsm_jax.evaluation.tables import final_table, main_measures
from jtsm_jax.mining.labels import slots_needed
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.proposals import importers, quality
from jtsm_jax.proposals import store as stores
from jtsm_jax.proposals.fill_store import Maker, fill_store, generator
from jtsm_jax.proposals.generate import ProposalSettings, preset_settings
from jtsm_jax.reporting import proposal_quality, report, stages
from jtsm_jax.reporting.export import export_model
from jtsm_jax.reporting.mined_images import mine_images
from jtsm_jax.reporting.predictions import (
  collect,
  is_done,
  write_prediction,
)
from jtsm_jax.reporting.visualize import write_image
from jtsm_jax.train import build, checkpoints
from jtsm_jax.train.loop import train
from jtsm_jax.train.state import TrainState
from jtsm_jax.types import InputError

Config = ml_collections.ConfigDict

FREE_FIELDS = (
  "data.prepared",
  "data.max_bad_fraction",
  "proposals.store",
  "proposals.num_workers",
  "backbone.cache_dir",
  "reestimation.threads",
  "train.log_every",
  "train.images_every",
  "train.checkpoint_every",
  "train.evaluate_every",
  "train.loader_threads",
  "evaluation",
  "report",
)
"""Fields that may change between two runs in one workdir."""

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

_SHARED = "it must be a folder that all machines share, or a bucket's URL"

DATA_SETS = (
  "shapes",
  "folder",
  "voc_panoptic",
  "voc_detection",
  "coco_panoptic",
  "coco_instances",
)


PICTURES_OF_EVALUATION = 4  # in TensorBoard, while it trains


def run(
  config: Config,
  workdir: pathlib.Path,
  *,
  mode: str,
  images: PathOrUrl | None = None,
  shard: int = 0,
  num_shards: int = 1,
  beam: str = "",
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

  Raises:
    InputError: a path, a file or a field of the configuration is at fault.
  """
  needs_weights = ("evaluate", "predict", "report", "export")
  if mode in needs_weights and not _is_trained(workdir):
    raise InputError(
      f"{workdir / 'checkpoints'}: there are no checkpoints; train first "
      "(--mode=train), or check --workdir"
    )
  build.check_fields(config)  # wrong ones now, not after the proposals
  claim_workdir(workdir, config)
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
    run_training(config, workdir, data, store)
  if mode in ("all", "evaluate"):
    run_evaluation(config, workdir, data, store)
  if mode == "report":
    run_report(config, workdir, data, store)
  return None


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
  """Writes the configuration into a new workdir, or compares it with its own.

  Fields are fixed by what was made with them: those of the data once they are
  prepared, the others by the first checkpoint. So a try that fails before does
  not spoil the workdir.

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
    if trained:
      return not _is_among(name, FREE_FIELDS)
    return is_prepared and _is_among(name, DATA_FIELDS)

  a, b = _flat(mine), _flat(theirs)
  changed = [
    f"{name} = {a.get(name)!r}, there {b.get(name)!r}"
    for name in sorted(a.keys() | b.keys())
    if a.get(name) != b.get(name) and is_fixed(name)
  ]
  if changed:
    raise InputError(
      f"--workdir={workdir} belongs to a run of other settings: config."
      + "; config.".join(changed)
      + ". Give another --workdir, or the same settings"
    )
  if not trained:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(mine, indent=1))
    os.replace(draft, path)


def _is_trained(workdir: pathlib.Path) -> bool:
  return any((workdir / "checkpoints").glob("[0-9]*"))


def _is_among(name: str, fields: tuple[str, ...]) -> bool:
  return any(name == f or name.startswith(f + ".") for f in fields)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


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
  counts = ", ".join(f"{len(s)} {name}" for name, s in data.splits.items())
  print(f"data: {data.name}, {counts} images, {len(data.categories)} classes")
  return data


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
      f" there; {_SHARED}"
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
    InputError: there is none of this name, or its root is not given.
  """
  source = _named_source(config.data)
  return source if config.task == "panoptic" else things_only(source)


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


def propose(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  *,
  splits: Sequence[str] | None = None,
) -> stores.ProposalStore:
  """Gives proposals to every image that has none, and opens the store.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    data: the images.
    splits: of `data`; all of them if None.
  """
  path = fill_proposals(config, workdir, data, splits=splits)
  return stores.open_store(path)


def fill_proposals(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  *,
  splits: Sequence[str] | None = None,
  shard: int = 0,
  num_shards: int = 1,
  beam: str = "",
) -> AnyPath:
  """Gives proposals to images that have none.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    data: the images.
    splits: of `data`; all of them if None.
    shard, num_shards: which part of the images of each split.
    beam: options of a pipeline that does all parts; "" for none.

  Returns:
    Where the store is.
  """
  root = data_path(config.proposals.store or workdir / "proposals")
  maker = proposal_maker(config)
  # A store may serve several data sets, whose image ids may be the same.
  path = root / data.fingerprint / maker.key
  splits = tuple(splits or data.splits)
  if not beam:
    shards = dict(shard=shard, num_shards=num_shards)
    for split in splits:
      _fill(config, data.splits[split], path, maker, **shards)
    return path
  directory = prepared_directory(config, workdir)
  run_shards(
    functools.partial(
      _propose_shard, config, directory, path, splits, num_shards
    ),
    num_shards,
    beam,
  )
  if not stores.shard_paths(path):
    raise InputError(
      f"{path}: what the workers of the pipeline have written is not there;"
      f" {_SHARED}"
    )
  return path


def _propose_shard(config, directory, path, splits, num_shards, shard) -> None:
  """Runs in a worker of a pipeline, which has many for each machine."""
  data = prepared.open_prepared(directory)
  maker = proposal_maker(config)
  for split in splits:
    _fill(
      config,
      data.splits[split],
      path,
      maker,
      num_workers=0,
      shard=shard,
      num_shards=num_shards,
    )


def _fill(config, source, path, maker, **options) -> None:
  num_workers = config.proposals.num_workers or None
  fill_store(
    source,
    path,
    maker,
    max_bad_fraction=config.data.max_bad_fraction,
    report=logging.warning,
    **{"num_workers": num_workers} | options,
  )


def proposal_maker(config: Config) -> Maker:
  """Where the proposals of `config.proposals` come from."""
  settings = proposal_settings(config)
  if config.proposals.source:
    return importers.importer(
      pathlib.Path(config.proposals.source),
      max_proposals=settings.max_proposals,
      max_superpixels=settings.num_superpixels,
    )
  return generator(settings)


def report_proposals(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
) -> None:
  """Measures the proposals of the validation images: table, JSON, pictures.

  Those that are missing are made first.

  Raises:
    InputError: no validation image has ground truth.
  """
  if "val" not in data.splits or not data.splits["val"].has_targets:
    raise InputError(
      f"the data set {data.name!r} has no validation images with ground truth;"
      " the quality of proposals cannot be measured"
    )
  store = propose(config, workdir, data, splits=["val"])
  source, results, most = data.splits["val"], [], 1
  output = workdir / "proposal_quality"
  shown = max(len(source) // max(config.evaluation.pictures, 1), 1)
  for n, image_id in enumerate(source.image_ids):
    target = source.target(n)
    if target is None or image_id not in store:
      continue
    proposals = store.get(image_id)
    results.append(quality.best_iou(proposals, target))
    most = max(most, len(proposals))
    if config.evaluation.pictures and n % shown == 0:
      image = decode_image(source[n].image)
      sheet = stages.proposal_sheet(image, proposals, target, data.categories)
      write_image(output / "images" / f"{image_id}.jpg", sheet)
  summary = quality.summary(quality.concatenate(results), most=most)
  counts = quality.counts_up_to(most)
  print(proposal_quality.table(summary, counts))
  proposal_quality.plot(summary, counts, output / "quality.png")
  (output / "quality.json").write_text(
    json.dumps({"proposals": counts, "groups": summary}, indent=1)
  )
  left_out = len(source) - len(results)
  if left_out:
    print(f"left out: {left_out} images without ground truth or proposals")
  print(f"plot       {output / 'quality.png'}")
  print(f"figures    {output / 'quality.json'}")
  if config.evaluation.pictures:
    print(f"pictures   {output / 'images'}")


def proposal_settings(config: Config) -> ProposalSettings:
  """`config.proposals` as plain settings."""
  preset = preset_settings(config.proposals.preset)
  return dataclasses.replace(
    preset,
    network=preset.network and config.proposals.network,
    num_superpixels=config.proposals.num_superpixels,
    max_proposals=config.proposals.max_proposals,
    max_side=config.proposals.max_side,
  )


def prediction_settings(config: Config) -> PredictionSettings:
  """`config.evaluation` as plain settings."""
  e = config.evaluation
  return PredictionSettings(
    canvases=build.canvases(config, "evaluation"),
    batch_size=e.batch_size,
    max_proposals=config.proposals.max_proposals,
    max_superpixels=config.proposals.num_superpixels,
    flip=e.flip,
    mask_share=e.mask_share,
    semantic_share=e.semantic_share,
    detection=DetectionSettings(
      nms_iou=e.nms_iou,
      nms_kind=e.nms_kind,
      max_detections=e.max_detections,
      area_exponent=e.area_exponent,
    ),
    fusion=FusionSettings(
      instance_score=e.instance_score,
      instance_overlap=e.instance_overlap,
      stuff_area=e.stuff_area,
    ),
  )


def run_training(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  store: stores.ProposalStore,
) -> None:
  """Trains to the last step, evaluating on the way where there are targets."""
  model = build.build_model(config, data.categories)

  def evaluate_state(state: TrainState) -> dict[str, float]:
    args = config, workdir, model, state.variables, data, store
    calibration = _calibrate(*args)
    pictures = {}

    def draw(prediction):
      if len(pictures) < PICTURES_OF_EVALUATION:
        name, sheet = _prediction_sheet(data, store, prediction)
        pictures[f"val/{name}"] = sheet

    result = evaluate(
      _predictions(*args, calibration),
      data.splits["val"],
      data.categories,
      task=config.task,
      voc_metric=config.evaluation.voc_metric,
      on_prediction=draw,
    )
    say(final_table(result))
    return main_measures(result), pictures

  train(
    config,
    workdir,
    data=data,
    store=store,
    evaluate=evaluate_state if _has_truth(config, data) else None,
    show_mined=functools.partial(
      _draw_mined, workdir / "mining", data, with_fallback(store)
    ),
  )


def _draw_mined(
  directory, data, get_proposals, batch, mined, futures
) -> dict[str, np.ndarray]:
  """One picture for each image of a training batch; see `train.loop.train`.

  They lie in `directory` until the next ones come.
  """
  source, sheets = data.splits["train"], {}
  for i, index in enumerate(batch.image_index):
    if index < 0:
      continue
    image_id = source.image_ids[index]
    image = decode_image(source[index].image)
    proposals = get_proposals(image_id, image.shape[:2])
    rows = []
    for m in np.flatnonzero(mined.valid[i]):
      mask = futures[i][m].result() if futures else None
      segment = proposals.mask(mined.proposal[i, m])
      rows.append((mined.category[i, m], segment, mask))
    sheets[image_id] = stages.mining_sheet(image, rows, data.categories)
  for old in directory.glob("*.jpg"):
    old.unlink()
  for image_id, sheet in sheets.items():
    write_image(directory / f"{image_id}.jpg", sheet)
  return {f"mining/{n}": sheet for n, sheet in enumerate(sheets.values())}


def _prediction_sheet(data, store, prediction) -> tuple[str, np.ndarray]:
  """The id of a validation image, and all that there is to see of it."""
  source = data.splits["val"]
  image_id = source.image_ids[prediction.index]
  image = decode_image(source[prediction.index].image)
  proposals = with_fallback(store)(image_id, image.shape[:2])
  sheet = stages.prediction_sheet(
    image,
    proposals,
    prediction.panoptic,
    source.target(prediction.index),
    data.categories,
  )
  return image_id, sheet


def _steps(config, model, variables) -> Steps:
  return make_steps(model, variables, mil_share=config.evaluation.mil_share)


def _calibrate(
  config, workdir, model, variables, data, store
) -> ClassCalibration:
  if not config.evaluation.calibrate:
    return ClassCalibration.neutral(len(data.categories))
  source = data.splits["train"]
  return learn_calibration(
    _steps(config, model, variables),
    source,
    store,
    settings=prediction_settings(config),
    cache=build.open_feature_cache(
      config, workdir, model, variables, source, split="train"
    ),
  )


def _predictions(
  config, workdir, model, variables, data, store, calibration, *, split="val"
):
  source = data.splits[split]
  return predict(
    _steps(config, model, variables),
    source,
    store,
    calibration=calibration,
    num_things=data.categories.num_things,
    settings=prediction_settings(config),
    cache=build.open_feature_cache(
      config, workdir, model, variables, source, split=split
    ),
    description="evaluate" if split == "val" else split,
  )


def run_evaluation(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  store: stores.ProposalStore,
) -> None:
  """Evaluates the last checkpoint: table, metrics.json and pictures."""
  model = build.build_model(config, data.categories)
  step, variables = checkpoints.restore_variables(workdir / "checkpoints")
  variables = jax.device_put(variables)  # once, not with every batch
  args = config, workdir, model, variables, data, store
  calibration = _calibrate(*args)
  folder_ = workdir / "evaluation"
  save_calibration(
    workdir / "calibration.json",
    calibration,
    data.categories,
    made_with=_made_with(config, step),
  )
  if not _has_truth(config, data):
    print("evaluate: there is no ground truth of validation images to compare")
    _print_next(workdir)
    return
  source = data.splits["val"]
  shown = max(len(source) // max(config.evaluation.pictures, 1), 1)
  predicted = []

  def keep(prediction):
    name = source.image_ids[prediction.index]
    image = decode_image(source[prediction.index].image)
    predicted.append(name)
    write_prediction(
      folder_ / "predictions",
      name,
      prediction,
      data.categories,
      image=image,
      file_name=f"{name}.jpg",
      made_with=_made_with(config, step),
    )
    if config.evaluation.pictures and prediction.index % shown == 0:
      name, sheet = _prediction_sheet(data, store, prediction)
      write_image(folder_ / "overlays" / f"{name}.jpg", sheet)

  result = evaluate(
    _predictions(*args, calibration),
    source,
    data.categories,
    task=config.task,
    voc_metric=config.evaluation.voc_metric,
    on_prediction=keep,
  )
  collect(folder_ / "predictions", predicted, data.categories)
  corloc = None
  if config.task == "detection" and "corloc" in data.splits:
    corloc = localisation(
      _predictions(*args, calibration, split="corloc"),
      data.splits["corloc"],
      data.categories,
    )
    result["corloc"] = corloc
  write_metrics(
    folder_ / "metrics.json", {"step": step, "split": "val"} | result
  )
  print(final_table(result, corloc))
  print(f"\nfigures    {folder_ / 'metrics.json'}")
  print(f"predicted  {folder_ / 'predictions'}")
  print(f"pictures   {folder_ / 'overlays'}")
  if (workdir / "mining").is_dir():
    print(f"           {workdir / 'mining'}")
  _print_next(workdir)


def run_report(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  store: stores.ProposalStore,
) -> None:
  """Writes the gallery of a run that is trained and evaluated.

  Raises:
    InputError: it is not evaluated with its last weights.
  """
  categories, source = data.categories, data.splits["train"]
  step, model, variables, calibration = _trained(config, workdir, categories)
  settings = prediction_settings(config)
  mining = build.mining_settings(
    config,
    num_things=categories.num_things,
    num_slots=slots_needed(
      source.tags,
      num_things=categories.num_things,
      segments_per_thing=config.mining.segments_per_thing,
      segments_per_stuff=config.mining.segments_per_stuff,
    ),
  )
  with MaskReestimator(
    init=config.reestimation.init,
    iterations=config.reestimation.iterations,
    longest_side=config.reestimation.longest_side,
    workers=config.reestimation.threads or os.cpu_count(),
    cache_dir=workdir / "masks" / source.fingerprint / store.path.name,
  ) as reestimator:
    has_branches = model.instance is not None or model.semantic is not None
    page = report.write_report(
      workdir,
      data,
      store,
      step=step,
      predict=functools.partial(
        predict,
        _steps(config, model, variables),
        store=store,
        calibration=calibration,
        num_things=categories.num_things,
        settings=settings,
      ),
      mine=functools.partial(
        mine_images,
        model,
        variables,
        store=store,
        settings=mining,
        canvases=build.canvases(config, "data"),
        batch_size=settings.batch_size,
        max_proposals=settings.max_proposals,
        max_superpixels=settings.max_superpixels,
      ),
      reestimator=reestimator if has_branches else None,
      num_images=config.report.images,
      num_train_images=config.report.train_images,
    )
  print(f"report     {page}")


def _made_with(config: Config, step: int) -> dict[str, Any]:
  """What a calibration depends on: the weights, and how scores are made."""
  names = ("calibrate", "canvases", "flip", "mil_share")
  values = {name: config.evaluation[name] for name in names}
  return {"step": step} | _jsonable(values)


def _jsonable(values: Any) -> dict[str, Any]:
  """Settings as they come back from a JSON file."""
  values = values.to_dict() if isinstance(values, Config) else values
  return json.loads(json.dumps(values))


def _has_truth(config: Config, data: PreparedData) -> bool:
  return "val" in data.splits and has_truth(
    data.splits["val"], task=config.task
  )


def _print_next(workdir: pathlib.Path) -> None:
  """How to go on, as a command to paste."""
  command = shlex.join(sys.argv)  # of a flag given twice the last one counts
  print(
    f"weights    {workdir / 'checkpoints'}\n"
    f"next       python {command} --mode=predict --input=FOLDER_OF_IMAGES"
  )


def predict_images(
  config: Config, workdir: pathlib.Path, where: PathOrUrl
) -> None:
  """Predicts images, one after the other; those that are done are skipped.

  Args:
    config: see configs/base.py.
    workdir: folder of the run; the results lie in its folder "predictions".
    where: see `data.image_files.find_images`.
  """
  directory = prepared_directory(config, workdir)
  categories = prepared.open_prepared(directory).categories
  files = find_images(where)
  place = data_path(where)
  if not is_folder(place):
    place = next(iter(files.values())).parent
  output = workdir / "predictions" / folder_name(place)
  maker = proposal_maker(config)
  step, model, variables, calibration = _trained(config, workdir, categories)
  settings = _jsonable(config.evaluation) | {"proposals": maker.key}

  def made_with(data: bytes) -> dict[str, Any]:
    return {"step": step, "image": digest(data), "settings": settings}

  todo = {}
  for name, path in progress(files.items(), "look", unit="image"):
    with contextlib.suppress(OSError):  # is reported below
      if is_done(output, name, made_with=made_with(read_bytes(path))):
        continue
    todo[name] = path
  print(f"predict: {len(files)} images, {len(files) - len(todo)} of them done")
  source = ImageFiles(todo, num_classes=len(categories))
  if len(source):
    path = output / "proposals" / maker.key
    _fill(config, source, path, maker)
    for prediction in predict(
      _steps(config, model, variables),
      source,
      stores.open_store(path),
      calibration=calibration,
      num_things=categories.num_things,
      settings=prediction_settings(config),
    ):
      n = prediction.index
      data = source[n].image
      write_prediction(
        output,
        source.names[n],
        prediction,
        categories,
        image=decode_image(data),
        file_name=source.paths[n].name,
        made_with=made_with(data),
      )
  whole = [name for name in files if name not in source.left_out]
  if not whole:
    raise InputError(f"{where}: no image can be decoded, see above")
  collect(output, whole, categories)
  if source.left_out:
    print(f"left out   {len(source.left_out)} images, see above")
  print(
    f"panoptic   {output / 'panoptic.json'} and {output / 'panoptic'}\n"
    f"classes    {output / 'classes'}, named in {output / 'classes.json'}\n"
    f"instances  {output / 'instances.json'}\n"
    f"boxes      {output / 'detections.json'}\n"
    f"overlays   {output / 'overlays'}"
  )


def export(config: Config, workdir: pathlib.Path) -> None:
  """Writes the trained model as files that jax and numpy alone can run."""
  directory = prepared_directory(config, workdir)
  categories = prepared.open_prepared(directory).categories
  _, model, variables, calibration = _trained(config, workdir, categories)
  settings = prediction_settings(config)
  output = workdir / "export"
  export_model(
    output,
    model,
    variables,
    canvases=settings.canvases,
    max_proposals=settings.max_proposals,
    max_superpixels=settings.max_superpixels,
    mil_share=config.evaluation.mil_share,
    description={
      "classes": categories.to_list(),
      "calibration": {
        name: values.tolist() for name, values in vars(calibration).items()
      },
      "settings": dataclasses.asdict(settings),
    },
  )
  print(f"model      {output} (docs/export.md tells how to run it)")


def _trained(config, workdir, categories):
  """The last step, the model, its weights and its calibration."""
  model = build.build_model(config, categories)
  step, variables = checkpoints.restore_variables(workdir / "checkpoints")
  variables = jax.device_put(variables)  # once, not with every batch
  calibration = ClassCalibration.neutral(len(categories))
  if config.evaluation.calibrate:
    calibration = load_calibration(
      workdir / "calibration.json",
      categories,
      made_with=_made_with(config, step),
    )
  return step, model, variables, calibration
