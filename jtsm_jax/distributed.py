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
  printed by all.

  Args:
    coordinator: HOST:PORT of the first process. None, like the others: a TPU
      pod, Slurm or Open MPI tells.
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
      f"--distributed: {reason}. Outside TPU pods, Slurm and Open MPI give "
      "--coordinator=HOST:PORT, --num_processes and --process_id; the first "
      "process must be reachable there"
    ) from error
  if jax.process_index() > 0:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end)
