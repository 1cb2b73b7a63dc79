"""The device mesh, and where batches and states lie on it."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(*batch_sizes: int) -> Mesh:
  """A mesh ("data", "model") over the devices.

  Args:
    *batch_sizes: sizes of the global batches; with a single process, only as
      many devices are used as divide them all.
  """
  devices = jax.devices()
  if jax.process_count() == 1 and batch_sizes:
    common = math.gcd(*batch_sizes)
    count = max(n for n in range(1, len(devices) + 1) if common % n == 0)
    devices = devices[:count]
  return jax.make_mesh(
    (len(devices), 1),
    ("data", "model"),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Moves a tree of host arrays [B, ...] to the devices, split over "data"."""
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
