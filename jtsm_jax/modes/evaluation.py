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
from jtsm_jax.reporting.predictions import collect, write_prediction
from jtsm_jax.reporting.visualize import write_image
from jtsm_jax.train import build, checkpoints, origin
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
    data: the split "val" is evaluated.
    store: proposals of its images.
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
  save_calibration(
    workdir / "calibration.json",
    calibration,
    data.categories,
    made_with=key | score_settings(config),
  )
  if not has_truth(data):
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
      made_with=key | score_settings(config),
    )
    if config.evaluation.pictures and prediction.index % shown == 0:
      name, sheet = prediction_sheet(data, store, prediction)
      write_image(folder_ / "overlays" / f"{name}.jpg", sheet)

  result = evaluate(
    predictions(*args, calibration),
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
      predictions(*args, calibration, split="corloc"),
      data.splits["corloc"],
      data.categories,
    )
    result["corloc"] = corloc
  made_with = key | {"settings": jsonable(config.evaluation), "split": "val"}
  write_metrics(folder_ / "metrics.json", made_with | result)
  if logs:
    group = "val_averaged" if config.evaluation.ema else "val"
    with MetricWriter(workdir) as writer:
      if not writer.has(f"{group}/", step=step):
        found = main_measures(result)
        writer.write(step, {f"{group}/{k}": v for k, v in found.items()})
  print(final_table(result, corloc))
  if result["task"] != config.task:
    print("no PQ: it needs panoptic masks, and val has instances alone")
  print(f"\nfigures    {folder_ / 'metrics.json'}")
  print(f"predicted  {folder_ / 'predictions'}")
  print(f"pictures   {folder_ / 'overlays'}")
  if (workdir / "mining").is_dir():
    print(f"           {workdir / 'mining'}")
  _print_next(workdir)


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
    cache=build.open_feature_cache(
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
    cache=build.open_feature_cache(
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
