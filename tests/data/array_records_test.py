"""Files of ArrayRecord on a disk that fills up."""

import contextlib
import resource

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from jtsm_jax.data.array_records import record_writer
from jtsm_jax.data.files import names_in
from jtsm_jax.types import InputError


@contextlib.contextmanager
def files_no_longer_than(size):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_all(path, records):
  with record_writer(path) as write:
    for record in records:
      write(record)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
  path = tmp_path / "a.array_record"
  message = rf"{path}: cannot be written \(.*File too large\)\. Free some space"
  records = [np.random.default_rng(0).bytes(70_000)] * 20
  with files_no_longer_than(100_000), pytest.raises(InputError, match=message):
    write_all(path, records)
  assert names_in(tmp_path) == []
  write_all(path, records)
  assert ArrayRecordReader(str(path)).read_all() == records


def test_other_errors_pass_and_leave_nothing(tmp_path):
  def records():
    yield b"begun"
    raise RuntimeError("not of the disk")

  with pytest.raises(RuntimeError, match="not of the disk"):
    write_all(tmp_path / "a.array_record", records())
  assert names_in(tmp_path) == []
