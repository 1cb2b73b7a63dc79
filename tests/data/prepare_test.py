"""Tests of writing prepared data sets."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from jtsm_jax.data import prepare as preparation
from jtsm_jax.data import prepared
from jtsm_jax.data.audit import audit
from jtsm_jax.data.coco import coco_panoptic_source
from jtsm_jax.data.files import file_names, read_file, write_file
from jtsm_jax.data.panoptic_files import write_panoptic
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.shapes import shapes_source
from jtsm_jax.data.source import LazyRecords
from jtsm_jax.data.verify import verify
from jtsm_jax.types import InputError, Record
from tests.data.array_records_test import files_no_longer_than
from tests.data.small_set import TARGET, TRAIN, VAL, encode, source


@pytest.fixture
def directory(tmp_path):
  prepare(source(), tmp_path / "data")
  return tmp_path / "data"


def test_training_target_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"'v0' has ground truth.*target=None"):
    prepare(source(train=VAL), tmp_path / "data")
  assert not prepared.is_prepared(tmp_path / "data")


def test_without_validation(tmp_path):
  prepare(source(val=None), tmp_path / "data")
  assert set(prepared.open_prepared(tmp_path / "data").splits) == {"train"}
  prepare(source(val=VAL[1:2]), tmp_path / "no_targets")
  val = prepared.open_prepared(tmp_path / "no_targets").splits["val"]
  assert val.target(0) is None


def test_bad_image_is_quarantined(tmp_path, capsys):
  bad = [Record("broken", encode(5, 7)[:60], 0, 0, (0,))]
  prepare(
    source(train=TRAIN[:2] + bad + TRAIN[2:]),
    tmp_path / "data",
  )
  train = prepared.open_prepared(tmp_path / "data").splits["train"]
  assert train.image_ids == tuple(r.image_id for r in TRAIN)
  assert train[2].image == TRAIN[2].image
  (line,) = (tmp_path / "data" / "quarantine.txt").read_text().splitlines()
  assert line.startswith("broken: cannot be decoded (")
  assert "left out of train: broken: cannot" in capsys.readouterr().err


@pytest.mark.parametrize("piece", [2, 500])
def test_too_many_bad_images_abort(monkeypatch, tmp_path, piece):
  monkeypatch.setattr(preparation, "PIECE", piece)
  bad = [Record(f"bad{i}", b"", 0, 0, (0,)) for i in range(2)]
  with pytest.raises(InputError, match=r"2 of 9 .*0\.01.*\n  bad0: .*empty"):
    prepare(source(train=bad + TRAIN), tmp_path / "data")
  assert not prepared.is_prepared(tmp_path / "data")
  prepare(
    source(train=bad + TRAIN),
    tmp_path / "data",
    max_bad_fraction=0.3,
  )
  assert len(prepared.open_prepared(tmp_path / "data").splits["train"]) == 4


def test_empty_splits(tmp_path):
  with pytest.raises(InputError, match="'train' of 'Test set' has no image"):
    prepare(source(train=[]), tmp_path / "data")
  with pytest.raises(InputError, match="'val' of 'Test set' has no image"):
    prepare(source(val=[]), tmp_path / "data")


@pytest.mark.parametrize(
  ("record", "error", "message"),
  [
    (TRAIN[0], InputError, "'t-0.x' occurs 2 times in 'train'"),
    (Record("../x", b"", 0, 0, ()), InputError, "no safe file name"),
    (Record(".x", b"", 0, 0, ()), InputError, "no safe file name"),
    (Record("", b"", 0, 0, ()), InputError, "no safe file name"),
    (Record("a b", b"", 0, 0, ()), InputError, "no safe file name"),
    (Record("山" * 67, b"", 0, 0, ()), InputError, "no safe file name"),
    (Record("x", b"", 0, 0, (1, 0)), ValueError, r"\[1, 0\].*ascending"),
    (Record("x", b"", 0, 0, (0, 2)), ValueError, r"in 0 \.\. 1"),
  ],
)
def test_wrong_records(tmp_path, record, error, message):
  with pytest.raises(error, match=message):
    prepare(source(train=[*TRAIN, record]), tmp_path / "data")
  assert not prepared.is_prepared(tmp_path / "data")


def test_target_of_another_size(tmp_path):
  val = [dataclasses.replace(VAL[1], target=TARGET)]
  with pytest.raises(InputError, match=r"'v1' are for 5 x 7 .* 9 x 7"):
    prepare(source(val=val), tmp_path / "data")


def test_image_of_another_size_than_its_record(tmp_path):
  val = [dataclasses.replace(VAL[1], height=7, width=9)]
  with pytest.raises(InputError, match=r"'v1' are for 7 x 9 .* 9 x 7"):
    prepare(source(val=val), tmp_path / "data")


def test_existing_directories(directory, tmp_path):
  for again in (source(), source(train=TRAIN[:1])):
    with pytest.raises(InputError, match="holds a prepared data set already"):
      prepare(again, directory)
  assert len(prepared.open_prepared(directory).splits["train"]) == 4
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.txt").write_text("precious")
  with pytest.raises(InputError, match="choose another directory"):
    prepare(source(), other)
  assert [path.name for path in other.iterdir()] == ["thesis.txt"]
  (other / "thesis.txt").rename(tmp_path / "file")
  prepare(source(), other)  # An empty directory will do.
  assert prepared.is_prepared(other)
  with pytest.raises(InputError, match="is no folder"):
    prepare(source(), tmp_path / "file")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda text: text[:40], r"is no readable JSON \(.*\)"),
    (
      lambda text: text.replace(prepared.VERSION, "1.0.0"),
      r"version '1\.0\.0', .*",
    ),
  ],
)
def test_existing_data_that_are_damaged(directory, change, message):
  info = directory / "prepared.json"
  info.write_text(change(info.read_text()))
  where = re.escape(str(directory))
  pattern = rf"{where}/prepared\.json: {message}; remove {where} and prepare"
  parts = {"max_bad_fraction": 0.1, "shard": 0, "num_shards": 1}
  for write in (prepare, functools.partial(preparation.write_shard, **parts)):
    with pytest.raises(InputError, match=pattern):
      write(source(), directory)


def test_fingerprint_changes_with_ids_and_images_only(tmp_path):
  def fingerprints(name, **options):
    prepare(source(**options), tmp_path / name)
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


def content(directory):
  """Everything that a reader sees."""
  data = prepared.open_prepared(directory)
  seen = [data.name, data.fingerprint]
  for name, split in data.splits.items():
    for i in range(len(split)):
      target = split.target(i)
      seen.append((name, split[i], target and target.ids.tobytes()))
      seen.append(split.instances(i) and split.instances(i).rles)
  return seen


@pytest.fixture(params=["local", "bucket"])
def place(request, tmp_path, bucket):
  """Where a data set may be prepared."""
  return tmp_path / "place" if request.param == "local" else bucket / "place"


def test_pieces_and_shards_make_no_difference(monkeypatch, tmp_path, place):
  assert prepare(source(), tmp_path / "whole")
  wanted = content(tmp_path / "whole")
  monkeypatch.setattr(preparation, "PIECE", 2)
  assert prepare(source(), place / "pieces")
  assert content(place / "pieces") == wanted
  path = place / "shards"
  for shard in (2, 0, 2):
    assert not prepare(source(), path, shard=shard, num_shards=3)
    assert not prepared.is_prepared(path)
    with pytest.raises(InputError, match=r"prepared\.json is missing"):
      prepared.open_prepared(path)
  assert prepare(source(), path, shard=1, num_shards=3)
  assert content(path) == wanted
  assert audit(path).faults == verify(path) == []
  with pytest.raises(ValueError, match="shard is 3"):
    prepare(source(), tmp_path / "none", shard=3, num_shards=3)


STEPS = (
  *("write_file", "_claim", "_pieces", "_write_pieces", "_write_piece"),
  *("complete", "_complete", "_write_index", "_write_metadata"),
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("other", [0, 1])
def test_shards_may_work_at_the_same_time(
  monkeypatch, tmp_path, place, step, other
):
  """Before a step of shard 1, shard 0 or shard 1 is run by somebody else."""
  prepare(source(), tmp_path / "whole")
  monkeypatch.setattr(preparation, "PIECE", 2)
  if other == 1:
    prepare(source(), place, shard=0, num_shards=2)
  real = getattr(preparation, step)

  def overtaken(*args, **kwargs):
    monkeypatch.setattr(preparation, step, real)
    prepare(source(), place, shard=other, num_shards=2)
    return real(*args, **kwargs)

  monkeypatch.setattr(preparation, step, overtaken)
  done = prepare(source(), place, shard=1, num_shards=2)
  assert done == prepared.is_prepared(place)
  if not done:
    assert prepare(source(), place, shard=0, num_shards=2)
  assert content(place) == content(tmp_path / "whole")
  assert audit(place).faults == []


def test_a_shard_that_comes_late_changes_nothing(monkeypatch, place):
  monkeypatch.setattr(preparation, "PIECE", 2)
  prepare(source(), place)
  before = file_names(place)
  preparation.write_shard(
    source(), place, max_bad_fraction=0, shard=1, num_shards=2
  )
  assert file_names(place) == before
  # What a kill at the very end leaves.
  write_file(place / "incomplete" / "train-00000.json", "{}")
  write_file(place / "images" / "data-train.partial-1", "")
  assert len(audit(place).faults) == 2
  preparation.remove_leftovers(place)
  assert file_names(place) == before


def test_what_is_written_is_not_read_again(monkeypatch, tmp_path):
  monkeypatch.setattr(preparation, "PIECE", 1)
  read = []

  def records(fail_at):
    def one(i):
      if i == fail_at:
        raise RuntimeError("the disk is gone")
      read.append(i)
      return TRAIN[i]

    return LazyRecords(len(TRAIN), one)

  with pytest.raises(RuntimeError, match="disk"):
    prepare(source(train=records(2)), tmp_path / "data")
  assert read == [0, 1]
  prepare(source(train=records(None)), tmp_path / "data")
  assert read == [0, 1, 2, 3]
  prepare(source(), tmp_path / "whole")
  assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_a_full_disk_is_told_and_what_is_written_is_kept(monkeypatch, tmp_path):
  monkeypatch.setattr(preparation, "PIECE", 1)
  train = [*TRAIN, Record("large", encode(300, 300), 0, 0, (0,))]
  directory = tmp_path / "data"
  message = r"images/.* cannot be written .*File too large"
  with (
    files_no_longer_than(200_000),
    pytest.raises(InputError, match=message),
  ):
    prepare(source(train=train), directory)
  written = {n for n in file_names(directory) if n.startswith("images/")}
  assert len(written) == len(TRAIN)
  prepare(source(train=train), directory)
  prepare(source(train=train), tmp_path / "whole")
  assert content(directory) == content(tmp_path / "whole")


def test_what_is_of_other_data_is_not_used(
  monkeypatch, tmp_path, place, capsys
):
  monkeypatch.setattr(preparation, "PIECE", 1)

  def fail(*args):
    raise RuntimeError("the disk is gone")

  with monkeypatch.context() as patch:
    patch.setattr(preparation, "_write_metadata", fail)
    with pytest.raises(RuntimeError, match="disk"):
      prepare(source(), place)
  assert not prepared.is_prepared(place)
  prepare(source(val=None), place)
  assert "starting anew" in capsys.readouterr().err
  prepare(source(val=None), tmp_path / "whole")
  assert content(place) == content(tmp_path / "whole")
  assert audit(place).faults == []


def test_other_sizes_of_pieces_are_not_mixed(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(preparation, "PIECE", 1)
  prepare(source(), tmp_path / "data", shard=0, num_shards=2)
  monkeypatch.setattr(preparation, "PIECE", 3)
  prepare(source(), tmp_path / "data")
  assert "starting anew" in capsys.readouterr().err
  prepare(source(), tmp_path / "whole")
  assert content(tmp_path / "data") == content(tmp_path / "whole")


SLOW = """
import sys, time
from jtsm_jax.data import prepare, shapes
from jtsm_jax.data.source import LazyRecords, Source
prepare.PIECE = 1
whole = shapes.shapes_source(num_train=12, num_val=3, side=64)
def slowly(split):
  def read(i):
    time.sleep(0.2)
    return split[i]
  return LazyRecords(len(split), read)
splits = {name: slowly(split) for name, split in whole.splits.items()}
print("started", flush=True)
prepare.prepare(Source("shapes", whole.categories, splits), sys.argv[1])
"""


def test_a_kill_loses_nothing_that_is_written(tmp_path):
  command = [sys.executable, "-c", SLOW, str(tmp_path / "data")]
  process = subprocess.Popen(command, stdout=subprocess.PIPE)
  pieces = tmp_path / "data" / "incomplete"
  process.stdout.readline()
  while len(list(pieces.glob("*-0*.json"))) < 2:
    assert process.poll() is None
    time.sleep(0.01)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  written = sorted(pieces.glob("*-0*.json"))
  assert 2 <= len(written) < 15
  for path in written:
    assert json.loads(path.read_text())["image_ids"]
  assert not prepared.is_prepared(tmp_path / "data")
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  assert audit(tmp_path / "data").faults == []
  data = prepared.open_prepared(tmp_path / "data")
  assert len(data.splits["train"]) == 12
  whole = shapes_source(num_train=12, num_val=3, side=64)
  for name, split in whole.splits.items():
    for i, record in enumerate(split):
      assert data.splits[name][i].image == record.image


def test_a_bucket_that_fails_on_the_way(monkeypatch, bucket, tmp_path):
  """Nothing but what is missing is made again."""
  monkeypatch.setattr(preparation, "PIECE", 1)
  written = []
  real = MemoryFileSystem.put_file

  def put_file(self, draft, path, **kwargs):
    if len(written) == 9:
      raise ConnectionError("reset by peer")
    written.append(path)
    real(self, draft, path, **kwargs)

  monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
  with pytest.raises(InputError, match=r"cannot be written .*reset by peer"):
    prepare(source(), bucket)
  assert not prepared.is_prepared(bucket)
  first = {path for path in written if "incomplete" in path}
  assert len(first) > 3
  written.clear()
  monkeypatch.setattr(MemoryFileSystem, "put_file", real)

  def watched(self, draft, path, **kwargs):
    written.append(path)
    real(self, draft, path, **kwargs)

  monkeypatch.setattr(MemoryFileSystem, "put_file", watched)
  prepare(source(), bucket)
  assert not first & set(written)
  assert written[-1] == f"{bucket.path}/prepared.json"
  prepare(source(), tmp_path / "whole")
  assert content(bucket) == content(tmp_path / "whole")


def test_an_image_that_a_bucket_does_not_deliver_is_not_quarantined(
  monkeypatch, bucket, tmp_path
):
  for record in TRAIN:
    write_file(bucket / record.image_id, record.image)

  def read(i):
    image = read_file(bucket / TRAIN[i].image_id)
    return dataclasses.replace(TRAIN[i], image=image)

  remote = source(train=LazyRecords(len(TRAIN), read))
  real = MemoryFileSystem.cat_file

  def cat_file(self, path, **kwargs):
    if path.endswith(TRAIN[1].image_id):
      raise ConnectionError("reset by peer")
    return real(self, path, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.raises(InputError, match=r"t-1\.x: cannot be read .*by peer"):
      prepare(remote, tmp_path / "data")
  prepare(remote, tmp_path / "data")
  prepare(source(), tmp_path / "whole")
  assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_coco_comes_out_as_it_went_in(tmp_path):
  """Official files, through a prepared data set, and written again."""
  root = pathlib.Path(__file__).parents[3] / "shared" / "data" / "coco_mini"
  if not root.is_dir():
    pytest.skip(f"{root} is absent")
  name = "panoptic_train2017"
  prepare(
    coco_panoptic_source(root, train_set="train2017", val_set="train2017"),
    tmp_path / "data",
  )
  assert verify(tmp_path / "data") == []
  assert audit(tmp_path / "data").faults == []
  data = prepared.open_prepared(tmp_path / "data")
  val = data.splits["val"]
  official = json.loads((root / f"{name}.json").read_text())
  file_of = {
    f"{pathlib.Path(i['file_name']).stem}": i for i in official["images"]
  }
  write_panoptic(
    tmp_path / f"{name}.json",
    tmp_path / name,
    (
      (file_of[i]["id"], file_of[i]["file_name"], val.target(n))
      for n, i in enumerate(val.image_ids)
    ),
    data.categories,
  )
  written = json.loads((tmp_path / f"{name}.json").read_text())
  found = {a["image_id"]: a for a in written["annotations"]}
  assert len(found) == len(official["annotations"]) == 100
  keys = ("id", "category_id", "area", "bbox", "iscrowd")
  for annotation in official["annotations"]:
    again = found[annotation["image_id"]]
    assert again["file_name"] == annotation["file_name"]
    parts = [
      [{k: s[k] for k in keys} for s in a["segments_info"]]
      for a in (annotation, again)
    ]
    assert parts[0] == parts[1]
    with (
      Image.open(root / name / annotation["file_name"]) as wanted,
      Image.open(tmp_path / name / annotation["file_name"]) as got,
    ):
      np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
