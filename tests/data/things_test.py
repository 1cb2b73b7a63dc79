"""Tests of data sets without their stuff."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from jtsm_jax.data.source import Source
from jtsm_jax.data.things import instances_of, things_only
from jtsm_jax.types import (
  Categories,
  Category,
  PanopticMap,
  Record,
  Segment,
)

CATEGORIES = Categories(
  (
    Category(1, "cow", True),
    Category(2, "dog", True),
    Category(3, "sky", False),
  )
)
IDS = np.array([[0, 5, 5, 9], [0, 5, 7, 9]], np.int32)
PANOPTIC = PanopticMap(
  IDS,
  (
    Segment(5, 1, True, 1.0, 3),
    Segment(9, 2, False, 1.0, 2),
    Segment(7, 0, True, 1.0, 1, is_crowd=True),
  ),
)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_instances_of_a_map_by_hand():
  found = instances_of(PANOPTIC)
  assert found.category.tolist() == [1, 0]
  assert found.boxes.tolist() == [[0, 1, 2, 3], [1, 2, 2, 3]]
  assert found.area.tolist() == [3, 1]
  assert found.is_crowd.tolist() == [False, True]
  assert not found.is_difficult.any()
  for rle, id_ in zip(found.rles, (5, 7), strict=True):
    mask = mask_utils.decode({"size": [2, 4], "counts": rle})
    np.testing.assert_array_equal(mask, id_ == IDS)


def test_a_map_without_things():
  found = instances_of(PanopticMap(np.zeros((2, 2), np.int32), ()))
  assert found.boxes.shape == (0, 4)
  assert found.rles == ()


def test_stuff_is_left_out_of_tags_classes_and_ground_truth():
  train = [Record("a", b"", 2, 4, (1, 2)), Record("b", b"", 2, 4, (2,))]
  val = [Record("c", b"", 2, 4, (0, 1, 2), target=PANOPTIC)]
  source = Source("s", CATEGORIES, {"train": train, "val": val}, "cite")
  found = things_only(source)
  assert found.categories.names == ("cow", "dog")
  assert [r.tags for r in found.splits["train"]] == [(1,), ()]
  (record,) = found.splits["val"]
  assert record.tags == (0, 1)
  assert record.target is None
  assert record.instances.category.tolist() == [1, 0]
  assert (found.name, found.citation) == ("s", "cite")
  assert all(r.instances is None for r in found.splits["train"])
  assert things_only(found) is found


def test_instances_of_its_own_are_kept():
  mine = instances_of(PANOPTIC)
  val = [Record("c", b"", 2, 4, (0,), target=PANOPTIC, instances=mine)]
  source = Source("s", CATEGORIES, {"val": val})
  assert things_only(source).splits["val"][0].instances is mine
