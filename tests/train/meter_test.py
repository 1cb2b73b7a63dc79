"""Means, speeds and shares, with a clock that the tests turn."""

import jax.numpy as jnp
import pytest

from jtsm_jax.train import meter as meter_module
from jtsm_jax.train.meter import Meter, summary


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
  return now


def test_what_the_time_went_into(clock):
  meter = Meter()
  for wait in (0.5, 1.5):
    with meter.waiting("input"):
      clock[0] += wait
    clock[0] += 2
    meter.count(images=8, flops=3e12)
  with meter.waiting("reestimation"):
    clock[0] += 4
  with meter.paused():
    clock[0] += 1000
  found = meter.read(peak_flops=2e12)
  # 10 seconds: 2 for input, 4 for masks, 4 for the rest.
  assert found["speed/images_per_second"] == pytest.approx(1.6)
  assert found["speed/input_wait"] == pytest.approx(0.2)
  assert found["speed/reestimation_wait"] == pytest.approx(0.4)
  assert found["speed/teraflops"] == pytest.approx(0.6)
  assert found["speed/utilisation"] == pytest.approx(0.3)

  # It starts afresh; without a known peak there is no utilisation.
  clock[0] += 2
  meter.count(images=1)
  found = meter.read(peak_flops=None)
  assert found["speed/images_per_second"] == pytest.approx(0.5)
  assert "speed/utilisation" not in found
  assert "speed/input_wait" not in found


def test_means_are_over_the_steps_that_have_the_metric(clock):
  meter = Meter()
  meter.add({"loss/a": jnp.float32(1), "x": jnp.float32(5)})
  meter.add({"loss/a": jnp.float32(2), "loss/b": jnp.float32(8)})
  clock[0] += 1
  found = meter.read(peak_flops=None)
  assert (found["loss/a"], found["loss/b"], found["x"]) == (1.5, 8, 5)
  assert found["loss/total"] == 9.5


def test_a_failed_wait_counts(clock):
  meter = Meter()

  def fail():
    with meter.waiting("input"):
      clock[0] += 3
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  clock[0] += 1
  found = meter.read(peak_flops=None)
  assert found["speed/input_wait"] == pytest.approx(0.75)


def test_summary():
  values = {"loss/a": 1.25, "loss/total": 2.0, "other": 3.0}
  text = summary(values | {"speed/images_per_second": 12.34})
  assert text == "a 1.250 total 2.000 | 12.3 images/s"
