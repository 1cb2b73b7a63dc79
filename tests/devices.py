"""Scripts that run where the CPU is divided into several devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def environment(devices, **more):
  """The variables of a process that has so many devices."""
  split = f" --xla_force_host_platform_device_count={devices}"
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + split,
    **more,
  }


def run_script(script, *, devices, timeout=300, **more):
  """Runs a Python script, which must not fail; returns what it prints."""
  found = subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT,
    env=environment(devices, **more),
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  return found.stdout.strip()
