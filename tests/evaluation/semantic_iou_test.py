"""mIoU against a pixel loop and hand-worked cases."""

import numpy as np
import pytest

from jtsm_jax.evaluation.semantic_iou import SemanticIoU
from tests.evaluation.panoptic_quality_test import (
  CATEGORIES,
  COW,
  DOG,
  GOOD,
  GRASS,
  jittered,
  panoptic,
  random_map,
)


def test_by_hand():
  target = panoptic([[1, 1, 0, 2], [1, 3, 0, 2]], {1: COW, 2: GRASS, 3: COW})
  prediction = panoptic([[1, 0, 1, 2], [1, 1, 2, 1]], {1: COW, 2: GRASS})
  iou = SemanticIoU(CATEGORIES)
  iou.add(prediction, target)
  result = iou.result()
  # Cow: 3 right, 1 lost to void, 1 grass taken; two instances are one class.
  assert result["per_class"]["cow"] == {
    "iou": pytest.approx(100 * 3 / 5),
    "target_pixels": 4,
    "predicted_pixels": 4,
  }
  assert result["per_class"]["grass"]["iou"] == pytest.approx(50)
  assert result["n"] == 2
  assert result["miou"] == pytest.approx(55)
  assert result["pixel_accuracy"] == pytest.approx(100 * 4 / 6)


def test_class_that_is_only_predicted_enters_the_mean():
  iou = SemanticIoU(CATEGORIES)
  iou.add(panoptic([[1, 2]], {1: COW, 2: DOG}), panoptic([[1, 1]], {1: COW}))
  assert iou.result()["n"] == 2
  assert iou.result()["miou"] == pytest.approx(25)


def test_against_pixel_loop_and_merge():
  rng = np.random.default_rng(0)
  whole, parts = SemanticIoU(CATEGORIES), SemanticIoU(CATEGORIES)
  intersection, union = np.zeros(4), np.zeros(4)
  for _ in range(10):
    target = random_map(rng, crowds=True)
    prediction = jittered(rng, target)
    whole.add(prediction, target)
    part = SemanticIoU(CATEGORIES)
    part.add(prediction, target)
    parts = parts.merge(part)
    mine = {s.id: s.category for s in prediction.segments}
    truth = {s.id: s.category for s in target.segments}
    for p, t in zip(prediction.ids.flat, target.ids.flat, strict=True):
      if t == 0:
        continue
      for c in {mine.get(p), truth[t]} - {None}:
        union[c] += 1
        intersection[c] += mine.get(p) == truth[t]
  expected = 100 * intersection / union
  for state in (whole, parts):
    result = state.result()
    assert [v["iou"] for v in result["per_class"].values()] == pytest.approx(
      expected.tolist()
    )
    assert result["miou"] == pytest.approx(expected.mean())


def test_nothing_counted():
  result = SemanticIoU(CATEGORIES).result()
  assert (result["miou"], result["n"], result["pixel_accuracy"]) == (0, 0, 0)


def test_shapes_must_agree():
  with pytest.raises(ValueError, match="resize"):
    SemanticIoU(CATEGORIES).add(panoptic([[1]], {1: GRASS}), GOOD)
