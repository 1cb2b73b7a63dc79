"""Files are what their names say, or the message says what they are."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import safetensors.numpy

from jtsm_jax.backbones.weight_files import read_weights
from jtsm_jax.types import InputError
from tests.backbones import caffe2_writer, torch_writer

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def files(tmp_path, monkeypatch):
  """The same entry in each kind of file, and files of other kinds."""
  torch_writer.install(monkeypatch)
  entry = {"weight": torch_writer.tensor(ARRAY)}
  torch_writer.write_zip(tmp_path / "zip.pth", entry)
  torch_writer.write_legacy(tmp_path / "legacy.pth", entry)
  caffe2_writer.write_python2(tmp_path / "old.pkl", {"weight": ARRAY})
  caffe2_writer.write_python3(tmp_path / "new.pkl", {"weight": ARRAY})
  # Text, without the first byte of the later protocols.
  caffe2_writer.write_python3(tmp_path / "text.pkl", {"weight": ARRAY}, 0)
  safetensors.numpy.save_file({"weight": ARRAY}, tmp_path / "a.safetensors")
  (tmp_path / "page").write_text("\n<!DOCTYPE html><html><head><title>One")
  (tmp_path / "empty").write_bytes(b"")
  return tmp_path


@pytest.mark.parametrize(
  "name",
  ["zip.pth", "legacy.pth", "old.pkl", "new.pkl", "text.pkl", "a.safetensors"],
)
def test_reads_every_kind(files, name):
  found = read_weights(files / name)
  assert list(found) == ["weight"]
  np.testing.assert_array_equal(found["weight"], ARRAY, strict=True)


@pytest.mark.parametrize(
  ("name", "suffix", "message"),
  [
    ("zip.pth", ".pkl", r"is a PyTorch file, not a \.pkl .* ends in \.pth"),
    ("legacy.pth", ".pkl", r"is a PyTorch file, not a \.pkl .* ends in \.pth"),
    ("zip.pth", ".safetensors", r"is a PyTorch file, not a \.safetensors"),
    ("new.pkl", ".pth", r"is a pickle of another kind .* ends in \.pkl"),
    ("old.pkl", ".safetensors", r"is a pickle of another kind .* in \.pkl"),
    ("a.safetensors", ".pth", r"a safetensors file.* ends in \.safetensors"),
    ("a.safetensors", ".pkl", r"a safetensors file.* ends in \.safetensors"),
    *[
      (name, suffix, f"is {what}, not a \\{suffix} .*download the file itself")
      for name, what in (("page", "a web page"), ("empty", "empty"))
      for suffix in (".pkl", ".pth", ".safetensors")
    ],
    ("a.safetensors", ".npz", r"ends in \.pkl, \.pth, \.safetensors"),
    ("a.safetensors", "", r"ends in \.pkl, \.pth, \.safetensors"),
  ],
)
def test_swapped_files_are_named(files, name, suffix, message):
  path = files / f"swapped{suffix}"
  (files / name).rename(path)
  with pytest.raises(InputError, match=message):
    read_weights(path)


@pytest.mark.parametrize("name", ["zip.pth", "old.pkl", "a.safetensors"])
def test_truncated_files_are_refused(files, name):
  path = files / name
  path.write_bytes(path.read_bytes()[:-7])
  with pytest.raises(InputError, match=r"is not a whole .* download it again"):
    read_weights(path)


def test_other_bytes_are_refused(files):
  for suffix in (".pkl", ".pth", ".safetensors"):
    path = files / f"other{suffix}"
    path.write_bytes(b"no weights at all, " * 50)
    with pytest.raises(InputError, match=r"other\..* is not a whole"):
      read_weights(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_missing_files_are_named(tmp_path, suffix):
  with pytest.raises(InputError, match=f"cannot read .*gone\\{suffix}"):
    read_weights(tmp_path / f"gone{suffix}")
  (tmp_path / f"folder{suffix}").mkdir()
  with pytest.raises(InputError, match=f"cannot read .*folder\\{suffix}"):
    read_weights(tmp_path / f"folder{suffix}")


def test_a_pickle_is_not_executed_under_any_name(tmp_path):
  mark = tmp_path / "executed"

  class Attack:
    def __reduce__(self):
      return mark.mkdir, ()

  data = pickle.dumps(Attack())
  pickle.loads(data)
  mark.rmdir()
  for suffix in (".pkl", ".pth", ".safetensors"):
    path = tmp_path / f"attack{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError, match="attack"):
      read_weights(path)
    assert not mark.exists()
