"""Tests of the audit: data sets that cheat are found out."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from jtsm_jax.data.audit import audit, audit_table
from jtsm_jax.data.prepare import prepare
from jtsm_jax.types import InputError
from tests.data.small_set import source

TRAIN_FILE = "images/data-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
  directory = tmp_path_factory.mktemp("honest") / "data"
  prepare(source(), directory)
  return directory


@pytest.fixture
def directory(honest, tmp_path):
  return shutil.copytree(honest, tmp_path / "data")


def test_what_each_split_holds(honest):
  found = audit(honest)
  assert not found.faults
  assert found.records == {
    ("train", "images"): 4,
    ("val", "images"): 3,
    ("val", "panoptic"): 2,
    ("val", "instances"): 1,
  }
  everywhere = {"image_id": 4, "image": 4, "tags": 4}
  assert found.fields["train", "images"] == everywhere
  assert {"ids", "segments/id"} <= set(found.fields["val", "panoptic"])
  assert {"boxes", "rles"} <= set(found.fields["val", "instances"])
  text = audit_table(found)
  assert "image, image_id, tags" in text.splitlines()[1]
  assert text.splitlines()[-1].startswith("training records hold image, id")


def read_records(path):
  reader = array_record_module.ArrayRecordReader(os.fspath(path))
  return reader.read(list(range(reader.num_records())))


def write_records(path, records):
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(path), "group_size:1"
  )
  for record in records:
    writer.write(record)
  writer.close()


def test_a_mask_in_one_training_record(directory):
  """The descriptions of the data set still say that there is none."""
  path = directory / TRAIN_FILE
  records = read_records(path)
  mask = tfds.features.FeaturesDict({"mask": tfds.features.Text()})
  serializer = tfds.core.example_serializer.ExampleSerializer(
    mask.get_serialized_info()
  )
  extra = serializer.serialize_example(mask.encode_example({"mask": "11M0"}))
  records[2] += extra  # protobuf joins the maps of joined messages
  write_records(path, records)
  found = audit(directory)
  assert found.fields["train", "images"]["mask"] == 1
  assert any("training records hold mask" in f for f in found.faults)
  assert "FAULT: training records hold mask" in audit_table(found)


def test_bytes_that_no_field_accounts_for(directory):
  path = directory / TRAIN_FILE
  records = read_records(path)
  # Field 15, length-delimited, of 4 bytes: unknown to tf.train.Example.
  records[0] += bytes([15 << 3 | 2, 4]) + b"mask"
  write_records(path, records)
  assert any("unknown bytes" in fault for fault in audit(directory).faults)


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "no record"])
def test_a_damaged_file(directory, kind):
  path = directory / TRAIN_FILE
  data = bytearray(path.read_bytes())
  data[200] ^= 1  # of a record
  if kind == "no record":
    write_records(path, [b"not a record"])
  else:
    path.write_bytes({"cut": data[:-99], "empty": b""}.get(kind, data))
  found = audit(directory)
  (fault,) = found.faults
  assert fault.startswith(f"{path} is damaged (")
  assert found.records["val", "images"] == 3  # the others are looked at


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("masks.npz", "masks.npz does not belong"),
    ("images/boxes.json", "boxes.json does not belong"),
    ("images/deep/features.json", "does not belong"),
    ("images/data-other.array_record-00000-of-00001", "does not belong"),
  ],
)
def test_files_of_unknown_content(directory, name, message):
  path = directory / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("{}") if path.suffix == ".json" else write_records(path, [])
  assert any(message in fault for fault in audit(directory).faults)


def test_ground_truth_of_training_images(directory):
  part = directory / "panoptic"
  shutil.copy(
    part / "data-val.array_record-00000-of-00001",
    part / "data-train.array_record-00000-of-00001",
  )
  (fault,) = audit(directory).faults
  assert "panoptic has 2 records of training images" in fault


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"panoptic_rows": np.zeros(4, np.int32)}, "names ground truth"),
    ({"boxes": np.zeros((4, 4))}, "holds boxes"),
  ],
)
def test_index_of_the_training_split(directory, change, message):
  path = directory / "train_index.npz"
  with np.load(path) as index:
    arrays = dict(index)
  np.savez(path, **(arrays | change))
  assert any(message in fault for fault in audit(directory).faults)


def test_no_data_set(tmp_path):
  with pytest.raises(InputError, match=r"prepared\.json is missing"):
    audit(tmp_path)
