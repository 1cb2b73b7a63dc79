"""Metrics of a run: JSON lines, which are the record, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jtsm_jax.types import InputError


class MetricWriter:
  """Writes metrics.jsonl and TensorBoard events into a directory.

  Each `write` is one line, {"step": int, "time": seconds since 1970, name:
  value, ...}, on disk before the call returns. A value that is not finite
  becomes null, since JSON has no NaN. One process of a run writes: the others
  pass `active=False`, and all their calls do nothing.

  Events are written by the caller's thread: that of tensorboardX dies on a full
  disk, and the run would wait for it for ever.
  """

  def __init__(self, directory: str | os.PathLike[str], *, active: bool = True):
    """Opens, or goes on with, the files of `directory`, which is made.

    Raises:
      InputError: `directory` cannot be made or written.
    """
    self._active = active
    self._events = None
    self._purge_step = None
    if not active:
      return
    self._directory = pathlib.Path(directory)
    self._path = self._directory / "metrics.jsonl"
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
      raise InputError(
        f"cannot write metrics into {directory}: {error.strerror}. Give a"
        " --workdir that this user may write"
      ) from error
    _drop_torn_line(self._path)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line and the same scalars to TensorBoard.

    Args:
      step: of the training; several lines may have the same.
      values: name -> number, or array of one element; "/" groups names. "step"
        and "time" are taken.

    Raises:
      ValueError: a name is taken, or a value is no single number.
      InputError: the disk is full, or fails otherwise.
    """
    if not self._active:
      return
    taken = {"step", "time"} & values.keys()
    if taken:
      raise ValueError(f"metrics cannot be called {sorted(taken)}: rename them")
    numbers = {name: _number(name, value) for name, value in values.items()}
    line = {"step": int(step), "time": round(time.time(), 3)} | {
      name: number if math.isfinite(number) else None
      for name, number in numbers.items()
    }
    with self._disk_faults():
      self._file.write(json.dumps(line, allow_nan=False) + "\n")
      self._file.flush()
    self._show(
      *(summary.scalar(name, number) for name, number in numbers.items()),
      step=step,
    )

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Shows pictures in TensorBoard.

    Args:
      step: of the training.
      images: name -> [H, W, 3] uint8 RGB; "/" groups names.
    """
    if not self._active:
      return
    self._show(
      *(
        summary.image(name, image, dataformats="HWC")
        for name, image in images.items()
      ),
      step=step,
    )

  def describe(
    self, settings: Mapping[str, Any], *, measures: Sequence[str]
  ) -> None:
    """Shows the settings of the run in TensorBoard, as text and as hparams.

    Args:
      settings: name -> value, "." groups names.
      measures: names of `write` to compare runs by.
    """
    if not self._active:
      return
    rows = [f"| {name} | `{value!r}` |" for name, value in settings.items()]
    table = "\n".join(["| field | value |", "| --- | --- |", *rows])
    plain = {
      name: value if isinstance(value, int | float | str) else repr(value)
      for name, value in settings.items()
    }
    self._show(
      summary.text("config", table),
      *summary.hparams(plain, dict.fromkeys(measures, 0.0)),
      step=0,
    )

  def truncate_after(self, step: int) -> None:
    """Drops what was written for steps later than `step`.

    Call it after a restore, before the first `write`: the steps since that
    checkpoint will be run, and written, again.

    Raises:
      InputError: metrics.jsonl has a line that this class did not write.
    """
    if not self._active:
      return
    self._file.close()
    kept = []
    lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
      try:
        line_step = json.loads(line)["step"]
        later = line_step > step
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(
          f"{self._path} line {number} is no metrics line: {line[:80]!r}."
          ' Wanted {"step": ..., ...}. Mend or remove the line'
        ) from error
      if not later:
        kept.append(line)
    if len(kept) < len(lines):
      draft = self._path.with_suffix(".tmp")
      with self._disk_faults():
        draft.write_text("".join(kept), encoding="utf-8")
        os.replace(draft, self._path)
    self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
    # A new event file that starts so hides the later steps of the older ones.
    if self._events is not None:
      self._events.close()
      self._events = None
    self._purge_step = step + 1

  def has(self, prefix: str, *, step: int) -> bool:
    """Whether something named "prefix..." has been written for a step."""
    if not self._active:
      return False
    lines = self._path.read_text(encoding="utf-8").splitlines()
    return any(
      line["step"] == step and any(name.startswith(prefix) for name in line)
      for line in map(json.loads, lines)
    )

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files."""
    if not self._active:
      return
    for file in (self._file, self._events):
      with contextlib.suppress(OSError):  # all lines are on disk, or it is told
        if file is not None:
          file.close()

  def _show(self, *parts: Any, step: int) -> None:
    """Writes events, whose values are on disk before it returns."""
    with self._disk_faults():
      # Opened late, so that an event file can start with the purge.
      if self._events is None:
        self._events = EventsWriter(str(self._directory / "events"))
        if self._purge_step is not None:
          start = SessionLog(status=SessionLog.START)
          self._write_event(session_log=start, step=self._purge_step)
      for part in parts:
        self._write_event(summary=part, step=int(step))
      self._events.flush()

  def _write_event(self, **content: Any) -> None:
    self._events.write_event(Event(wall_time=time.time(), **content))

  @contextlib.contextmanager
  def _disk_faults(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise InputError(
        f"{self._path}: metrics cannot be written ({error.strerror}). Free some"
        " space, or see to the disk, and give the same command: it goes on from"
        " the newest checkpoint"
      ) from error


def _number(name: str, value: Any) -> float:
  if np.size(value) != 1:
    raise ValueError(
      f"metric {name!r} has the shape {np.shape(value)}, wanted one number:"
      " reduce it first"
    )
  return float(np.asarray(value).reshape(()))


def _drop_torn_line(path: pathlib.Path) -> None:
  """Cuts an end without newline: the line that a killed run was writing."""
  content = path.read_bytes()
  whole = content.rfind(b"\n") + 1
  if whole < len(content):
    os.truncate(path, whole)
