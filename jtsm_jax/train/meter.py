"""Where the time of a run goes, and the means of its metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax


class Meter:
  """Means of the metrics since they were last read, and shares of the time.

  It looks at a clock that never jumps.
  """

  def __init__(self):
    self._reset()

  def _reset(self):
    self._start = time.monotonic()
    self._paused = 0.0
    self._images = 0
    self._flops = 0.0
    self._waited = {}
    self._sums = {}

  @contextlib.contextmanager
  def waiting(self, name: str) -> Iterator[None]:
    """Counts the time inside as waiting for `name`."""
    start = time.monotonic()
    try:
      yield
    finally:
      self._waited.setdefault(name, 0.0)
      self._waited[name] += time.monotonic() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out: evaluations are no training."""
    start = time.monotonic()
    try:
      yield
    finally:
      self._paused += time.monotonic() - start

  def count(self, *, images: int = 0, flops: float = 0.0) -> None:
    """Notes images, and operations of the matrix units of one device."""
    self._images += images
    self._flops += flops

  def add(self, metrics: dict[str, jax.Array]) -> None:
    """Adds the metrics of a step, which stay on the device."""
    for name, value in metrics.items():
      total, number = self._sums.get(name, (0.0, 0))
      self._sums[name] = (total + value, number + 1)

  def read(self, *, peak_flops: float | None) -> dict[str, float]:
    """The means, the total loss, the speed and the shares; starts afresh.

    Args:
      peak_flops: operations per second that a device can do; None where that
        is not known, and no utilisation is given.
    """
    values = {k: float(v) / n for k, (v, n) in self._sums.items()}
    values["loss/total"] = sum(
      v for k, v in values.items() if k.startswith("loss/")
    )
    seconds = time.monotonic() - self._start - self._paused
    seconds = max(seconds, 1e-9)
    values["speed/images_per_second"] = self._images / seconds
    values["speed/teraflops"] = self._flops / seconds / 1e12
    if peak_flops:
      values["speed/utilisation"] = self._flops / seconds / peak_flops
    for name, waited in self._waited.items():
      values[f"speed/{name}_wait"] = waited / seconds
    self._reset()
    return values


def summary(values: dict[str, float]) -> str:
  """The loss terms and the speed, for the progress line."""
  terms = {
    k.removeprefix("loss/"): v for k, v in values.items() if "loss/" in k
  }
  line = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
  return f"{line} | {values['speed/images_per_second']:.1f} images/s"
