"""One process at a time, by a file that the system locks."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from jtsm_jax.types import InputError


@contextlib.contextmanager
def exclusive(path: pathlib.Path, *, busy: str | None = None) -> Iterator[None]:
  """Inside, no other process that asks is inside with the same file.

  The system takes the lock back when the process ends, however it ends. Where
  the file system cannot lock files, nobody is kept out.

  Args:
    path: the file, which is made.
    busy: what the error says; None: wait for the other process instead.

  Raises:
    InputError: another process is inside.
  """
  with path.open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as error:
      raise InputError(busy) from error
    except OSError:
      pass
    yield
