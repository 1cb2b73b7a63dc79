"""Matching and AP against cases worked by hand."""

import numpy as np
import pytest

from jtsm_jax.evaluation.average_precision import (
  FALSE,
  IGNORED,
  TRUE,
  average_precision,
  match_to_best,
)

T, F, I = TRUE, FALSE, IGNORED  # noqa: E741


@pytest.mark.parametrize(
  ("iou", "ignored", "expected"),
  [
    # The second of two detections of one object is false.
    ([[0.9], [0.8]], [False], [T, F]),
    # It looks at the object it overlaps most, though another is free.
    ([[0.9, 0.1], [0.7, 0.6]], [False, False], [T, F]),
    # Exactly the threshold is enough; less is not.
    ([[0.5], [0.49]], [False], [T, F]),
    ([[0.4999]], [False], [F]),
    # Any number of detections of a difficult object are ignored.
    ([[0.9], [0.8]], [True], [I, I]),
    # A difficult object does not excuse what looks at another one.
    ([[0.6, 0.7], [0.8, 0.6], [0.8, 0.7]], [True, False], [T, I, I]),
    # Of equal overlaps the first object counts.
    ([[0.6, 0.6], [0.6, 0.6]], [False, True], [T, F]),
    # Nothing to look at.
    (np.zeros((2, 0)), [], [F, F]),
    (np.zeros((0, 2)), [False, False], []),
  ],
)
def test_matching_by_hand(iou, ignored, expected):
  found = match_to_best(
    np.array(iou, float), np.array(ignored, bool), threshold=0.5
  )
  assert found.tolist() == expected


@pytest.mark.parametrize(
  ("outcome", "objects", "area", "eleven"),
  [
    # Recall 1/2, 1/2, 1; precision 1, 1/2, 2/3.
    ([T, F, T], 2, (1 + 2 / 3) / 2, (6 + 5 * 2 / 3) / 11),
    # Precision rises again to 2/3 at recall 1/2 and must not be lost.
    ([F, T, T], 4, 0.5 * 2 / 3, 6 * 2 / 3 / 11),
    # Ignored ones count nowhere, the first included.
    ([I, T, I, F, T], 2, (1 + 2 / 3) / 2, (6 + 5 * 2 / 3) / 11),
    # Recall 3/10 reaches the fourth of the eleven points.
    ([T, T, T], 10, 0.3, 4 / 11),
    ([T], 1, 1, 1),
    ([F], 1, 0, 0),
    ([I], 1, 0, 0),
    ([], 3, 0, 0),
    ([F, F], 0, 0, 0),
  ],
)
def test_ap_by_hand(outcome, objects, area, eleven):
  score = -np.arange(len(outcome), dtype=float)
  shuffled = np.random.default_rng(0).permutation(len(outcome))
  for metric, expected in (("area", area), ("11point", eleven)):
    found = average_precision(
      score[shuffled],
      np.array(outcome, np.int8)[shuffled],
      objects,
      metric=metric,
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_equal_scores_keep_their_order():
  outcomes = np.array([TRUE, FALSE]), np.array([FALSE, TRUE])
  found = [average_precision(np.ones(2), o, 1, metric="area") for o in outcomes]
  assert found == [1, 0.5]


def test_unknown_metric():
  with pytest.raises(ValueError, match="'coco', wanted one of"):
    average_precision(np.ones(1), np.ones(1), 1, metric="coco")
