"""Thresholds worked by hand."""

import numpy as np
import pytest

from jtsm_jax.evaluation.class_calibration import (
  ClassCalibration,
  best_f1_threshold,
  calibrate_classes,
  load_calibration,
  save_calibration,
)
from jtsm_jax.types import Categories, Category, InputError

CATEGORIES = Categories((Category(7, "cow", True), Category(3, "sky", False)))
MADE = {"step": 7, "weights": "a1", "flip": True}


@pytest.mark.parametrize(
  ("scores", "positive", "low", "high"),
  [
    # F1 of the k best, of 3 positives: 2/4, 4/5, 4/6, 6/7, 6/8. The best cut
    # lies between the fourth and the fifth.
    ((0.9, 0.8, 0.7, 0.6, 0.1), (1, 1, 0, 1, 0), 0.1, 0.6),
    # A clean gap, in any order.
    ((0.1, 0.9, 0.2, 0.8), (0, 1, 0, 1), 0.2, 0.8),
    # Equal scores cannot be parted: 2/3 with all, 0 with none.
    ((0.5, 0.5), (1, 0), 0.0, 0.5),
    # All positive: nothing is cut off.
    ((0.3, 0.4), (1, 1), 0.0, 0.3),
  ],
)
def test_best_f1_threshold_lies_in_the_best_gap(scores, positive, low, high):
  found = best_f1_threshold(np.array(scores), np.array(positive, bool))
  assert low < found < high


def test_best_f1_threshold_against_every_cut():
  rng = np.random.default_rng(0)
  for _ in range(50):
    scores = rng.integers(1, 8, 12) / 10
    positive = rng.random(12) < 0.4
    positive[0] = True

    def f1(threshold, scores=scores, positive=positive):
      chosen = scores >= threshold
      return 2 * (chosen & positive).sum() / (chosen.sum() + positive.sum())

    best = max(f1(t) for t in scores)
    assert f1(best_f1_threshold(scores, positive)) == pytest.approx(best)


def test_scale_is_the_mean_best_score_of_tagged_images():
  tags = np.array([[1, 0], [1, 0], [0, 0]], np.float32)
  y = np.array([[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]], np.float32)
  best = np.array([[0.2, 0.5], [0.6, 0.5], [0.9, 0.5]], np.float32)
  found = calibrate_classes(y, best, tags)
  assert 0.1 < found.tag_threshold[0] < 0.8
  assert found.score_scale[0] == pytest.approx(0.4)
  # Of a class that no image is tagged with nothing was learnt.
  assert found.tag_threshold[1] > 1
  assert found.score_scale[1] == 1


def test_saved_and_loaded(tmp_path):
  path = tmp_path / "new" / "calibration.json"
  given = ClassCalibration(
    np.array([0.25, 0.5], np.float32), np.array([0.125, 1], np.float32)
  )
  save_calibration(path, given, CATEGORIES, made_with=MADE)
  found = load_calibration(path, CATEGORIES, made_with=MADE)
  np.testing.assert_array_equal(found.tag_threshold, given.tag_threshold)
  np.testing.assert_array_equal(found.score_scale, given.score_scale)
  # By name, not by position.
  swapped = load_calibration(
    path, Categories(CATEGORIES.items[::-1]), made_with=MADE
  )
  assert swapped.tag_threshold.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("content", [None, "nonsense", "[]", '{"cow": {}}'])
def test_unusable_files_are_input_errors(tmp_path, content):
  path = tmp_path / "calibration.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(InputError, match=r"calibration\.json.*cow, sky"):
    load_calibration(path, CATEGORIES, made_with=MADE)


def test_a_calibration_of_other_weights_is_refused(tmp_path):
  path = tmp_path / "calibration.json"
  neutral = ClassCalibration.neutral(2)
  save_calibration(path, neutral, CATEGORIES, made_with=MADE)
  with pytest.raises(InputError, match=r"'step': 7.*'step': 8"):
    load_calibration(path, CATEGORIES, made_with=MADE | {"step": 8})
  # Trained anew to the same step.
  with pytest.raises(InputError, match=r"'a1'.*'b2'.*run --mode=evaluate"):
    load_calibration(path, CATEGORIES, made_with=MADE | {"weights": "b2"})


def test_a_calibration_that_does_not_tell_its_weights_is_of_its_step(tmp_path):
  path = tmp_path / "calibration.json"
  old = {k: v for k, v in MADE.items() if k != "weights"}
  neutral = ClassCalibration.neutral(2)
  save_calibration(path, neutral, CATEGORIES, made_with=old)
  load_calibration(path, CATEGORIES, made_with=MADE)
  with pytest.raises(InputError, match=r"'step': 7.*'step': 8"):
    load_calibration(path, CATEGORIES, made_with=MADE | {"step": 8})
