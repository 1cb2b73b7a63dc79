"""Tests of verify: each way a record can go wrong is named."""

import dataclasses
import json

import numpy as np
import pytest

from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.verify import verify
from tests.data.small_set import IDS, INSTANCES, TARGET, VAL, encode, source


@pytest.fixture
def directory(tmp_path):
  prepare(source(), tmp_path / "data")
  return tmp_path / "data"


def change_index(directory, split, **changes):
  path = directory / f"{split}_index.npz"
  with np.load(path) as index:
    arrays = dict(index)
  for name, (i, value) in changes.items():
    arrays[name][i] = value
  np.savez(path, **arrays)


def test_a_sound_data_set(directory):
  assert verify(directory) == []


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"digests": (2, "0" * 64)}, "train/t-2.x: the image is not the one"),
    ({"sizes": (2, (9, 6))}, "train/t-2.x: the image is (6, 6), the index"),
    ({"tags": (2, (1, 0))}, "train/t-2.x: the tags are (0, 1), the index"),
    ({"image_ids": (2, "t-9.x")}, "train/t-9.x: "),
  ],
)
def test_records_that_are_not_those_of_the_index(directory, change, message):
  change_index(directory, "train", **change)
  (line,) = verify(directory)
  assert line.startswith(message)


def test_a_damaged_file_names_the_record_that_is_hit(directory):
  (path,) = (directory / "images").glob("data-train*")
  data = bytearray(path.read_bytes())
  found = data.find(encode(5, 6, 1)[40:60])  # in the image of t-1.x
  assert found > 0
  data[found] ^= 255
  path.write_bytes(data)
  lines = verify(directory)
  assert lines
  assert all(line.startswith("train/t-1.x: ") for line in lines)


def test_a_missing_file(directory):
  for path in (directory / "panoptic").glob("data-val*"):
    path.unlink()
  lines = verify(directory)
  assert [line.split(":")[0] for line in lines] == ["val/v0", "val/v2"]
  assert all("cannot be" in line for line in lines)


WRONG_AREA = dataclasses.replace(TARGET.segments[0], area=15)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {
        "target": dataclasses.replace(
          TARGET, segments=(WRONG_AREA, TARGET.segments[1])
        )
      },
      "val/v0: segments have the areas {2: 5, 70000: 14}, {70000: 15, 2: 5}",
    ),
    (
      {"target": dataclasses.replace(TARGET, ids=np.where(IDS == 2, 3, IDS))},
      "val/v0: segments have the areas {3: 5",
    ),
    (
      {
        "instances": dataclasses.replace(
          INSTANCES, boxes=np.add(INSTANCES.boxes, [0, 0, 3, 0])
        )
      },
      "val/v0: boxes leave the image of (5, 7)",
    ),
    (
      {"instances": dataclasses.replace(INSTANCES, rles=(b"11M0",))},
      "val/v0: 2 instances have other numbers",
    ),
  ],
)
def test_wrong_ground_truth(tmp_path, change, message):
  val = [dataclasses.replace(VAL[0], **change)]
  prepare(source(val=val), tmp_path / "data")
  (line,) = verify(tmp_path / "data")
  assert line.startswith(message)


def test_classes_that_are_not_there(directory):
  path = directory / "prepared.json"
  info = json.loads(path.read_text())
  del info["categories"][1]
  path.write_text(json.dumps(info))
  lines = verify(directory)
  assert any("segment 70000 has the unknown class 1" in x for x in lines)
