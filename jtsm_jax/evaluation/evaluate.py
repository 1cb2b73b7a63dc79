"""Runs a split with ground truth and reports the paper's measures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.evaluation.semantic_iou import SemanticIoU
from jtsm_jax.types import Categories, InputError


def evaluate(
  predictions: Iterable[Prediction],
  source: RecordSource,
  categories: Categories,
  *,
  on_prediction: Callable[[Prediction], None] = lambda prediction: None,
) -> dict[str, Any]:
  """PQ, SQ, RQ (all, things, stuff, each class) and mIoU of predictions.

  Args:
    predictions: of the images of `source`.
    source: with targets.
    categories: the classes.
    on_prediction: called with each prediction, to keep or draw it.

  Raises:
    InputError: an image of the split has no ground truth.
  """
  quality = PanopticQuality(categories)
  semantic = SemanticIoU(categories)
  for prediction in predictions:
    target = source.target(prediction.index)
    if target is None:
      raise InputError(
        f"image {source.image_ids[prediction.index]} has no ground truth: "
        "there is nothing to evaluate against; use --mode=predict"
      )
    quality.add(prediction.panoptic, target)
    semantic.add(prediction.panoptic, target)
    on_prediction(prediction)
  return quality.result() | {"semantic": semantic.result()}


def write_metrics(path: pathlib.Path, metrics: dict[str, Any]) -> None:
  """Writes the metrics as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(metrics, indent=1))
