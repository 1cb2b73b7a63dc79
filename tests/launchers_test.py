"""Which devices a process takes that Slurm or Open MPI has started."""

import contextlib
import os
import socket
import subprocess
import sys

import jax
import pytest

from jtsm_jax import distributed

PROGRAM = """
import jax
from jtsm_jax import distributed
distributed.start(None, None, None)
print(jax.process_count(), jax.config._read("jax_cuda_visible_devices"))
"""


def slurm(tasks, nodes):
  """What Slurm tells its second task on a node, or the only one."""
  return {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": str(nodes),
    "SLURM_NTASKS": str(tasks),
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0" if tasks == nodes else "1",
  }


def open_mpi(local_size):
  return {"OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size)}


@pytest.fixture
def visible(monkeypatch):
  """Starts with an environment; returns what JAX may see of the GPUs."""

  def restrict(*_):
    """What JAX does under a launcher: one device for each process."""
    jax.config.update("jax_cuda_visible_devices", "1")

  def start(environment, by_hand=(None, None, None)):
    for name in {*slurm(1, 1), *open_mpi(1), "JAX_LOCAL_DEVICE_IDS"}:
      monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    distributed.start(*by_hand)
    return jax.config._read("jax_cuda_visible_devices")

  monkeypatch.setattr(jax.distributed, "initialize", restrict)
  yield start
  for kind in ("cuda", "rocm", "oneapi"):
    jax.config.update(f"jax_{kind}_visible_devices", "all")


@pytest.mark.parametrize(
  "environment",
  [slurm(4, 4), slurm(1, 1), open_mpi(1), slurm(8, 4) | open_mpi(1)],
)
def test_the_only_process_of_a_host_takes_all_its_devices(visible, environment):
  assert visible(environment) == "all"
  some = {"JAX_CUDA_VISIBLE_DEVICES": "2,3"}
  assert visible(environment | some) == "2,3"


@pytest.mark.parametrize(
  "environment",
  [
    slurm(8, 4),
    open_mpi(8),
    slurm(4, 4) | open_mpi(8),  # whose daemons Slurm has started
    slurm(4, 4) | {"JAX_LOCAL_DEVICE_IDS": "1"},
    {},
  ],
)
def test_others_keep_what_jax_has_chosen(visible, environment):
  assert visible(environment) == "1"


def test_processes_that_are_numbered_by_hand(visible):
  assert visible(slurm(1, 4), ("host:1", 4, 0)) == "all"
  assert visible(slurm(4, 4), ("host:1", 8, 0)) == "1"


def test_what_jax_itself_makes_of_a_task_of_slurm():
  with contextlib.closing(socket.socket()) as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = slurm(1, 1) | {
    "JAX_COORDINATOR_PORT": str(port),
    "JAX_PLATFORMS": "cpu",
  }
  ended = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert ended.stdout.split() == ["1", "all"], ended.stderr
