"""Tests of the processes that share the cores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import cv2
import pytest

from jtsm_jax import workers
from jtsm_jax.types import InputError


def environment(name):
  return os.environ.get(name), cv2.getNumThreads(), os.getpid()


def power(base, exponent):
  return base**exponent


def die(_):
  os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_order(num_workers):
  jobs = [(n, 2) for n in range(20)]
  found = list(workers.map_in_processes(power, jobs, num_workers))
  assert found == [n**2 for n in range(20)]


def test_jobs_are_taken_when_they_are_needed():
  taken = []

  def jobs():
    for n in range(1000):
      taken.append(n)
      yield n, 1

  results = workers.map_in_processes(power, jobs(), 1)
  assert next(results) == 0
  assert len(taken) == workers.JOBS_AHEAD
  results.close()


def test_workers_have_one_thread_and_no_accelerator(monkeypatch):
  monkeypatch.setenv("OMP_NUM_THREADS", "7")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "JAX_PLATFORMS"]
  jobs = [(name,) for name in names]
  found = list(workers.map_in_processes(environment, jobs, 1))
  assert [value for value, _, _ in found] == ["1", "1", "cpu"]
  assert {threads for _, threads, _ in found} == {1}
  assert os.getpid() not in {pid for _, _, pid in found}
  assert os.environ["OMP_NUM_THREADS"] == "7"  # this process keeps its own
  assert "JAX_PLATFORMS" not in os.environ


def test_a_killed_worker_is_reported():
  with pytest.raises(InputError, match=r"want of memory; give less and start"):
    list(workers.map_in_processes(die, [(0,)], 1, remedy="give less"))


OWN = """
import os, signal
from jtsm_jax import workers
for _ in workers.map_in_processes(os.getpid, [()] * 9, 1):
  os.kill(os.getpid(), signal.SIGKILL)
"""
LOADERS = """
import os, signal
import grain
from absl import flags
from jtsm_jax.data import pipeline
flags.FLAGS.mark_as_parsed()
steps = grain.MapDataset.range(9).to_iter_dataset().mp_prefetch(
  grain.MultiprocessingOptions(1), worker_init_fn=pipeline._start_worker)
for _ in steps:
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("program", [OWN, LOADERS])
def test_workers_end_when_their_parent_is_killed(program):
  with subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  ) as parent:
    try:
      _, err = parent.communicate(timeout=100)  # until nobody can write there
      assert parent.returncode == -signal.SIGKILL, err
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(parent.pid, signal.SIGKILL)
