"""One workdir, one training: two would write each other's files."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from jtsm_jax.locks import exclusive


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[None]:
  """Inside, no other process that asks trains in `workdir`.

  Raises:
    InputError: another process trains there.
  """
  busy = (
    f"--workdir={workdir}: another process trains there; wait until it "
    "ends, or give another --workdir"
  )
  with exclusive(workdir / "train.lock", busy=busy):
    yield
