"""Tests of the quality measures, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import quality
from jtsm_jax.types import PanopticMap, Proposals, Segment


def make_case():
  superpixels = np.array([[0, 0, 1, 1], [2, 2, 3, 3]], np.int32)
  membership = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
  proposals = Proposals(
    superpixels,
    membership,
    np.zeros((3, 4), np.int32),
    np.array([3, 2, 1], np.float32),
  )
  ids = np.array([[7, 7, 7, 0], [9, 9, 9, 5]], np.int32)
  segments = (
    Segment(7, 0, True, 1.0, 3),
    Segment(9, 2, False, 1.0, 3),
    Segment(5, 1, True, 1.0, 1, is_crowd=True),
  )
  return proposals, PanopticMap(ids, segments)


def test_segment_iou_by_hand_without_void_and_crowds():
  # Void at the top right leaves 7 pixels; segment 7 is 3 of them.
  expected = [[3 / 7, 3 / 7], [3 / 3, 0], [2 / 3, 0]]
  np.testing.assert_allclose(quality.segment_iou(*make_case()), expected)


def test_best_iou_among_the_first():
  best = quality.best_iou(*make_case(), num=1)
  np.testing.assert_allclose(best.iou, [3 / 7, 3 / 7])
  best = quality.best_iou(*make_case())
  np.testing.assert_allclose(best.iou, [1, 3 / 7])
  np.testing.assert_array_equal(best.category, [0, 2])
  np.testing.assert_array_equal(best.is_thing, [True, False])


def test_summary():
  found = quality.summary([make_case(), make_case()], counts=(1, None))
  assert found["things/segments"] == 2
  assert found["things/J@1"] == pytest.approx(3 / 7)
  assert found["things/J@all"] == pytest.approx(1)
  assert found["things/recall50@1"] == 0
  assert found["things/recall50@all"] == 1
  assert found["stuff/J@all"] == pytest.approx(3 / 7)


def test_summary_without_segments_is_nan():
  proposals, target = make_case()
  found = quality.summary([(proposals, PanopticMap(target.ids * 0, ()))])
  assert np.isnan(found["stuff/J@100"])
  assert found["stuff/segments"] == 0


def test_sizes_must_agree():
  proposals, target = make_case()
  with pytest.raises(ValueError, match="same size"):
    quality.best_iou(proposals, PanopticMap(target.ids[:1], target.segments))
