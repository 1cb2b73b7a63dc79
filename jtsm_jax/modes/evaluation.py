"""Evaluating the last checkpoint."""

from __future__ import annotations

import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from jtsm_jax.data.pipeline import with_fallback
from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.class_calibration import (
  ClassCalibration,
  save_calibration,
)
from jtsm_jax.evaluation.evaluate import (
  evaluate,
  has_truth,
  localisation,
  write_metrics,
)
from jtsm_jax.evaluation.predict import (
  Prediction,
  learn_calibration,
  predict,
)
from jtsm_jax.evaluation.tables import final_table, main_measures
from jtsm_jax.evaluation.voc_detection import write_server_files
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.modes.trained import (
  jsonable,
  prediction_settings,
  score_settings,
  steps_of,
  weights_key,
)
from jtsm_jax.proposals import store as stores
from jtsm_jax.reporting import stages
from jtsm_jax.reporting.gallery import spread
from jtsm_jax.reporting.predictions import collect, write_prediction
from jtsm_jax.reporting.visualize import write_image
from jtsm_jax.train import build, caches, checkpoints, origin
from jtsm_jax.train.metrics import MetricWriter

Config = ml_collections.ConfigDict


def run_evaluation(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  store: stores.ProposalStore,
  *,
  logs: bool = False,
) -> None:
  """Evaluates the last checkpoint: table, metrics.json and pictures.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    data: the split "val" is evaluated where it has ground truth; CorLoc is that
      of "corloc", the training images once more with their boxes; of "test",
      whose ground truth is not public, VOC's server gets the boxes.
    store: proposals of their images.
    logs: the training has ended here: add to its metrics what it has not
      evaluated itself.
  """
  origin.check_classes(workdir / "checkpoints", data.categories)
  model = build.build_model(config, data.categories)
  step, variables = checkpoints.restore_variables(
    workdir / "checkpoints", averaged=config.evaluation.ema
  )
  key = weights_key(step, variables)
  variables = jax.device_put(variables)  # once, not with every batch
  args = config, workdir, model, variables, data, store
  calibration = calibrate(*args)
  folder_ = workdir / "evaluation"
  made_with = key | score_settings(config)
  save_calibration(
    workdir / "calibration.json",
    calibration,
    data.categories,
    made_with=made_with,
  )
  measured, result = [], {"task": config.task}
  if has_truth(data):
    measured.append("val")
    result = _evaluate_val(*args, calibration, made_with=made_with)
  if "corloc" in data.splits:
    measured.append("corloc")
    result["corloc"] = localisation(
      predictions(*args, calibration, split="corloc"),
      data.splits["corloc"],
      data.categories,
    )
  server_files = folder_ / "results" / f"VOC{config.data.year}" / "Main"
  if "test" in data.splits:
    names = data.splits["test"].image_ids
    found = predictions(*args, calibration, split="test")
    write_server_files(
      server_files,
      ((names[p.index], p.detections) for p in found),
      data.categories,
    )

  if "val" in measured and logs:
    group = "val_averaged" if config.evaluation.ema else "val"
    with MetricWriter(workdir) as writer:
      if not writer.has(f"{group}/", step=step):
        found = main_measures(result)
        writer.write(step, {f"{group}/{k}": v for k, v in found.items()})
  if measured:
    settings = {"settings": jsonable(config.evaluation), "split": measured[0]}
    write_metrics(folder_ / "metrics.json", key | settings | result)
    print(final_table(result, result.get("corloc")))
  if "val" not in measured:
    print("evaluate: there is no ground truth of validation images to compare")
  elif result["task"] != config.task:
    print(
      f"measured as {result['task']!r}: for {config.task!r} val lacks "
      + ("panoptic masks" if config.task == "panoptic" else "masks")
    )
  if measured:
    print(f"\nfigures    {folder_ / 'metrics.json'}")
  if "test" in data.splits:
    print(f"server     {server_files}")
  if "val" in measured:
    print(f"predicted  {folder_ / 'predictions'}")
    print(f"pictures   {folder_ / 'overlays'}")
    if (workdir / "mining").is_dir():
      print(f"           {workdir / 'mining'}")
  _print_next(workdir)


def _evaluate_val(
  config, workdir, model, variables, data, store, calibration, *, made_with
) -> dict[str, Any]:
  """The figures of the validation images; keeps predictions and pictures."""
  source, output = data.splits["val"], workdir / "evaluation"
  shown = spread(len(source), config.evaluation.pictures)
  predicted = []

  def keep(prediction):
    name = source.image_ids[prediction.index]
    image = decode_image(source[prediction.index].image)
    predicted.append(name)
    write_prediction(
      output / "predictions",
      name,
      prediction,
      data.categories,
      image=image,
      file_name=source.file_names[prediction.index],
      source_id=source.source_ids[prediction.index],
      made_with=made_with,
    )
    if prediction.index in shown:
      name, sheet = prediction_sheet(data, store, prediction)
      write_image(output / "overlays" / f"{name}.jpg", sheet)

  result = evaluate(
    predictions(config, workdir, model, variables, data, store, calibration),
    source,
    data.categories,
    task=config.task,
    voc_metric=config.evaluation.voc_metric,
    on_prediction=keep,
  )
  collect(output / "predictions", predicted, data.categories)
  return result


def calibrate(
  config: Config,
  workdir: pathlib.Path,
  model: JTSM,
  variables: Any,
  data: PreparedData,
  store: stores.ProposalStore,
) -> ClassCalibration:
  """What the training tags tell of some weights, if the run asks for it."""
  if not config.evaluation.calibrate:
    return ClassCalibration.neutral(len(data.categories))
  source = data.splits["train"]
  return learn_calibration(
    steps_of(config, model, variables),
    source,
    store,
    settings=prediction_settings(config),
    cache=caches.open_feature_cache(
      config, workdir, model, variables, source, split="train"
    ),
  )


def predictions(
  config: Config,
  workdir: pathlib.Path,
  model: JTSM,
  variables: Any,
  data: PreparedData,
  store: stores.ProposalStore,
  calibration: ClassCalibration,
  *,
  split: str = "val",
) -> Iterator[Prediction]:
  """Predicts a split, from cached features where there are any."""
  source = data.splits[split]
  return predict(
    steps_of(config, model, variables),
    source,
    store,
    calibration=calibration,
    num_things=data.categories.num_things,
    settings=prediction_settings(config),
    cache=caches.open_feature_cache(
      config, workdir, model, variables, source, split=split
    ),
    description="evaluate" if split == "val" else split,
  )


def prediction_sheet(
  data: PreparedData, store: stores.ProposalStore, prediction: Prediction
) -> tuple[str, np.ndarray]:
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


def _print_next(workdir: pathlib.Path) -> None:
  """How to go on, as a command to paste."""
  flags = [x for x in sys.argv if not x.startswith("--mode=")]
  command = shlex.join(flags)
  print(
    f"weights    {workdir / 'checkpoints'}\n"
    f"next       python {command} --mode=predict --input=FOLDER_OF_IMAGES"
  )
