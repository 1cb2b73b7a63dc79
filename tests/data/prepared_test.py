"""Tests of prepared data sets."""

import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import prepared
from jtsm_jax.types import (
  Categories,
  InputError,
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
  Record("v0", encode(5, 7), 0, 0, (0, 1), TARGET),
  Record("v1", encode(9, 7), 0, 0, ()),
  Record("v2", encode(5, 7, 2), 0, 0, (0, 1), TARGET),
]


def source(train=TRAIN, val=VAL, **options):
  return prepared.Source("Test set", CATEGORIES, iter(train), val, **options)


@pytest.fixture
def directory(tmp_path):
  prepared.prepare(source(), tmp_path / "data")
  return tmp_path / "data"


def test_round_trip(directory):
  data = prepared.open_prepared(directory)
  assert data.name == "Test set"
  assert data.categories == CATEGORIES
  assert set(data.splits) == {"train", "val"}
  for split, records in (("train", TRAIN), ("val", VAL)):
    found = data.splits[split]
    assert len(found) == len(records)
    for i in reversed(range(len(records))):  # Random access.
      height = {"t-1.x": 5, "t-2.x": 6, "t-3.x": 7, "v1": 9}.get(
        records[i].image_id, 4 if split == "train" else 5
      )
      width = 6 if split == "train" else 7
      wanted = dataclasses.replace(
        records[i], height=height, width=width, target=None
      )
      assert found[i] == wanted
  train, val = data.splits["train"], data.splits["val"]
  assert train.image_ids == ("t-0.x", "t-1.x", "t-2.x", "t-3.x")
  np.testing.assert_array_equal(train.sizes, [[4, 6], [5, 6], [6, 6], [7, 6]])
  np.testing.assert_array_equal(train.tags, [[1, 0], [0, 0], [1, 1], [0, 1]])
  assert train.sizes.dtype == np.int32
  assert train.tags.dtype == np.float32
  assert [train.target(i) for i in range(4)] == [None] * 4
  assert val.target(1) is None
  for i in (0, 2):
    np.testing.assert_array_equal(val.target(i).ids, IDS)
    assert val.target(i).ids.dtype == np.int32
    assert val.target(i).segments == TARGET.segments


def test_index_errors(directory):
  train = prepared.open_prepared(directory).splits["train"]
  for i in (-1, 4):
    with pytest.raises(IndexError, match=str(i)):
      train[i]
    with pytest.raises(IndexError, match=str(i)):
      train.target(i)


def test_training_target_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"'v0' has a target.*target=None"):
    prepared.prepare(source(train=VAL), tmp_path / "data")
  assert list(tmp_path.iterdir()) == []


def test_train_files_hold_no_masks(directory):
  features = json.loads((directory / "images" / "features.json").read_text())
  names = features["featuresDict"]["features"]
  assert set(names) == {"image_id", "image", "size", "tags"}
  files = {p.name for p in (directory / "val_targets").glob("*array_record*")}
  assert len(files) == 1
  assert "-val." in files.pop()


WATCH = """
import ctypes, os, sys
from jtsm_jax.data import pipeline, prepared
libc = ctypes.CDLL(None, use_errno=True)
descriptor = libc.inotify_init1(os.O_NONBLOCK)
watched = os.path.join(sys.argv[1], "val_targets").encode()
if descriptor < 0 or libc.inotify_add_watch(descriptor, watched, 0x20) < 0:
  print("no inotify"); sys.exit(0)  # 0x20 is IN_OPEN.
def opened():
  try:
    return len(os.read(descriptor, 1 << 16))
  except BlockingIOError:
    return 0
data = prepared.open_prepared(sys.argv[1])
steps = pipeline.make_pipeline(
  data.splits["train"], {}, seed=0, canvases=((8, 8),), batch_size=2,
  max_proposals=2, max_superpixels=2, num_steps=6)
assert len(list(steps)) == 6
list(pipeline.inference_batches(
  data.splits["val"], {}, canvases=((8, 8),), batch_size=2, max_proposals=2,
  max_superpixels=2))
print("before", opened())
data.splits["val"].target(0)
print("after", opened())
"""


def test_no_mask_file_is_opened_until_a_target_is_asked_for(directory):
  # The kernel tells, since ArrayRecord opens files outside Python.
  run = subprocess.run(
    [sys.executable, "-c", WATCH, directory],
    cwd=pathlib.Path(prepared.__file__).parents[2],
    capture_output=True,
    text=True,
    check=True,
  )
  if "no inotify" in run.stdout:
    pytest.skip("the kernel has no inotify")
  before, after = run.stdout.split()[1::2]
  assert int(before) == 0
  assert int(after) > 0


def test_training_works_without_the_masks_and_a_target_says_so(directory):
  shutil.rmtree(directory / "val_targets")
  data = prepared.open_prepared(directory)
  assert data.splits["train"][3].image == TRAIN[3].image
  assert data.splits["val"][0].image == VAL[0].image
  with pytest.raises(InputError, match="val_targets: cannot be opened"):
    data.splits["val"].target(0)


def test_without_validation(tmp_path):
  prepared.prepare(source(val=None), tmp_path / "data")
  assert set(prepared.open_prepared(tmp_path / "data").splits) == {"train"}
  prepared.prepare(source(val=VAL[1:2]), tmp_path / "no_targets")
  val = prepared.open_prepared(tmp_path / "no_targets").splits["val"]
  assert val.target(0) is None


def test_bad_image_is_quarantined(tmp_path, capsys):
  bad = [Record("broken", encode(5, 7)[:60], 0, 0, (0,))]
  prepared.prepare(
    source(train=TRAIN[:2] + bad + TRAIN[2:], num_train=5, num_val=3),
    tmp_path / "data",
  )
  train = prepared.open_prepared(tmp_path / "data").splits["train"]
  assert train.image_ids == tuple(r.image_id for r in TRAIN)
  assert train[2].image == TRAIN[2].image
  (line,) = (tmp_path / "data" / "quarantine.txt").read_text().splitlines()
  assert line.startswith("broken: cannot be decoded (")
  assert "left out of train: broken: cannot" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [{}, {"num_train": 6, "num_val": 3}])
def test_too_many_bad_images_abort(tmp_path, counts):
  bad = [Record(f"bad{i}", b"", 0, 0, (0,)) for i in range(2)]
  with pytest.raises(InputError, match=r"2 of 9 .*0\.01.*\n  bad0: .*empty"):
    prepared.prepare(source(train=bad + TRAIN, **counts), tmp_path / "data")
  assert list(tmp_path.iterdir()) == []
  prepared.prepare(
    source(train=bad + TRAIN, **counts),
    tmp_path / "data",
    max_bad_fraction=0.3,
  )
  assert len(prepared.open_prepared(tmp_path / "data").splits["train"]) == 4


def test_empty_splits(tmp_path):
  with pytest.raises(InputError, match="'train' of 'Test set' has no image"):
    prepared.prepare(source(train=[]), tmp_path / "data")
  with pytest.raises(InputError, match="'val' of 'Test set' has no image"):
    prepared.prepare(source(val=[]), tmp_path / "data")


@pytest.mark.parametrize(
  ("record", "error", "message"),
  [
    (TRAIN[0], InputError, "'t-0.x' occurs twice in 'train'"),
    (Record("../x", b"", 0, 0, ()), InputError, "no safe file name"),
    (Record(".x", b"", 0, 0, ()), InputError, "no safe file name"),
    (Record("x", b"", 0, 0, (1, 0)), ValueError, r"\[1, 0\].*ascending"),
    (Record("x", b"", 0, 0, (0, 2)), ValueError, r"in 0 \.\. 1"),
  ],
)
def test_wrong_records(tmp_path, record, error, message):
  with pytest.raises(error, match=message):
    prepared.prepare(source(train=[*TRAIN, record]), tmp_path / "data")
  assert list(tmp_path.iterdir()) == []


def test_target_of_another_size(tmp_path):
  val = [dataclasses.replace(VAL[1], target=TARGET)]
  with pytest.raises(InputError, match=r"'v1' are 5 x 7 .* 9 x 7"):
    prepared.prepare(source(val=val), tmp_path / "data")


def test_a_failure_leaves_the_old_data_set(directory):
  def failing():
    yield TRAIN[0]
    raise RuntimeError("the disk is gone")

  with pytest.raises(RuntimeError, match="the disk is gone"):
    prepared.prepare(source(train=failing()), directory, overwrite=True)
  assert len(prepared.open_prepared(directory).splits["train"]) == 4
  assert list(directory.parent.iterdir()) == [directory]


def test_existing_directories(directory, tmp_path):
  with pytest.raises(InputError, match="overwrite=True"):
    prepared.prepare(source(), directory)
  prepared.prepare(source(train=TRAIN[:1]), directory, overwrite=True)
  assert len(prepared.open_prepared(directory).splits["train"]) == 1
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.txt").write_text("precious")
  with pytest.raises(InputError, match="choose another directory"):
    prepared.prepare(source(), other, overwrite=True)
  assert (other / "thesis.txt").read_text() == "precious"
  (other / "thesis.txt").unlink()
  prepared.prepare(source(), other)  # An empty directory will do.
  assert prepared.is_prepared(other)


def test_fingerprint_changes_with_ids_and_images_only(tmp_path):
  def fingerprints(name, **options):
    prepared.prepare(source(**options), tmp_path / name)
    data = prepared.open_prepared(tmp_path / name)
    return data.splits["train"].fingerprint, data.fingerprint

  train, both = fingerprints("first")
  assert len(train) == len(both) == 16
  assert fingerprints("second") == (train, both)
  retagged = [dataclasses.replace(TRAIN[0], tags=(1,)), *TRAIN[1:]]
  assert fingerprints("tags", train=retagged) == (train, both)
  for name, change in {
    "id": {"image_id": "other"},
    "image": {"image": encode(4, 6, 9)},
  }.items():
    changed = [*TRAIN[:1], dataclasses.replace(TRAIN[1], **change), *TRAIN[2:]]
    found = fingerprints(name, train=changed)
    assert found[0] != train
    assert found[1] != both
  found = fingerprints("val", val=VAL[:2])
  assert found[0] == train
  assert found[1] != both


def test_faults_when_opening(directory, tmp_path):
  assert not prepared.is_prepared(tmp_path)
  with pytest.raises(InputError, match=r"prepared\.json is missing"):
    prepared.open_prepared(tmp_path)
  info = directory / "prepared.json"
  content = json.loads(info.read_text())
  info.write_text(json.dumps(content | {"version": "0.1"}))
  assert not prepared.is_prepared(directory)
  with pytest.raises(InputError, match=r"version '0\.1'.*prepare .* again"):
    prepared.open_prepared(directory)
  info.write_text(json.dumps(content))
  (directory / "train_index.npz").write_bytes(b"PK nothing")
  with pytest.raises(InputError, match=r"train_index\.npz: cannot be read"):
    prepared.open_prepared(directory)


def test_tfds_reads_it_too(directory):
  tfds = pytest.importorskip("tensorflow_datasets")
  builder = tfds.builder_from_directory(directory / "images")
  example = builder.as_data_source("train")[2]
  with Image.open(io.BytesIO(TRAIN[2].image)) as image:
    np.testing.assert_array_equal(example["image"], np.asarray(image))
  assert builder.info.features["tags"].feature.names == ["cow", "blue sky"]
