"""What a person sees while the program works."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Sized
from typing import Any

import jax
import tqdm


def progress(
  iterable: Iterable[Any] | None = None,
  description: str = "",
  *,
  total: int | None = None,
  initial: int = 0,
  unit: str = "it",
) -> tqdm.tqdm:
  """A progress line on stderr with rate and remaining time.

  Iterate over the result, or call its `update(n)`. On a terminal it is a bar;
  in a log file or a pipe it is a plain line at most every 10 seconds. Of
  several processes that train together only the first one shows it.

  Args:
    iterable: what to go through; None to count by `update`.
    description: what is being done, such as "evaluate".
    total: number of items, when `iterable` cannot tell.
    initial: items done before, by the run that this one goes on from.
    unit: name of one item.
  """
  if total is None and isinstance(iterable, Sized):
    total = len(iterable)
  # Without the first question the second one would start the devices.
  is_other = jax.distributed.is_initialized() and jax.process_index() > 0
  shared = {
    "disable": is_other or total == 0,  # there is nothing to tell
    "iterable": iterable,
    "desc": description,
    "total": total,
    "initial": initial,
    "unit": unit,
    "file": sys.stderr,
    "smoothing": 0.1,
    # Without, a rate that falls would silence it for long.
    "miniters": 1,
  }
  if sys.stderr.isatty():
    return _Bar(**shared, dynamic_ncols=True)
  line = (
    "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
  )
  return _LogLines(**shared, mininterval=10, bar_format=line)


def say(text: str) -> None:
  """Prints on stdout, above the progress lines of a terminal."""
  if sys.stderr.isatty():
    tqdm.tqdm.write(text)
  else:
    print(text)


class _Bar(tqdm.tqdm):
  """tqdm by a clock that never jumps."""

  monitor_interval = 0  # no thread that prints, by another clock
  _time = property(lambda self: time.monotonic, lambda self, clock: None)


class _LogLines(_Bar):
  """tqdm for a log: a line each time instead of one that is drawn over."""

  @staticmethod
  def status_printer(file):
    def print_status(line: str) -> None:
      file.write(line + "\n")
      file.flush()

    return print_status

  # A log has no cursor to move and nothing to wipe out or draw again.

  def moveto(self, n: int) -> None:
    pass

  def clear(self, nolock: bool = False) -> None:
    pass

  @classmethod
  def external_write_mode(cls, file=None, nolock=False):
    return contextlib.nullcontext()

  def close(self) -> None:
    """Writes the last line, unless it stands there already."""
    if not self.disable:
      if self.last_print_n < self.n:
        self.refresh()
      self.disable = True
      self._decr_instances(self)
