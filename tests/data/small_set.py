"""A small data set with every kind of ground truth."""

import io

import numpy as np
from PIL import Image

from jtsm_jax.data.source import Source
from jtsm_jax.types import (
  Categories,
  Instances,
  PanopticMap,
  Record,
  Segment,
)

CATEGORIES = Categories.from_list(
  [
    {"id": 3, "name": "cow", "isthing": 1},
    {"id": 8, "name": "blue sky", "isthing": 0},
  ]
)
IDS = np.zeros((5, 7), np.int32)
IDS[1:3] = 70000
IDS[4, 2:] = 2
TARGET = PanopticMap(
  IDS,
  (
    Segment(70000, 1, False, 1.0, 14),
    Segment(2, 0, True, 1.0, 5, True),
  ),
)


INSTANCES = Instances(
  category=np.array([0, 0], np.int32),
  boxes=np.array([[0, 1, 2.5, 3], [4, 2, 5, 7.0]]),
  area=np.array([5.0, 4.5]),
  is_crowd=np.array([False, True]),
  is_difficult=np.array([True, False]),
  rles=(b"11M0", b"`1K"),
)


def encode(height, width, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  data = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(data, format="PNG")
  return data.getvalue()


TRAIN = [
  Record(f"t-{i}.x", encode(4 + i, 6, i), 0, 0, tags)
  for i, tags in enumerate([(0,), (), (0, 1), (1,)])
]
VAL = [
  Record(
    "v0",
    encode(5, 7),
    0,
    0,
    (0, 1),
    TARGET,
    file_name="v 0.tif",
    source_id="zero",
  ),
  Record("v1", encode(9, 7), 0, 0, ()),
  Record(
    "v2", encode(5, 7, 2), 0, 0, (0, 1), TARGET, INSTANCES, source_id=70_000
  ),
]


def source(train=TRAIN, val=VAL, name="Test set") -> Source:
  splits = {"train": train} if val is None else {"train": train, "val": val}
  return Source(name, CATEGORIES, splits, citation="@book{cows}")
