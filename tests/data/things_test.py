"""Tests of data sets without their stuff."""

import tracemalloc

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


def random_map(seed, *, size=(40, 50), count=12):
  """Pieces of any shape, some of stuff, some of a few pixels, and void."""
  rng = np.random.default_rng(seed)
  ids = np.append(0, rng.choice(1 << 24, count, replace=False) + 1)
  order = rng.permutation(len(ids))
  coarse = rng.choice(order, (5, 4), p=rng.dirichlet(np.ones(len(order))))
  pieces = np.repeat(np.repeat(coarse, 8, 0), 13, 1)[: size[0], : size[1]]
  pieces[rng.random(size) < 0.02] = rng.integers(len(ids))
  ids = ids[pieces].astype(np.int32)
  return PanopticMap(
    ids,
    tuple(
      Segment(
        int(i),
        int(rng.integers(3)),
        bool(rng.random() < 0.7),
        1.0,
        int((ids == i).sum()),
        is_crowd=bool(rng.random() < 0.2),
      )
      for i in rng.permutation(np.unique(ids[ids > 0]))
    ),
  )


@pytest.mark.parametrize("seed", range(20))
def test_instances_are_those_of_whole_masks(seed):
  panoptic = random_map(seed)
  found = instances_of(panoptic)
  assert found.boxes.dtype == found.area.dtype == np.float64
  assert found.is_difficult.tolist() == [False] * len(found.category)
  things = [s for s in panoptic.segments if s.is_thing]
  for n, segment in enumerate(things):
    mask = panoptic.ids == segment.id
    y, x = np.nonzero(mask)
    box = [y.min(), x.min(), y.max() + 1, x.max() + 1]
    assert found.boxes[n].tolist() == box
    assert found.area[n] == mask.sum()
    rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    assert found.rles[n] == rle["counts"]
    assert found.category[n] == segment.category
    assert found.is_crowd[n] == segment.is_crowd
  assert len(found.category) == len(found.rles) == len(things)


def test_many_things_need_little_memory():
  # 100 whole masks would be 100 times 250,000 bytes.
  ids = (np.mgrid[:500, :500] // 50 * np.array([10, 1])[:, None, None]).sum(0)
  things = tuple(Segment(i, 0, True, 1.0, 2500) for i in range(1, 101))
  panoptic = PanopticMap(ids.astype(np.int32) + 1, things)
  tracemalloc.start()
  found = instances_of(panoptic)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert (found.area == 2500).all()
  assert peak < 8e6


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
