"""Several processes, on as many hosts, that train together."""

from __future__ import annotations

import os
import sys

import jax

from jtsm_jax.types import InputError


def start(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Meets the other processes; call it before anything else of jax.

  Only the first process prints and shows progress from then on; errors are
  printed by all. A process that a launcher has started alone on its host takes
  all devices there; several on one host take one each.

  Args:
    coordinator: HOST:PORT of the first process. None, like the others: a TPU
      pod, Slurm or Open MPI (up to 4) tells.
    num_processes: in all.
    process_id: of this one, from 0.

  Raises:
    InputError: the others cannot be found.
  """
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f"--distributed: {reason}. Outside TPU pods, Slurm and Open MPI up to "
      "4 give --coordinator=HOST:PORT, --num_processes and --process_id; the "
      "first process must be reachable there"
    ) from error
  # JAX gives each process that a launcher has started one device.
  if _is_alone_on_host(num_processes) and not os.environ.get(
    "JAX_LOCAL_DEVICE_IDS"
  ):
    for kind in ("cuda", "rocm", "oneapi"):
      name = f"jax_{kind}_visible_devices"
      jax.config.update(name, os.environ.get(name.upper(), "all"))
  if jax.process_index() > 0:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end)


def _is_alone_on_host(num_processes: int | None) -> bool:
  """Whether Slurm or Open MPI has started one process on each host."""
  # Open MPI first, which may start its own processes by Slurm.
  if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
    return os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
  tasks = num_processes or os.environ.get("SLURM_NTASKS")
  return str(tasks) == os.environ.get("SLURM_STEP_NUM_NODES")
