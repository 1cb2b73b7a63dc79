"""The device mesh, and where batches and states lie on it.

The axes are ("data", "model"): the images of a batch are divided over "data",
the two large layers of the neck over "model". Everything else is replicated.
"""

from __future__ import annotations

import collections
import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jtsm_jax.types import InputError

RULES = (
  # Columns of the first layer, rows of the second: what lies between them stays
  # divided, and one sum over "model" makes the result whole.
  (r"neck/fc1/kernel$", PartitionSpec(None, "model")),
  (r"neck/fc1/bias$", PartitionSpec("model")),
  (r"neck/fc2/kernel$", PartitionSpec("model", None)),
)
"""(pattern of a path, how the array lies). The slots of an optimizer and the
average of the parameters have paths that end alike, so they lie alike."""


def make_mesh(*batch_sizes: int, model: int = 1) -> Mesh:
  """A mesh ("data", "model") over the devices, process after process.

  The devices that share the layers belong to one process, and each process has
  its slice of a batch. `jax.make_mesh` would follow the wires instead: on a TPU
  slice its rows may lie in two hosts, which load different images.

  Args:
    *batch_sizes: images of each global batch that are computed at once. With a
      single process, only as many devices are used as divide them all.
    model: size of the axis "model".

  Raises:
    InputError: `model` does not divide the devices of each process, or several
      processes cannot divide a batch.
  """
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  counts = collections.Counter(d.process_index for d in devices)
  for process, count in counts.items():
    if model < 1 or count % model:
      raise InputError(
        f"config.train.model_parallel is {model}; it must divide the {count} "
        f"devices of process {process}, and those of each other"
      )
  data = len(devices) // model
  common = math.gcd(*batch_sizes) if batch_sizes else data
  if jax.process_count() == 1:
    data = max(n for n in range(1, data + 1) if common % n == 0)
  elif common % data:
    raise InputError(
      f"{len(devices)} devices in {jax.process_count()} processes share each "
      f"batch {data} ways, which must divide {common}: config.train.batch_size "
      "over config.train.accumulation, and config.warm_up.batch_size where "
      "there is a warm-up"
    )
  return Mesh(
    np.reshape(devices[: data * model], (data, model)),
    ("data", "model"),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(
  state: Any, mesh: Mesh, *, divide_optimizer: bool = False
) -> Any:
  """Where each array of a state lies: a tree of shardings.

  Args:
    state: a `TrainState`, or its shapes.
    mesh: from `make_mesh`.
    divide_optimizer: also divide the slots of the optimizer over "data", along
      the first axis that the devices divide and that is not divided yet. Takes
      less memory and more communication.

  Raises:
    InputError: the axis "model" does not divide a layer.
  """

  def place(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next((s for p, s in RULES if re.search(p, name)), PartitionSpec())
    axes = [*spec] + [None] * (array.ndim - len(spec))
    for size, axis in zip(array.shape, axes, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise InputError(
          f"config.train.model_parallel is {mesh.shape[axis]}; it must divide "
          f"config.neck.widths, and {name} is {tuple(array.shape)}"
        )
    if divide_optimizer and name.startswith("opt_state/"):
      for i, size in enumerate(array.shape):
        if axes[i] is None and size and size % mesh.shape["data"] == 0:
          axes[i] = "data"
          break
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree_util.tree_map_with_path(place, state)


def place(tree: Any, shardings: Any) -> Any:
  """Puts host arrays, the same ones in every process, where they belong."""

  def put(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(put, tree, shardings)


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Moves a tree of host arrays [B, ...] to the devices, split over "data".

  Args:
    batch: this process's part of it, as large as that of each other process.
    mesh: from `make_mesh`.

  Raises:
    ValueError: the devices of this process are to hold other rows.
  """
  sharding = NamedSharding(mesh, PartitionSpec("data"))

  def put(x):
    shape = len(x) * jax.process_count(), *x.shape[1:]
    return jax.make_array_from_process_local_data(sharding, x, shape)

  return jax.tree.map(put, batch)


def local_rows(tree: Any, mesh: Mesh) -> Any:
  """This process's part of arrays [B, ...]: the inverse of `put_batch`."""
  if jax.process_count() > 1:
    tree = multihost_utils.global_array_to_host_local_array(
      tree, mesh, PartitionSpec("data")
    )
  return jax.device_get(tree)


def to_host(tree: Any) -> Any:
  """Whole arrays as numpy, in every process; all of them must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
