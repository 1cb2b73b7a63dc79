"""The device mesh, and where batches and states lie on it."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jtsm_jax.types import Batch


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A mesh ("data", "model") over all devices, or the first `num_devices`."""
  devices = jax.devices()[:num_devices]
  return jax.make_mesh(
    (len(devices), 1),
    ("data", "model"),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
  """Moves a host batch to the devices, split over "data"."""
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
