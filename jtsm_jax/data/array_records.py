"""Files of ArrayRecord, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from array_record.python import array_record_module

from jtsm_jax.data.files import AnyPath, written_whole
from jtsm_jax.types import InputError


@contextlib.contextmanager
def record_writer(path: AnyPath) -> Iterator[Callable[[bytes], None]]:
  """Gives a function that appends a record to a file; as `written_whole`.

  Raises:
    InputError: the disk is full, or fails otherwise.
  """
  with written_whole(path) as draft:
    writer = array_record_module.ArrayRecordWriter(
      os.fspath(draft), "group_size:1"
    )

    def write(record: bytes) -> None:
      with _disk_faults(path):
        writer.write(record)

    try:
      yield write
    finally:
      with _disk_faults(path):
        writer.close()


@contextlib.contextmanager
def _disk_faults(path: AnyPath) -> Iterator[None]:
  try:
    yield
  except RuntimeError as error:  # ArrayRecord has no other
    reason = str(error).partition(";")[0]
    raise InputError(
      f"{path}: cannot be written ({reason}). Free some space, or see to the"
      " disk, and give the same command: it goes on from what is there"
    ) from error
