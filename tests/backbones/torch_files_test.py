"""Writes PyTorch files without PyTorch and reads them back."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jtsm_jax.backbones.torch_files import read_torch_file
from jtsm_jax.types import InputError
from tests.backbones import torch_writer
from tests.backbones.torch_writer import Tensor, write_legacy, write_zip


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
  torch_writer.install(monkeypatch)


both_formats = pytest.mark.parametrize("write", [write_zip, write_legacy])


@both_formats
def test_reads_tensors_of_every_layout(tmp_path, write):
  storage = np.arange(24, dtype=np.float32)
  state = collections.OrderedDict(
    plain=Tensor(storage, (4, 6), (6, 1)),
    transposed=Tensor(storage, (6, 4), (1, 6)),
    part=Tensor(storage, (2, 3), (6, 2), 7),
    scalar=Tensor(np.array([5], np.int64), (), ()),
    empty=Tensor(storage, (0, 3), (3, 1)),
    half=Tensor(np.array([0.5, -2], np.float16)),
    brain=Tensor(np.array([1.5, 3], ml_dtypes.bfloat16)),
  )
  write(tmp_path / "w.pth", state)
  found = read_torch_file(tmp_path / "w.pth")
  assert list(found) == list(state)
  square = storage.reshape(4, 6)
  np.testing.assert_array_equal(found["plain"], square)
  np.testing.assert_array_equal(found["transposed"], square.T)
  np.testing.assert_array_equal(found["part"], [[7, 9, 11], [13, 15, 17]])
  assert found["scalar"].shape == ()
  assert found["scalar"] == 5
  assert found["empty"].shape == (0, 3)
  np.testing.assert_array_equal(found["half"], np.float16([0.5, -2]))
  assert found["brain"].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found["brain"].astype(float), [1.5, 3])


@both_formats
def test_reads_the_state_dict_of_a_checkpoint(tmp_path, write):
  tensor = Tensor(np.ones(3, np.float32))
  write(tmp_path / "w.pth", {"epoch": 7, "state_dict": {"a": tensor}})
  found = read_torch_file(tmp_path / "w.pth")
  assert set(found) == {"a"}


class _Attack:
  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


@both_formats
@pytest.mark.parametrize(
  ("function", "name"),
  [
    (os.mkdir, "posix.mkdir|nt.mkdir"),
    (eval, "__builtin__.eval|builtins.eval"),
    (getattr, "__builtin__.getattr|builtins.getattr"),
  ],
)
def test_malicious_pickle_is_refused_unexecuted(
  tmp_path, write, function, name
):
  mark = tmp_path / "executed"
  args = {
    os.mkdir: (str(mark),),
    eval: (f"__import__('os').mkdir({str(mark)!r})",),
    getattr: (Tensor(np.ones(1, np.float32)), "__class__"),
  }[function]
  pickle.loads(pickle.dumps(_Attack(os.mkdir, str(mark))))
  mark.rmdir()  # the attack works on pickle itself
  write(tmp_path / "w.pth", {"weight": _Attack(function, *args)})
  with pytest.raises(InputError, match=name):
    read_torch_file(tmp_path / "w.pth")
  assert not mark.exists()


def test_malicious_header_is_refused_unexecuted(tmp_path):
  mark = tmp_path / "executed"
  attack = pickle.dumps(_Attack(os.mkdir, str(mark)), protocol=2)
  (tmp_path / "w.pth").write_bytes(attack)
  with pytest.raises(InputError, match="mkdir, which is not on the list"):
    read_torch_file(tmp_path / "w.pth")
  assert not mark.exists()


@both_formats
@pytest.mark.parametrize(
  ("shape", "strides", "offset"),
  [
    ((5,), (1,), 0),
    ((2,), (1,), 3),
    ((2, 2), (3, 1), 0),
    ((2,), (-1,), 1),
    ((2,), (1,), -1),
    ((10**6,), (0,), 0),
  ],
)
def test_tensor_outside_its_storage_is_refused(
  tmp_path, write, shape, strides, offset
):
  tensor = Tensor(np.ones(4, np.float32), shape, strides, offset)
  write(tmp_path / "w.pth", {"weight": tensor})
  with pytest.raises(InputError, match="'weight' is damaged"):
    read_torch_file(tmp_path / "w.pth")


@both_formats
def test_truncated_storage_is_refused(tmp_path, write):
  state = {"weight": Tensor(np.ones(4, np.float32))}
  write(tmp_path / "w.pth", state, truncate=4)
  with pytest.raises(InputError, match=r"w\.pth.*'weight' is damaged"):
    read_torch_file(tmp_path / "w.pth")


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"no pickle at all"])
def test_other_files_are_refused(tmp_path, data):
  (tmp_path / "w.pth").write_bytes(data)
  with pytest.raises(InputError, match=r"w\.pth is not a whole PyTorch file"):
    read_torch_file(tmp_path / "w.pth")


def test_missing_file_is_named(tmp_path):
  with pytest.raises(InputError, match=r"gone\.pth"):
    read_torch_file(tmp_path / "gone.pth")


@both_formats
@pytest.mark.parametrize(
  ("value", "message"),
  [([1, 2], "holds a list"), ({"lr": 0.1}, "'lr' is not a tensor")],
)
def test_what_is_no_state_dict_is_refused(tmp_path, write, value, message):
  write(tmp_path / "w.pth", value)
  with pytest.raises(InputError, match=message):
    read_torch_file(tmp_path / "w.pth")


@pytest.mark.parametrize(
  "compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]
)
def test_archive_that_would_swell_is_refused(tmp_path, compression):
  path = tmp_path / "w.pth"
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    archive.writestr("archive/data/0", bytes(10**7))
  with pytest.raises(InputError, match=r"archive claims \d{8} bytes and has"):
    read_torch_file(path)


def test_memo_slots_reserve_no_memory(tmp_path):
  # Nine bytes, for which pickle.load would ask for 34 gigabytes.
  header = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001))
  header += pickle.dumps({"little_endian": True}, 2)
  bomb = b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b"."
  (tmp_path / "w.pth").write_bytes(header + bomb + pickle.dumps([], 2))
  assert read_torch_file(tmp_path / "w.pth") == {}
