"""Tests of the quality measures, worked by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from jtsm_jax.data.things import instances_of
from jtsm_jax.proposals import quality
from jtsm_jax.types import (
  Instances,
  PanopticMap,
  Proposals,
  Segment,
  pack_members,
)


def make_case():
  superpixels = np.array([[0, 0, 1, 1], [2, 2, 3, 3]], np.int32)
  membership = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
  proposals = Proposals(
    superpixels,
    pack_members(membership),
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


def test_iou_by_hand_without_void():
  # Void at the top right leaves 7 pixels; segment 7 is 3 of them.
  proposals, target = make_case()
  found = quality.mask_iou(
    proposals.superpixels,
    proposals.membership,
    np.stack([target.ids == 7, target.ids == 9]),
    target.ids != 0,
  )
  expected = [[3 / 7, 3 / 7], [3 / 3, 0], [2 / 3, 0]]
  np.testing.assert_allclose(found, expected)


def test_best_iou_among_the_first(monkeypatch):
  monkeypatch.setattr(quality, "COUNTS", (1, 3))
  proposals, target = make_case()
  truth = quality.segments_of_map(target)  # without the crowd
  best = quality.best_iou(proposals, truth)
  np.testing.assert_allclose(best.iou, [[3 / 7, 1], [3 / 7, 3 / 7]])
  np.testing.assert_array_equal(best.category, [0, 2])
  np.testing.assert_array_equal(best.is_thing, [True, False])
  np.testing.assert_array_equal(best.area, [3, 3])


def test_many_segments_need_little_memory():
  # 100 whole masks would be 100 times 250,000 bytes.
  ids = (np.mgrid[:500, :500] // 50 * np.array([10, 1])[:, None, None]).sum(0)
  proposals = Proposals(
    ids.astype(np.int32),
    pack_members(np.eye(100, dtype=bool)),
    np.zeros((100, 4), np.int32),
    np.linspace(1, 0, 100, dtype=np.float32),
  )
  target = PanopticMap(
    ids.astype(np.int32) + 1,
    tuple(Segment(i, 0, i % 2 > 0, 1.0, 2500) for i in range(1, 101)),
  )
  things = instances_of(target)  # every second one
  tracemalloc.start()
  both = [
    quality.best_iou(proposals, truth)
    for truth in (
      quality.segments_of_map(target),
      quality.segments_of_instances(things, ids.shape),
    )
  ]
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  for best, count in zip(both, (100, 50), strict=True):
    assert best.iou.shape == (count, len(quality.COUNTS))
    assert (best.iou == 1).all()
    assert (best.area == 2500).all()
  assert peak < 8e6


def test_masks_of_instances_may_overlap():
  proposals, _ = make_case()
  masks = np.zeros((4, 2, 4), bool)
  masks[0] = True
  masks[1, 0] = True
  masks[2, 1] = True  # a crowd
  rles = mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0), "u1"))
  instances = Instances(
    category=np.array([4, 2, 2, 1], np.int32),
    boxes=np.zeros((4, 4)),
    area=np.zeros(4),
    is_crowd=np.array([False, False, True, False]),
    is_difficult=np.zeros(4, bool),
    rles=tuple(rle["counts"] for rle in rles),  # the last one is empty
  )
  truth = quality.segments_of_instances(instances, (2, 4))
  np.testing.assert_array_equal(list(truth.masks()), masks[:2])
  np.testing.assert_array_equal(truth.area, [8, 4])
  assert truth.known.all()
  best = quality.best_iou(proposals, truth)
  np.testing.assert_allclose(best.iou[:, -1], [1, 1])
  np.testing.assert_array_equal(best.category, [4, 2])
  assert best.is_thing.all()


def segments(**columns):
  iou = np.array(columns["iou"])[:, None] * np.ones(len(quality.COUNTS))
  return quality.BestIou(
    iou=iou,
    category=np.array(columns["category"]),
    is_thing=np.array(columns["is_thing"]),
    area=np.array(columns["area"]),
  )


def test_summary_by_hand():
  found = quality.summary(
    segments(
      iou=[0.4, 0.6, 0.95, 0.7, 0.2],
      category=[0, 0, 1, 5, 5],
      is_thing=[True, True, True, False, False],
      area=[1023, 1024, 9216, 5, 50_000],
    )
  )
  things = found["things"]
  assert things["segments"] == 3
  assert things["J_i"] == pytest.approx([1.95 / 3] * 5)
  assert things["J_c"] == pytest.approx([(0.5 + 0.95) / 2] * 5)
  assert things["R@0.5"] == pytest.approx([2 / 3] * 5)
  assert things["R@0.7"] == pytest.approx([1 / 3] * 5)
  # Thresholds reached of ten: none, 0.5 .. 0.6, and all.
  assert things["AR"] == pytest.approx([(0 + 3 + 10) / 30] * 5)
  assert found["stuff"]["J_i"] == pytest.approx([0.45] * 5)
  assert found["all"]["segments"] == 5
  for name, value in (("small", 0.4), ("medium", 0.6), ("large", 0.95)):
    assert found[name]["J_i"] == pytest.approx([value] * 5)


def test_counts_that_no_image_reaches_are_left_out():
  assert quality.counts_up_to(4000) == list(quality.COUNTS)
  assert quality.counts_up_to(5000) == list(quality.COUNTS)
  assert quality.counts_up_to(600) == [100, 500, 600]
  assert quality.counts_up_to(500) == [100, 500]
  assert quality.counts_up_to(30) == [30]
  found = segments(iou=[0.4], category=[0], is_thing=[True], area=[5])
  assert quality.summary(found, most=600)["all"]["J_i"] == [0.4] * 3


def test_groups_without_segments_are_left_out():
  found = quality.summary(
    segments(iou=[0.4], category=[0], is_thing=[True], area=[5])
  )
  assert set(found) == {"things", "all", "small"}


def test_many_images_are_joined():
  proposals, target = make_case()
  one = quality.best_iou(proposals, quality.segments_of_map(target))
  both = quality.concatenate([one, one])
  assert both.iou.shape == (4, len(quality.COUNTS))
  np.testing.assert_array_equal(both.area, [3, 3, 3, 3])


def test_sizes_must_agree():
  proposals, target = make_case()
  cut = PanopticMap(target.ids[:1], target.segments)
  truth = quality.segments_of_map(cut)
  with pytest.raises(ValueError, match="same size"):
    quality.best_iou(proposals, truth)
