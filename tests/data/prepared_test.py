"""Tests of reading prepared data sets."""

import dataclasses
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from jtsm_jax.data import files, prepared
from jtsm_jax.data import prepare as preparation
from jtsm_jax.data.prepare import prepare
from jtsm_jax.types import InputError, Instances
from tests.data.small_set import (
  CATEGORIES,
  IDS,
  INSTANCES,
  TARGET,
  TRAIN,
  VAL,
  source,
)


@pytest.fixture
def directory(tmp_path):
  prepare(source(), tmp_path / "data")
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
        records[i],
        height=height,
        width=width,
        target=None,
        instances=None,
        file_name=records[i].file_name or records[i].image_id,
      )
      assert found[i] == wanted
  train, val = data.splits["train"], data.splits["val"]
  assert train.image_ids == ("t-0.x", "t-1.x", "t-2.x", "t-3.x")
  np.testing.assert_array_equal(train.sizes, [[4, 6], [5, 6], [6, 6], [7, 6]])
  np.testing.assert_array_equal(train.tags, [[1, 0], [0, 0], [1, 1], [0, 1]])
  assert train.sizes.dtype == np.int32
  assert train.tags.dtype == np.float32
  assert [train.target(i) for i in range(4)] == [None] * 4
  assert val.file_names == ("v 0.tif", "v1", "v2")
  assert val.source_ids == ("zero", None, 70_000)
  assert val.target(1) is None
  for i in (0, 2):
    np.testing.assert_array_equal(val.target(i).ids, IDS)
    assert val.target(i).ids.dtype == np.int32
    assert val.target(i).segments == TARGET.segments
  assert data.citation == "@book{cows}"


def test_instances_round_trip(directory):
  data = prepared.open_prepared(directory)
  train, val = data.splits["train"], data.splits["val"]
  assert [train.instances(i) for i in range(4)] == [None] * 4
  assert [val.instances(i) for i in range(2)] == [None] * 2
  assert not val.has_instances
  found = val.instances(2)
  assert found.rles == INSTANCES.rles
  for name in ("category", "boxes", "area", "is_crowd", "is_difficult"):
    wanted = getattr(INSTANCES, name)
    np.testing.assert_array_equal(getattr(found, name), wanted, name)


def test_instances_of_an_image_without_any(tmp_path):
  nothing = Instances(
    category=np.zeros(0, np.int32),
    boxes=np.zeros((0, 4)),
    area=np.zeros(0),
    is_crowd=np.zeros(0, bool),
    is_difficult=np.zeros(0, bool),
  )
  empty = dataclasses.replace(VAL[1], instances=nothing)
  prepare(source(val=[empty, VAL[2]]), tmp_path / "data")
  val = prepared.open_prepared(tmp_path / "data").splits["val"]
  for i, wanted in enumerate([nothing, INSTANCES]):
    found = val.instances(i)
    assert found.rles == wanted.rles
    for name in ("category", "boxes", "area", "is_crowd", "is_difficult"):
      array = getattr(found, name)
      assert array.dtype == getattr(wanted, name).dtype
      assert array.shape == getattr(wanted, name).shape


def test_index_errors(directory):
  train = prepared.open_prepared(directory).splits["train"]
  for i in (-1, 4):
    with pytest.raises(IndexError, match=str(i)):
      train[i]
    with pytest.raises(IndexError, match=str(i)):
      train.target(i)


def test_train_files_hold_no_masks(directory):
  features = json.loads((directory / "images" / "features.json").read_text())
  names = features["featuresDict"]["features"]
  assert set(names) == {"image_id", "image", "tags"}
  files = {p.name for p in (directory / "panoptic").glob("*array_record*")}
  assert len(files) == 1
  assert "-val." in files.pop()


WATCH = """
import ctypes, os, sys
from jtsm_jax.data import pipeline, prepared
libc = ctypes.CDLL(None, use_errno=True)
descriptor = libc.inotify_init1(os.O_NONBLOCK)
watched = os.path.join(sys.argv[1], "panoptic").encode()
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
  shutil.rmtree(directory / "panoptic")
  data = prepared.open_prepared(directory)
  assert data.splits["train"][3].image == TRAIN[3].image
  assert data.splits["val"][0].image == VAL[0].image
  with pytest.raises(InputError, match="panoptic: cannot be opened"):
    data.splits["val"].target(0)


def test_damaged_records_are_named_and_removed_ones_can_be_read(directory):
  before = prepared.open_prepared(directory).splits["train"]
  assert before[0].image == TRAIN[0].image
  [file] = (directory / "images").glob("data-train*")
  content = file.read_bytes()
  middle = len(content) // 2
  file.unlink()
  assert before[3].image == TRAIN[3].image  # the file is still open
  file.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
  after = prepared.open_prepared(directory).splits["train"]
  with pytest.raises(InputError, match=r"images: record \d+ of 'train' cannot"):
    [after[i] for i in range(len(after))]
  shutil.rmtree(directory / "images")
  gone = prepared.open_prepared(directory).splits["train"]
  with pytest.raises(InputError, match="images: cannot be opened"):
    gone[0]


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


def test_only_what_is_read_is_fetched_from_a_bucket(bucket, monkeypatch):
  monkeypatch.setattr(preparation, "PIECE", 1)
  prepare(source(), bucket)

  def fetched():
    copies = files.cache_folder()
    names = [name for name in files.file_names(copies) if "data-" in name]
    return {name.partition("data-")[2] for name in names if name[-1].isdigit()}

  data = prepared.open_prepared(bucket)
  assert [len(s) for s in data.splits.values()] == [4, 3]
  assert fetched() == set()
  train = pickle.loads(pickle.dumps(data.splits["train"]))
  assert train[2].image == TRAIN[2].image
  assert fetched() == {"train.array_record-00002-of-00004"}
  assert data.splits["val"].target(2).segments == TARGET.segments
  assert data.splits["val"].target(1) is None
  assert len(fetched()) == 2
  assert [r.image for r in train] == [r.image for r in TRAIN]
  assert len(fetched()) == 5
  bucket.fs.rm(f"{bucket.path}/panoptic", recursive=True)
  val = prepared.open_prepared(bucket).splits["val"]
  assert val[0].image == VAL[0].image
  with pytest.raises(InputError, match="panoptic: cannot be opened"):
    val.target(0)


def test_a_bucket_that_cannot_be_reached_is_not_an_empty_one(
  bucket, monkeypatch
):
  assert not prepared.is_prepared(bucket)

  def fail(*args, **kwargs):
    raise ConnectionError("no route")

  monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
  with pytest.raises(InputError, match=r"prepared\.json: .*no route"):
    prepared.is_prepared(bucket)


def test_tfds_reads_it_too(directory):
  tfds = pytest.importorskip("tensorflow_datasets")
  builder = tfds.builder_from_directory(directory / "images")
  example = builder.as_data_source("train")[2]
  with Image.open(io.BytesIO(TRAIN[2].image)) as image:
    np.testing.assert_array_equal(example["image"], np.asarray(image))
  assert builder.info.features["tags"].feature.names == ["cow", "blue sky"]
