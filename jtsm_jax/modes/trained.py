"""What a finished training left, for the modes that use it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_collections

from jtsm_jax.backbones.pretrained import weights_hash
from jtsm_jax.data import prepared
from jtsm_jax.evaluation.class_calibration import (
  ClassCalibration,
  load_calibration,
)
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import DetectionSettings, Steps, make_steps
from jtsm_jax.evaluation.predict import PredictionSettings
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.modes.data import prepared_directory
from jtsm_jax.train import build, checkpoints, fields, origin
from jtsm_jax.types import Categories

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Trained:
  """The newest weights of a run.

  Attributes:
    categories: the classes that they were trained with.
    key: which weights they are, see `weights_key`.
    model: that they belong to.
    variables: what `model.apply` takes, on the device.
    calibration: of the classes, for these weights.
  """

  categories: Categories
  key: dict[str, Any]
  model: JTSM
  variables: Any
  calibration: ClassCalibration


def load_trained(
  config: Config, workdir: pathlib.Path, categories: Categories | None = None
) -> Trained:
  """Reads the newest checkpoint and the calibration that belongs to it.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    categories: the classes of the data that are used; None takes the run's own,
      for which no data are needed.

  Raises:
    InputError: one of them is missing, damaged, or made with other settings or
      classes.
  """
  folder = workdir / "checkpoints"
  if categories is None:
    categories = origin.classes_of(folder)
  if categories is None:  # older ones do not tell
    directory = prepared_directory(config, workdir)
    categories = prepared.open_prepared(directory).categories
  origin.check_classes(folder, categories)
  model = build.build_model(config, categories)
  step, variables = checkpoints.restore_variables(
    folder, averaged=config.evaluation.ema
  )
  key = weights_key(step, variables)
  calibration = ClassCalibration.neutral(len(categories))
  if config.evaluation.calibrate:
    calibration = load_calibration(
      workdir / "calibration.json",
      categories,
      made_with=key | score_settings(config),
    )
  # On the device once, not with every batch.
  variables = jax.device_put(variables)
  return Trained(categories, key, model, variables, calibration)


def steps_of(config: Config, model: JTSM, variables: Any) -> Steps:
  """The inference of some weights with the settings of the run."""
  return make_steps(
    model,
    variables,
    mil_share=config.evaluation.mil_share,
    proposal_block=config.evaluation.proposal_block,
  )


def prediction_settings(config: Config) -> PredictionSettings:
  """`config.evaluation` as plain settings."""
  e = config.evaluation
  return PredictionSettings(
    canvases=fields.canvases(config, "evaluation"),
    batch_size=e.batch_size,
    max_proposals=config.proposals.max_proposals,
    max_superpixels=config.proposals.num_superpixels,
    flip=e.flip,
    mask_share=e.mask_share,
    semantic_share=e.semantic_share,
    thing_channel=e.thing_channel,
    show_present=e.show_present,
    # Boxes are all that a detector tells.
    outline_rounds=0 if config.task == "detection" else e.outline_rounds,
    detection=DetectionSettings(
      nms_iou=e.nms_iou,
      nms_kind=e.nms_kind,
      max_detections=e.max_detections,
    ),
    fusion=FusionSettings(
      instance_score=e.instance_score,
      instance_overlap=e.instance_overlap,
      stuff_area=e.stuff_area,
    ),
  )


def weights_key(step: int, variables: Any) -> dict[str, Any]:
  """What tells weights from others, also from those of the same step."""
  return {"step": step, "weights": weights_hash(variables)}


def score_settings(config: Config) -> dict[str, Any]:
  """What a calibration depends on beside the weights: how scores are made."""
  names = ("calibrate", "canvases", "ema", "flip", "mil_share")
  return jsonable({name: config.evaluation[name] for name in names})


def result_settings(config: Config) -> dict[str, Any]:
  """`config.evaluation` without what changes no prediction."""
  settings = jsonable(config.evaluation)
  for name in ("batch_size", "pictures", "proposal_block", "voc_metric"):
    del settings[name]
  return settings


def jsonable(values: Any) -> dict[str, Any]:
  """Settings as they come back from a JSON file."""
  values = values.to_dict() if isinstance(values, Config) else values
  return json.loads(json.dumps(values))
