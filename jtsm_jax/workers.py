"""Processes that share the cores, one thread each."""

from __future__ import annotations

import collections
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jtsm_jax.types import InputError

JOBS_AHEAD = 4  # jobs per worker that are taken before they are needed
ENVIRONMENT = dict(  # one thread for each process; GPUs stay free
  OMP_NUM_THREADS="1",
  OPENBLAS_NUM_THREADS="1",
  MKL_NUM_THREADS="1",
  NPROC="1",  # XLA's pools of threads
  MALLOC_ARENA_MAX="1",  # glibc: those threads share one pool of memory
  JAX_PLATFORMS="cpu",
)


def map_in_processes(
  function: Callable[..., Any],
  jobs: Iterable[tuple],
  num_workers: int,
  *,
  remedy: str = "take fewer workers",
) -> Iterator[Any]:
  """Yields `function(*job)` in the order of the jobs, which are taken lazily.

  Args:
    function: a function of a module, with arguments and result that pickle.
    jobs: its arguments.
    num_workers: processes; 0 works in this one.
    remedy: what the error advises, such as "give --num_workers=8".

  Raises:
    InputError: a process was killed.
  """
  if num_workers == 0:
    for job in jobs:
      yield function(*job)
    return
  with start_processes(num_workers) as pool:
    try:
      yield from map_ahead(pool, function, jobs, JOBS_AHEAD * num_workers)
    except concurrent.futures.process.BrokenProcessPool as error:
      raise InputError(
        "a worker process was killed, most likely for want of memory;"
        f" {remedy} and start again"
      ) from error
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def map_ahead(
  pool: concurrent.futures.Executor,
  function: Callable[..., Any],
  jobs: Iterable[tuple],
  ahead: int,
) -> Iterator[Any]:
  """Yields `function(*job)` in the order of the jobs, computed by a pool.

  Args:
    pool: of threads or processes.
    function: of a job.
    jobs: its arguments, taken lazily.
    ahead: at most so many jobs are taken before they are needed.
  """
  waiting: collections.deque = collections.deque()
  try:
    for job in jobs:
      waiting.append(pool.submit(function, *job))
      if len(waiting) >= ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    for future in waiting:
      future.cancel()


@contextlib.contextmanager
def start_processes(
  number: int,
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
  """A pool of processes of one thread each, which see the CPU alone.

  They end with this process, also where it is killed.
  """
  before = {name: os.environ.get(name) for name in ENVIRONMENT}
  os.environ.update(ENVIRONMENT)
  try:
    yield concurrent.futures.ProcessPoolExecutor(
      number,
      # Forking after jax can deadlock.
      mp_context=multiprocessing.get_context("spawn"),
      initializer=start_worker,
    )
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value


def available_cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def start_worker() -> None:
  """Gives a worker process one thread of OpenCV, and the end of its parent."""
  import cv2

  cv2.setNumThreads(1)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  # One that waits for jobs holds the queue open itself, and never sees its end.
  multiprocessing.parent_process().join()
  os._exit(1)
