"""Mean intersection over union of classes (mIoU), streamed over images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jtsm_jax.evaluation.panoptic_quality import overlap_counts
from jtsm_jax.types import Categories, PanopticMap


@dataclasses.dataclass
class SemanticIoU:
  """The counts behind mIoU; start with `SemanticIoU(categories)`.

  Attributes:
    categories: the K classes.
    confusion: [K + 1, K] int64 pixels, predicted class by target class; the
      last row is void in the prediction, which is an error like any other.
      Void in the target is not counted at all.
  """

  categories: Categories
  confusion: np.ndarray | None = None

  def __post_init__(self):
    if self.confusion is None:
      k = len(self.categories)
      self.confusion = np.zeros((k + 1, k), np.int64)

  def add(self, prediction: PanopticMap, target: PanopticMap) -> None:
    """Counts one image; instances and crowds count as pixels of their class.

    Args:
      prediction: what the model gave.
      target: the ground truth of the same image, in the same size.

    Raises:
      ValueError: the sizes differ, the ids of a map and its segments differ, or
        a category is not one of `categories`.
    """
    k = len(self.categories)
    predicted, actual, overlap = overlap_counts(prediction, target, k)
    rows = np.array([k, *(s.category for s in predicted)])
    columns = np.array([s.category for s in actual], np.int64)
    np.add.at(self.confusion, (rows[:, None], columns[None]), overlap[:, 1:])

  def merge(self, other: SemanticIoU) -> SemanticIoU:
    """Adds the counts of `other` to these, and returns these.

    Raises:
      ValueError: the two count different categories.
    """
    if self.categories != other.categories:
      raise ValueError(
        f"cannot merge the IoU of {other.categories.names} into that of"
        f" {self.categories.names}: both must count the same categories"
      )
    self.confusion = self.confusion + other.confusion
    return self

  def result(self) -> dict[str, Any]:
    """IoU = correct / (predicted + target - correct) pixels, in percent.

    Returns:
      {"miou": float, 0 .. 100, the mean over the "n" classes that are in a
      target or in a prediction; "pixel_accuracy": float, 0 .. 100, over pixels
      that are not void; "per_class": {name: {"iou": float, "target_pixels",
      "predicted_pixels": int}}}. Percentages of nothing are 0.
    """
    correct = np.diagonal(self.confusion)
    predicted = self.confusion[:-1].sum(axis=1)
    target = self.confusion.sum(axis=0)
    union = predicted + target - correct
    iou = 100 * correct / np.maximum(union, 1)
    seen = union > 0
    return {
      "miou": float(iou[seen].mean()) if seen.any() else 0.0,
      "n": int(seen.sum()),
      "pixel_accuracy": float(100 * correct.sum() / max(target.sum(), 1)),
      "per_class": {
        name: {
          "iou": float(iou[c]),
          "target_pixels": int(target[c]),
          "predicted_pixels": int(predicted[c]),
        }
        for c, name in enumerate(self.categories.names)
      },
    }
