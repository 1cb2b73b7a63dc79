"""Reads Caffe2-style files of Python 2 and 3; none of them is executed."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle

import numpy as np
import pytest

from jtsm_jax.backbones.caffe2_files import read_caffe2_file
from jtsm_jax.types import InputError
from tests.backbones.caffe2_writer import (
  python2_array,
  python2_file,
  write_python2,
  write_python3,
)

ARRAYS = {
  "matrix_w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
  "every_byte": np.arange(256, dtype=np.uint8),
  "double": np.array([-1.5, np.pi]),
  "half": np.array([0.5, -2], np.float16),
  "counter": np.array([7], np.int64),
  "scalar": np.array(3, np.int32),
  "flags": np.array([True, False]),
  "empty": np.zeros((0, 3), np.float32),
}


def _assert_same(found, expected):
  assert list(found) == list(expected)
  for name, value in expected.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "w.pkl"


def test_the_writer_writes_what_pickle_reads(path):
  write_python2(path, ARRAYS)
  with path.open("rb") as file:
    _assert_same(pickle.load(file, encoding="latin1"), ARRAYS)


def test_reads_files_of_python_2(path):
  write_python2(path, ARRAYS)
  _assert_same(read_caffe2_file(path), ARRAYS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_files_of_python_3(path, protocol):
  write_python3(path, ARRAYS, protocol)
  _assert_same(read_caffe2_file(path), ARRAYS)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_orders_of_memory_and_of_bytes(path, protocol):
  matrix = ARRAYS["matrix_w"]
  arrays = {"columns": np.asfortranarray(matrix), "big": matrix.astype(">f4")}
  write_python3(path, arrays, protocol)
  _assert_same(read_caffe2_file(path), {"columns": matrix, "big": matrix})


def test_reads_columns_of_python_2(path):
  matrix = ARRAYS["matrix_w"]
  columns = python2_array(matrix, fortran=True)
  path.write_bytes(python2_file({"columns": columns}))
  _assert_same(read_caffe2_file(path), {"columns": matrix})


def test_an_array_of_two_names_is_read_twice(path):
  array = np.arange(3, dtype=np.float32)
  write_python3(path, {"a": array, "b": array})
  _assert_same(read_caffe2_file(path), {"a": array, "b": array})


def test_blobs_without_momentum(path):
  array = np.arange(3, dtype=np.float32)
  blobs = collections.OrderedDict(a_w=array, a_w_momentum=array, lr=array[:1])
  write_python3(path, {"cfg": "MODEL: ...", "blobs": blobs})
  _assert_same(read_caffe2_file(path), {"a_w": array, "lr": array[:1]})


class _Attack:
  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


def _attacks(mark):
  """Pickles that make the folder `mark`, or would like to."""
  make = _Attack(os.mkdir, mark)
  array = np.zeros(2, np.float32)
  reconstruct, arguments, state = array.__reduce__()
  code = f"__import__('os').mkdir({mark!r})".encode()
  # An array of objects, whose elements are called while it is read.
  objects = pickle.dumps({"a": np.array([make], object)}, protocol=2)
  return {
    "call": pickle.dumps({"a": make}, protocol=2),
    "call, newest protocol": pickle.dumps({"a": make}),
    "call, text": pickle.dumps({"a": make}, protocol=0),
    "eval": b"\x80\x02}U\x01ac__builtin__\neval\n(T"
    + len(code).to_bytes(4, "little")
    + code
    + b"tRs.",
    "instance": b"(dS'a'\n(S'" + mark.encode() + b"'\niposix\nmkdir\ns.",
    "system": b"\x80\x02}U\x01acposix\nsystem\n(U\x01:tRs.",
    "objects": objects,
    "in the shape": pickle.dumps({"a": _Attack(reconstruct, make)}, 2),
    "in the state": pickle.dumps(
      {"a": _Reduced(reconstruct, arguments, (1, make, *state[2:]))}, 2
    ),
    "as the dtype": pickle.dumps(
      {"a": _Reduced(reconstruct, arguments, (*state[:2], make, *state[3:]))}, 2
    ),
    "dtype of an attack": pickle.dumps({"a": _Attack(np.dtype, make)}, 2),
    "as a name": pickle.dumps({make: array}, 2),
    "beside blobs": pickle.dumps({"blobs": {"a": array}, "cfg": make}, 2),
    "attribute": b"\x80\x04}\x8c\1a\x8c\5numpy\x8c\x0dndarray.dumps\x93s.",
    "getattr": b"\x80\x02}U\x01ac__builtin__\ngetattr\ns.",
    "copyreg": b"\x80\x02}U\x01accopy_reg\n_reconstructor\ns.",
    "import": b"\x80\x02}U\x01ac__builtin__\n__import__\ns.",
    "extension": b"\x80\x02}U\x01a\x82\x01s.",
    "persistent": b"\x80\x02}U\x01aU\x01xQs.",
  }


class _Reduced:
  def __init__(self, *reduced):
    self.reduced = reduced

  def __reduce__(self):
    return self.reduced


EXECUTED = (  # by pickle itself: that the attacks are real
  "call",
  "call, newest protocol",
  "call, text",
  "eval",
  "instance",
  "objects",
  "in the shape",
  "in the state",
  "as the dtype",
  "dtype of an attack",
  "as a name",
  "beside blobs",
)


@pytest.mark.parametrize("kind", _attacks(""))
def test_malicious_pickle_is_refused_unexecuted(tmp_path, path, kind):
  mark = tmp_path / "executed"
  data = _attacks(str(mark))[kind]
  if kind in EXECUTED:
    # Whatever else pickle says of it, by then the folder is there.
    with contextlib.suppress(TypeError, ValueError):
      pickle.loads(data, encoding="latin1")
    mark.rmdir()
  path.write_bytes(data)
  with pytest.raises(InputError, match=r"w\.pkl") as error:
    read_caffe2_file(path)
  assert not mark.exists()
  if kind not in ("extension", "persistent"):
    assert "not on the list of what a file of weights may name" in str(
      error.value
    )


@pytest.mark.parametrize(
  ("opcodes", "message"),
  [
    (
      python2_array(np.zeros(3), code=b"O8", data=b""),
      "<O8, not plain numbers",
    ),
    (python2_array(np.zeros(3), code=b"V8"), "V8, not plain numbers"),
    (python2_array(np.zeros(3), code=b"M8[s]"), "not plain numbers"),
    (python2_array(np.zeros(3), order=b"<f4,("), "not plain numbers"),
    (python2_array(np.zeros(3), shape=(4,)), "32 bytes and there are 24"),
    (python2_array(np.zeros(3), shape=(2,)), "16 bytes and there are 24"),
    (python2_array(np.zeros(3), shape=(2**30,) * 20), "there are 24"),
    (python2_array(np.zeros(3), shape=(-1, -3)), r"shape is \(-1, -3\)"),
    (python2_array(np.zeros(1), shape=(1,) * 99), "'a_w' is damaged"),
    # Named, but never filled.
    (b"cnumpy.core.multiarray\n_reconstruct\n)R", "dtype is missing"),
    # A dtype with parts, and one whose code is not text.
    (
      b"cnumpy.core.multiarray\n_reconstruct\n)R(J\1\0\0\0)cnumpy\ndtype\n"
      b"U\2f4\x85R(J\3\0\0\0U\1<N(U\1xtNJ\xff\xff\xff\xffttb",
      "whole Caffe2 file",
    ),
    (
      b"cnumpy.core.multiarray\n_reconstruct\n)R(J\1\0\0\0)cnumpy\ndtype\n"
      b"(J\1\0\0\0l\x85R\x89U\4\0\0\0\0tb",
      "'a_w' is damaged",
    ),
    (b"_codecs\nencode\n".join((b"c", b"(U\1aU\5utf-7tR")), "'utf-7'"),
  ],
)
def test_odd_arrays_are_refused(path, opcodes, message):
  path.write_bytes(python2_file({"a_w": opcodes}))
  with pytest.raises(InputError, match=message):
    read_caffe2_file(path)


def test_stand_ins_stay_as_they_are(path):
  # A pickle can set attributes of the functions that it is given.
  change = b"\x80\x02}U\1ac_codecs\nencode\nN}U\x0c__defaults__U\1x\x85s\x86bs."
  path.write_bytes(change)
  with pytest.raises(InputError, match="'a' is a function, not an array"):
    read_caffe2_file(path)
  write_python3(path, {"b": np.arange(3)})
  np.testing.assert_array_equal(read_caffe2_file(path)["b"], np.arange(3))


def test_memo_slots_reserve_no_memory(path):
  # Nine bytes, for which pickle.load would ask for 34 gigabytes.
  path.write_bytes(b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b".")
  assert read_caffe2_file(path) == {}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ([1, 2], "holds a list, not a dictionary of arrays"),
    ({"a": "text"}, "'a' is a str, not an array"),
    ({"model": {"a": np.ones(1)}}, "'model' is a dict, not an array"),
    ({7: np.ones(1)}, "a name is a int, not text"),
  ],
)
def test_what_is_no_dictionary_of_arrays_is_refused(path, value, message):
  path.write_bytes(pickle.dumps(value, protocol=2))
  with pytest.raises(InputError, match=message):
    read_caffe2_file(path)


@pytest.mark.parametrize("writer", [write_python2, write_python3])
def test_truncated_files_are_refused(path, writer):
  writer(path, ARRAYS)
  whole = path.read_bytes()
  for length in (*range(0, len(whole), 17), len(whole) - 1):
    path.write_bytes(whole[:length])
    # The second where a name is cut.
    with pytest.raises(InputError, match=r"not a whole Caffe2 file|it names"):
      read_caffe2_file(path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(InputError, match=r"gone\.pkl"):
    read_caffe2_file(tmp_path / "gone.pkl")
