"""What the training tags tell about each class's scores.

Scores of different classes are not on one scale: a class that shares its images
with many others earns lower ones. The tags of the training images, the only
labels that there are, put them on one scale and tell where a class begins to be
present. No mask is needed, and none is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from jtsm_jax.types import Categories, InputError

NEVER = 2.0
"""The threshold of a class that no training image shows: never present."""


@dataclasses.dataclass(frozen=True)
class ClassCalibration:
  """Two numbers for each class.

  Attributes:
    tag_threshold: [K] float32; a class is present in an image where the image
      score y reaches it.
    score_scale: [K] float32; the typical score of the best proposal in the
      images that are tagged with the class.
  """

  tag_threshold: np.ndarray
  score_scale: np.ndarray

  @classmethod
  def neutral(cls, num_classes: int) -> ClassCalibration:
    """Every class may be present, and scores are left as they are (paper)."""
    return cls(
      np.zeros(num_classes, np.float32), np.ones(num_classes, np.float32)
    )

  def digest(self) -> str:
    """What tells these numbers from others, in 16 characters."""
    numbers = np.stack(dataclasses.astuple(self))
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def calibrate_classes(
  image_scores: np.ndarray, best_scores: np.ndarray, tags: np.ndarray
) -> ClassCalibration:
  """Learns the calibration from the tags of the training images.

  Args:
    image_scores: [N, K] float32, y.
    best_scores: [N, K] float32, the highest proposal score of each class.
    tags: [N, K] float32, 0 or 1.

  Returns:
    The thresholds with the best F1 of the tags, and the mean best score over
    the tagged images. A class without a tagged image, of which nothing was
    learnt, is never present.
  """
  num_classes = tags.shape[1]
  calibration = ClassCalibration.neutral(num_classes)
  for c in range(num_classes):
    tagged = tags[:, c] > 0
    if tagged.any():
      calibration.tag_threshold[c] = best_f1_threshold(
        image_scores[:, c], tagged
      )
      calibration.score_scale[c] = max(best_scores[tagged, c].mean(), 1e-6)
    else:
      calibration.tag_threshold[c] = NEVER
  return calibration


def best_f1_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
  """The threshold with the highest F1, in the middle of its gap.

  The middle is the geometric one, since scores of absent classes crowd at 0.

  Args:
    scores: [N] float, >= 0.
    positive: [N] bool, at least one True.
  """
  order = np.argsort(-scores, kind="stable")
  ranked = scores[order].astype(np.float64)
  hits = np.cumsum(positive[order])
  f1 = 2 * hits / (np.arange(len(order)) + 1 + positive.sum())
  # Equal scores stand or fall together: only the last of them is a cut.
  cut = np.append(ranked[1:] < ranked[:-1], True)
  best = int(np.where(cut, f1, -1).argmax())
  below = ranked[best + 1] if best + 1 < len(ranked) else 0.0
  return float(np.sqrt(max(ranked[best], 1e-12) * max(below, 1e-12)))


def save_calibration(
  path: pathlib.Path,
  calibration: ClassCalibration,
  categories: Categories,
  *,
  made_with: dict[str, Any],
) -> None:
  """Writes the calibration as JSON, class by class.

  Args:
    path: the file.
    calibration: to write.
    categories: the classes.
    made_with: what it holds for: step and hash of the weights, and the settings
      of the scores, as JSON knows them.
  """
  rows = {
    name: {"tag_threshold": float(t), "score_scale": float(s)}
    for name, t, s in zip(
      categories.names,
      calibration.tag_threshold,
      calibration.score_scale,
      strict=True,
    )
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    json.dumps({"made_with": made_with, "classes": rows}, indent=1)
  )


def load_calibration(
  path: pathlib.Path, categories: Categories, *, made_with: dict[str, Any]
) -> ClassCalibration:
  """Reads what `save_calibration` wrote.

  Raises:
    InputError: the file is absent, holds other classes, or was made with other
      weights or settings than `made_with` says.
  """
  remedy = "run --mode=evaluate to make it"
  try:
    content = json.loads(path.read_text())
    rows = content["classes"]
    # Calibrations of older versions do not tell the weights' hash.
    if {"weights": made_with["weights"]} | content["made_with"] != made_with:
      raise InputError(
        f"{path} was made with {content['made_with']}, wanted {made_with}; "
        + remedy
      )
    return ClassCalibration(
      *(
        np.array([rows[n][field] for n in categories.names], np.float32)
        for field in ("tag_threshold", "score_scale")
      )
    )
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path}: no calibration of the classes {', '.join(categories.names)} "
      f"({type(error).__name__}: {error}); {remedy}"
    ) from error
