"""SIGTERM and Ctrl-C: the step is finished, the state saved, the run ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from jtsm_jax.console import say

_AGAIN = 3  # seconds after which a signal that was not heeded is raised again


class Stopped(BaseException):
  """The run was asked to stop, and what it has learnt is saved.

  No `Exception`, as KeyboardInterrupt is none: nobody on the way is to take it
  for a fault of what was just being done.

  Attributes:
    signal: SIGTERM or SIGINT.
  """

  def __init__(self, signal: int):
    super().__init__(f"signal {signal}")
    self.signal = signal


class Stopping:
  """Notes that a signal has come; the run asks for it when it suits.

  While nothing can be lost, a signal raises `Stopped` by itself: before the
  first step, and inside `at_once`. A second signal does so anywhere.

  With several processes the preemption service of jax.distributed listens
  instead: a SIGTERM to any of them stops all after the same step.
  """

  def __init__(self):
    self._signal = None
    self._defers = False
    self._handlers = {}
    self._unraisable = sys.unraisablehook

  def __enter__(self) -> Stopping:
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        self._handlers[number] = signal.signal(number, self._note)
      sys.unraisablehook = self._tell_unraisable
    return self

  def __exit__(self, *_) -> None:
    if self._handlers:
      signal.alarm(0)
      sys.unraisablehook = self._unraisable
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: object) -> None:
    del frame
    if number == signal.SIGALRM:  # for a signal that came before
      if self._signal is not None and self._defers:
        return
      number = self._signal or signal.SIGTERM
    first, self._signal = self._signal is None, number
    if not self._defers or not first:
      # Where it comes within a callback, of the garbage collector for example,
      # Python drops what is raised: so it is noted, and raised again.
      signal.alarm(_AGAIN)
      raise Stopped(number)
    say(f"train: {signal.Signals(number).name}: stops after this step")

  def _tell_unraisable(self, unraisable: object) -> None:
    if unraisable.exc_type is not Stopped:
      self._unraisable(unraisable)

  def defer(self) -> None:
    """From now on a signal waits until it is asked for."""
    if self._signal is not None:
      raise Stopped(self._signal)
    self._defers = True

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Inside, a signal does not wait: all that matters is saved."""
    if self._signal is not None:
      raise Stopped(self._signal)
    self._defers = False
    try:
      yield
    finally:
      self._defers = True
    if self._signal is not None:
      raise Stopped(self._signal)

  def asked(self, step: int) -> int | None:
    """The signal, if the run is to stop after `step`; ask after every step."""
    if jax.process_count() > 1:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else None
    return self._signal
