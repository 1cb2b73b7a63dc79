"""One workdir, one training: two would write each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from jtsm_jax.types import InputError


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[None]:
  """Inside, no other process that asks trains in `workdir`.

  The system takes the claim back when the process ends, however it ends. Where
  the file system cannot lock files, nothing is claimed.

  Raises:
    InputError: another process trains there.
  """
  with (workdir / "train.lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"--workdir={workdir}: another process trains there; wait until it "
        "ends, or give another --workdir"
      ) from error
    except OSError:
      pass
    yield
