"""A trained model as files that jax and numpy alone can run.

    FOLDER/score-HxW.stablehlo    the model on a canvas, in StableHLO
    FOLDER/masks-HxW.stablehlo    its instance branch, if it has one
    FOLDER/weights.safetensors    the weights, the first argument of both
    FOLDER/model.json             arguments, classes, calibration, settings

The functions run on CPUs, NVIDIA GPUs and TPUs, for batches of any size.
docs/export.md has a loader without this package.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export

from jtsm_jax.data.files import write_file
from jtsm_jax.evaluation.class_calibration import ClassCalibration
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import (
  DetectionSettings,
  Scores,
  Steps,
  make_mask_step,
  make_score_step,
)
from jtsm_jax.evaluation.predict import PredictionSettings
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.proposals.generate import ProposalSettings
from jtsm_jax.types import Batch, Categories, InputError

FORMAT = "2"
PLATFORMS = ("cpu", "cuda", "tpu")
INPUTS = ("images", "superpixels", "member_bits", "boxes", "valid")
"""The fields of `types.Batch` that the inference reads."""


@dataclasses.dataclass(frozen=True)
class Exported:
  """A model from its files, and what else `evaluation.predict.predict` takes.

  Attributes:
    steps: the functions.
    categories: the classes.
    calibration: of their scores.
    settings: from scores to panoptic maps.
    proposals: how the images' proposals are made; None where they were
      imported.
  """

  steps: Steps
  categories: Categories
  calibration: ClassCalibration
  settings: PredictionSettings
  proposals: ProposalSettings | None


def export_model(
  folder: pathlib.Path,
  model: JTSM,
  variables: Any,
  *,
  categories: Categories,
  calibration: ClassCalibration,
  settings: PredictionSettings,
  proposals: ProposalSettings | None,
  mil_share: float,
  proposal_block: int = 0,
) -> None:
  """Writes the inference of a trained model.

  Args:
    folder: see above; made if it is absent.
    model: the model.
    variables: its weights.
    categories, calibration, proposals: see `Exported`.
    settings: see `Exported`; two functions are written for each canvas.
    mil_share, proposal_block: see `inference.make_score_step`.
  """
  flat = flax.traverse_util.flatten_dict(jax.device_get(variables), sep="/")
  weights = {
    name: np.asarray(value)
    for name, value in flat.items()
    if not name.startswith("params/tag_head/")  # of the warm-up alone
  }
  data = safetensors.numpy.save(weights)
  write_file(folder / "weights.safetensors", data)
  score = make_score_step(
    model, mil_share=mil_share, proposal_block=proposal_block
  )
  masks = make_mask_step(model) if model.instance is not None else None

  def score_images(weights, inputs):
    found = score(_nested(weights), _batch(inputs))
    return {k: v for k, v in vars(found).items() if v is not None}

  def mask_boxes(weights, inputs):
    return masks(_nested(weights), **inputs)

  weights = jax.tree.map(_shape, weights)
  signatures = {}

  def write(name, function, inputs):
    exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)
    data = exported(weights, inputs).serialize()
    write_file(folder / f"{name}.stablehlo", bytes(data))
    signatures[name] = _signature(inputs)

  for height, width in settings.canvases:
    b, n = jax_export.symbolic_shape("b, n")
    P, S = settings.max_proposals, settings.max_superpixels
    images = _input_shapes(b, height, width, P, S)
    write(f"score-{height}x{width}", score_images, images)
    if masks is not None:
      boxes = {
        "features": jax.eval_shape(score_images, weights, images)["features"],
        "boxes": jax.ShapeDtypeStruct((b, n, 4), np.float32),
        "category": jax.ShapeDtypeStruct((b, n), np.int32),
      }
      write(f"masks-{height}x{width}", mask_boxes, boxes)
  content = {
    "format": FORMAT,
    "functions": signatures,
    "classes": categories.to_list(),
    "calibration": {k: v.tolist() for k, v in vars(calibration).items()},
    "settings": dataclasses.asdict(settings),
    "proposals": proposals and dataclasses.asdict(proposals),
  }
  write_file(folder / "model.json", json.dumps(content, indent=1))


def load_exported(folder: pathlib.Path) -> Exported:
  """Reads the files of `export_model`.

  Raises:
    InputError: the files are absent, damaged, or of another version.
  """
  try:
    content = json.loads((folder / "model.json").read_text())
    if content["format"] != FORMAT:
      raise InputError(
        f"{folder}: is an export of format {content['format']}, here it is"
        f" {FORMAT}; run --mode=export again"
      )
    weights = safetensors.numpy.load_file(folder / "weights.safetensors")
    functions = {
      name: jax_export.deserialize(
        bytearray((folder / f"{name}.stablehlo").read_bytes())
      ).call
      for name in content["functions"]
    }
  except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
    raise InputError(
      f"{folder}: holds no exported model ({error}); run --mode=export"
    ) from error
  weights = jax.device_put(weights)
  canvas_of = {}  # by the size of the features, which tells the canvas

  def score(batch: Batch) -> Scores:
    height, width = batch.superpixels.shape[1:]
    inputs = {name: getattr(batch, name) for name in INPUTS}
    found = functions[f"score-{height}x{width}"](weights, inputs)
    canvas_of[found["features"].shape[1:3]] = f"{height}x{width}"
    return Scores(**{"semantic": None} | found)

  def masks(features, boxes, category):
    function = functions[f"masks-{canvas_of[features.shape[1:3]]}"]
    inputs = {"features": features, "boxes": boxes, "category": category}
    return function(weights, inputs)

  has_masks = any(name.startswith("masks-") for name in functions)
  return Exported(
    steps=Steps(score, masks if has_masks else None),
    categories=Categories.from_list(content["classes"]),
    calibration=ClassCalibration(
      **{k: np.float32(v) for k, v in content["calibration"].items()}
    ),
    settings=_prediction_settings(content["settings"]),
    proposals=content["proposals"] and ProposalSettings(**content["proposals"]),
  )


def _prediction_settings(values: dict[str, Any]) -> PredictionSettings:
  return PredictionSettings(
    **values
    | {
      "canvases": tuple(tuple(canvas) for canvas in values["canvases"]),
      "detection": DetectionSettings(**values["detection"]),
      "fusion": FusionSettings(**values["fusion"]),
    }
  )


def _input_shapes(b, height, width, P, S) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    "images": jax.ShapeDtypeStruct((b, height, width, 3), np.uint8),
    "superpixels": jax.ShapeDtypeStruct((b, height, width), np.int16),
    "member_bits": jax.ShapeDtypeStruct((b, S, -(-P // 8)), np.uint8),
    "boxes": jax.ShapeDtypeStruct((b, P, 4), np.float32),
    "valid": jax.ShapeDtypeStruct((b, P), np.bool_),
  }


def _shape(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _signature(inputs) -> dict[str, Any]:
  """Shape and dtype of each argument; a letter stands for any number."""
  return {
    name: {
      "shape": [d if isinstance(d, int) else str(d) for d in x.shape],
      "dtype": np.dtype(x.dtype).name,
    }
    for name, x in inputs.items()
  }


def _nested(weights):
  return flax.traverse_util.unflatten_dict(weights, sep="/")


def _batch(inputs) -> Batch:
  """A batch of the inputs; what the inference does not read is empty."""
  b = inputs["images"].shape[0]
  return Batch(
    **inputs,
    image_index=None,
    features=None,
    colour=None,
    size=None,
    flip=None,
    window=None,
    tags=jnp.zeros((b, 0)),
  )
