"""Tests of the embedded data set."""

import numpy as np
import pytest

from jtsm_jax.data import shapes
from jtsm_jax.data.transforms import decode_image

THINGS = shapes.SHAPES_CATEGORIES.num_things


def test_categories():
  assert len(shapes.SHAPES_CATEGORIES) == 12
  assert THINGS == 8
  assert len(set(shapes.SHAPES_CATEGORIES.names)) == 12


@pytest.mark.parametrize("side", [64, 100, 160])
def test_masks_agree_with_tags(side):
  for index in range(6):
    image, panoptic, tags = shapes.generate_shapes(index, seed=1, side=side)
    assert image.shape == (side, side, 3)
    assert image.dtype == np.uint8
    assert panoptic.ids.shape == (side, side)
    assert panoptic.ids.dtype == np.int32
    ids, areas = np.unique(panoptic.ids, return_counts=True)
    assert ids.tolist() == [s.id for s in panoptic.segments]  # No void.
    assert areas.tolist() == [s.area for s in panoptic.segments]
    assert areas.min() >= 40
    assert tags == tuple(sorted({s.category for s in panoptic.segments}))
    things = [s for s in panoptic.segments if s.is_thing]
    stuff = [s for s in panoptic.segments if not s.is_thing]
    assert all(s.category < THINGS for s in things)
    assert all(s.category >= THINGS for s in stuff)
    assert 1 <= len(things) <= 5
    assert 1 <= len(stuff) <= 3
    assert len({s.category for s in stuff}) == len(stuff)


def test_same_arguments_give_the_same_picture():
  one, two = (shapes.generate_shapes(7, seed=2, side=80) for _ in range(2))
  np.testing.assert_array_equal(one[0], two[0])
  np.testing.assert_array_equal(one[1].ids, two[1].ids)
  assert one[1].segments == two[1].segments


def test_every_argument_changes_the_picture():
  pictures = [
    shapes.generate_shapes(index, seed=seed, side=80, split=split)[0]
    for index, seed, split in [
      (7, 2, "train"),
      (7, 2, "val"),
      (8, 2, "train"),
      (7, 3, "train"),
    ]
  ]
  assert len({p.tobytes() for p in pictures}) == 4


def test_classes_come_at_useful_rates_and_with_all_colours():
  tags = np.zeros((120, 12))
  colours = []
  for index in range(120):
    image, panoptic, present = shapes.generate_shapes(index, seed=0, side=64)
    tags[index, list(present)] = 1
    colours += [
      image[panoptic.ids == s.id].mean(0)
      for s in panoptic.segments
      if s.category == 0
    ]
  frequency = tags.mean(0)
  assert (frequency[:THINGS] > 0.15).all()
  assert (frequency[:THINGS] < 0.5).all()
  assert (frequency[THINGS:] > 0.3).all()
  assert (frequency[THINGS:] < 0.7).all()
  assert (np.std(colours, 0) > 20).all()  # Colour is no clue to the class.


def test_source_gives_targets_to_val_only():
  source = shapes.shapes_source(seed=0, side=64, num_train=3, num_val=2)
  train, val = (list(source.splits[s]) for s in ("train", "val"))
  assert (len(train), len(val)) == (3, 2)
  assert all(record.target is None for record in train)
  assert all(record.target is not None for record in val)
  ids = [record.image_id for record in train + val]
  assert len(set(ids)) == 5
  # The picture survives its JPEG encoding.
  image, panoptic, tags = shapes.generate_shapes(
    1, seed=0, side=64, split="val"
  )
  difference = decode_image(val[1].image).astype(int) - image
  assert np.abs(difference).mean() < 12
  np.testing.assert_array_equal(val[1].target.ids, panoptic.ids)
  assert val[1].tags == tags


def test_wrong_arguments():
  with pytest.raises(ValueError, match="side is 32"):
    shapes.generate_shapes(0, seed=0, side=32)
  with pytest.raises(ValueError, match="test"):
    shapes.generate_shapes(0, seed=0, split="test")
