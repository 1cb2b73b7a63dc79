"""The modes of main.py: from prepare and train to predict and report.

Each function does one mode and nothing that is already done. This is where the
configuration is read and handed on as plain arguments.
"""

from __future__ import annotations

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

from jtsm_jax.console import say
from jtsm_jax.data import coco, folder, prepared, shapes, voc
from jtsm_jax.data.audit import audit, audit_table, class_table
from jtsm_jax.data.panoptic_files import write_panoptic
from jtsm_jax.data.pipeline import with_fallback
from jtsm_jax.data.prepare import prepare as write_prepared
from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.data.source import Source
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.data.verify import verify
from jtsm_jax.evaluation.class_calibration import (
  ClassCalibration,
  load_calibration,
  save_calibration,
)
from jtsm_jax.evaluation.evaluate import evaluate, write_metrics
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import DetectionSettings
from jtsm_jax.evaluation.panoptic_quality import format_table
from jtsm_jax.evaluation.predict import (
  PredictionSettings,
  learn_calibration,
  predict,
)
from jtsm_jax.mining.labels import slots_needed
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.proposals import importers, quality
from jtsm_jax.proposals import store as stores
from jtsm_jax.proposals.fill_store import Maker, fill_store, generator
from jtsm_jax.proposals.generate import ProposalSettings, preset_settings
from jtsm_jax.reporting import proposal_quality, report, stages
from jtsm_jax.reporting.mined_images import mine_images
from jtsm_jax.reporting.predictions import collect, write_prediction
from jtsm_jax.reporting.visualize import overlay_panoptic, write_image
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
  "train.checkpoint_every",
  "train.evaluate_every",
  "train.loader_threads",
  "evaluation",
  "report",
)
"""Fields that may change between two runs in one workdir."""

DATA_FIELDS = (
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

DATA_SETS = (
  "shapes",
  "folder",
  "voc_panoptic",
  "voc_detection",
  "coco_panoptic",
  "coco_instances",
)


def run(
  config: Config,
  workdir: pathlib.Path,
  *,
  mode: str,
  images: pathlib.Path | None = None,
  shard: int = 0,
  num_shards: int = 1,
) -> None:
  """Runs a mode of main.py.

  Args:
    config: see configs/base.py.
    workdir: folder of the run; made if absent.
    mode: "all", "prepare", "audit", "verify", "propose", "proposal_quality",
      "train", "evaluate", "predict" or "report".
    images: folder of images, for "predict".
    shard, num_shards: which part of the images, for "prepare" and "propose".

  Raises:
    InputError: a path, a file or a field of the configuration is at fault.
  """
  if mode in ("evaluate", "predict", "report") and not _is_trained(workdir):
    raise InputError(
      f"{workdir / 'checkpoints'}: there are no checkpoints; train first "
      "(--mode=train), or check --workdir"
    )
  build.check_fields(config)  # wrong ones now, not after the proposals
  claim_workdir(workdir, config)
  if mode == "predict":
    return predict_folder(config, workdir, images)
  if mode == "prepare":
    data = prepare(config, workdir, shard=shard, num_shards=num_shards)
    if data is not None:
      print(class_table(data))
    return None
  if mode == "audit":
    return audit_data(config, workdir)
  if mode == "verify":
    return verify_data(config, workdir)
  data = prepare(config, workdir)
  if mode == "proposal_quality":
    return report_proposals(config, workdir, data)
  store = propose(config, workdir, data, shard=shard, num_shards=num_shards)
  if mode == "propose":
    print(f"proposals  {store.path} ({len(store)} images)")
    return None
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
  config: Config, workdir: pathlib.Path, *, shard: int = 0, num_shards: int = 1
) -> PreparedData | None:
  """Prepares the data set unless it is prepared, and opens it.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    shard, num_shards: which part of the data set to prepare. The last one to
      finish completes it.

  Returns:
    The data, or None while other shards are missing.
  """
  directory = prepared_directory(config, workdir)
  if not prepared.is_prepared(directory):
    is_complete = write_prepared(
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


def prepared_directory(config: Config, workdir: pathlib.Path) -> pathlib.Path:
  """Where the prepared data are."""
  return pathlib.Path(config.data.prepared or workdir / "data")


def data_source(config: Config) -> Source:
  """The data set that `config.data` names.

  Raises:
    InputError: there is none of this name, or its root is not given.
  """
  c = config.data
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
  shard: int = 0,
  num_shards: int = 1,
) -> stores.ProposalStore:
  """Gives proposals to every image that has none, and opens the store.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    data: the images.
    splits: of `data`; all of them if None.
    shard, num_shards: only each `num_shards`-th image, from `shard` on.
  """
  root = pathlib.Path(config.proposals.store or workdir / "proposals")
  maker = proposal_maker(config)
  # A store may serve several data sets, whose image ids may be the same.
  path = root / data.fingerprint / maker.key
  for split in splits or data.splits:
    _fill(
      config,
      data.splits[split],
      path,
      maker,
      shard=shard,
      num_shards=num_shards,
    )
  return stores.open_store(path)


def _fill(config, source, path, maker, **shards) -> None:
  fill_store(
    source,
    path,
    maker,
    num_workers=config.proposals.num_workers or None,
    max_bad_fraction=config.data.max_bad_fraction,
    report=logging.warning,
    **shards,
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
  if not _has_targets(data):
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
    mil_share=e.mil_share,
    mask_share=e.mask_share,
    semantic_share=e.semantic_share,
    detection=DetectionSettings(
      nms_iou=e.nms_iou,
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
    result = evaluate(
      _predictions(*args, calibration),
      data.splits["val"],
      data.categories,
    )
    say(format_table(result))
    return {
      "pq": result["all"]["pq"],
      "pq_things": result["things"]["pq"],
      "pq_stuff": result["stuff"]["pq"],
      "miou": result["semantic"]["miou"],
    }

  train(
    config,
    workdir,
    data=data,
    store=store,
    evaluate=evaluate_state if _has_targets(data) else None,
    show_mined=functools.partial(
      _draw_mined, workdir / "mining", data, with_fallback(store)
    ),
  )


def _draw_mined(directory, data, get_proposals, batch, mined, futures) -> None:
  """One picture for each image of a training batch; see `train.loop.train`."""
  source = data.splits["train"]
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
    sheet = stages.mining_sheet(image, rows, data.categories)
    write_image(directory / f"{image_id}.jpg", sheet)


def _calibrate(
  config, workdir, model, variables, data, store
) -> ClassCalibration:
  if not config.evaluation.calibrate:
    return ClassCalibration.neutral(len(data.categories))
  source = data.splits["train"]
  return learn_calibration(
    model,
    variables,
    source,
    store,
    settings=prediction_settings(config),
    cache=build.open_feature_cache(
      config, workdir, model, variables, source, split="train"
    ),
  )


def _predictions(config, workdir, model, variables, data, store, calibration):
  source = data.splits["val"]
  return predict(
    model,
    variables,
    source,
    store,
    calibration=calibration,
    num_things=data.categories.num_things,
    settings=prediction_settings(config),
    cache=build.open_feature_cache(
      config, workdir, model, variables, source, split="val"
    ),
    description="evaluate",
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
  if not _has_targets(data):
    print("evaluate: there is no ground truth of validation images to compare")
    _print_next(workdir)
    return
  source = data.splits["val"]
  get_proposals = with_fallback(store)
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
    if not config.evaluation.pictures or prediction.index % shown:
      return
    sheet = stages.prediction_sheet(
      image,
      get_proposals(name, image.shape[:2]),
      prediction.panoptic,
      source.target(prediction.index),
      data.categories,
    )
    write_image(folder_ / "overlays" / f"{name}.jpg", sheet)

  result = evaluate(
    _predictions(*args, calibration),
    source,
    data.categories,
    on_prediction=keep,
  )
  collect(folder_ / "predictions", predicted, data.categories)
  write_metrics(
    folder_ / "metrics.json", {"step": step, "split": "val"} | result
  )
  print(format_table(result))
  print(f"mIoU {result['semantic']['miou']:.1f}")
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
        model,
        variables,
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
  values = {"step": step} | {name: config.evaluation[name] for name in names}
  return json.loads(json.dumps(values))


def _has_targets(data: PreparedData) -> bool:
  return "val" in data.splits and data.splits["val"].has_targets


def _print_next(workdir: pathlib.Path) -> None:
  """How to go on, as a command to paste."""
  command = shlex.join(sys.argv)  # of a flag given twice the last one counts
  print(
    f"weights    {workdir / 'checkpoints'}\n"
    f"next       python {command} --mode=predict --input=FOLDER_OF_IMAGES"
  )


def predict_folder(
  config: Config, workdir: pathlib.Path, images: pathlib.Path
) -> None:
  """Predicts a folder of images: COCO panoptic PNG + JSON and overlays."""
  directory = prepared_directory(config, workdir)
  categories = prepared.open_prepared(directory).categories
  source = folder.ImageFolder(images, num_classes=len(categories))
  output = workdir / "predictions" / images.resolve().name
  maker = proposal_maker(config)
  path = output / "proposals" / maker.key
  _fill(config, source, path, maker)
  store = stores.open_store(path)
  model = build.build_model(config, categories)
  step, variables = checkpoints.restore_variables(workdir / "checkpoints")
  variables = jax.device_put(variables)  # once, not with every batch
  if config.evaluation.calibrate:
    calibration = load_calibration(
      workdir / "calibration.json",
      categories,
      made_with=_made_with(config, step),
    )
  else:
    calibration = ClassCalibration.neutral(len(categories))
  predictions = predict(
    model,
    variables,
    source,
    store,
    calibration=calibration,
    num_things=categories.num_things,
    settings=prediction_settings(config),
  )

  def results():
    for prediction in predictions:
      name = source.stems[prediction.index]
      image = decode_image(source[prediction.index].image)
      write_image(
        output / "overlays" / f"{name}.jpg",
        overlay_panoptic(image, prediction.panoptic, categories),
      )
      yield name, source.names[prediction.index], prediction.panoptic

  write_panoptic(
    output / "panoptic.json", output / "panoptic", results(), categories
  )
  print(f"panoptic   {output / 'panoptic.json'} and {output / 'panoptic'}")
  print(f"overlays   {output / 'overlays'}")
