"""The same gradients on four devices as on one; meshes of several hosts."""

import contextlib
import dataclasses
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jtsm_jax.train.sharding import make_mesh, put_batch, replicated
from jtsm_jax.types import InputError
from tests import tiny
from tests.devices import ROOT, environment, run_script

# Four devices exist only in a process that is started for it.
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jtsm_jax.train import objectives, step
from jtsm_jax.train.sharding import make_mesh, put_batch, replicated
from jtsm_jax.train.state import TrainState
from tests import tiny

assert jax.device_count() == 4
model = tiny.make_model(
  frozen=False,
  dropout=0.5,
  num_refinements=1,
  instance=False,
  semantic=False,
  cells=True,
)
batch = tiny.make_batch(4)
variables = dict(tiny.make_variables(model, batch))
params = variables.pop("params")
state = TrainState(jnp.int32(0), params, variables, None)
results = []
for devices, accumulation in ((1, 1), (4, 1), (1, 2)):
  mining_gradients = step.make_mining_gradients(
    jax.random.key(0),
    model,
    mining=objectives.MiningSettings(num_things=tiny.NUM_THINGS, num_slots=5),
    losses=objectives.LossSettings(),
    accumulation=accumulation,
  )
  mesh = make_mesh(devices)
  placed = put_batch(batch, mesh)
  assert len(placed.images.sharding.device_set) == devices
  here = placed.images.addressable_shards[0].data.shape[0]
  assert here == 4 // devices, here
  with jax.set_mesh(mesh):
    grads, mined, metrics = mining_gradients(
      jax.device_put(state, replicated(mesh)), placed
    )
  results.append(jax.device_get((grads, mined, metrics)))
for found in results[1:]:
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    results[0],
    found,
  )
largest = max(abs(g).max() for g in jax.tree.leaves(results[0][0]))
assert largest > 1e-3, largest
print("equal")
"""


def test_four_devices_and_two_parts_give_the_gradients_of_one():
  assert run_script(SCRIPT, devices=4) == "equal"


def test_batches_keep_their_values_and_what_is_absent_stays_so():
  batch = tiny.make_batch(2)
  mesh = make_mesh(1)
  placed = put_batch(batch, mesh)
  assert placed.features is None
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert mesh.axis_names == ("data", "model")
  assert replicated(mesh).is_fully_replicated


@dataclasses.dataclass(frozen=True)
class _Chip:
  """What jax.make_mesh and a mesh look at."""

  id: int
  process_index: int
  coords: tuple[int, int, int]
  device_kind: str
  platform: str = "tpu"
  core_on_chip: int = 0


def _pretend_slice(monkeypatch, chips, host):
  """jax sees a TPU slice, whose devices are numbered by place, not by host."""
  hosts = tuple(c // h for c, h in zip(chips, host, strict=True))
  devices = [
    _Chip(
      id=i,
      process_index=int(
        np.ravel_multi_index(np.floor_divide(place, host), hosts)
      ),
      coords=(*place[::-1], *(0,) * (3 - len(place))),
      device_kind="TPU v5 lite" if len(chips) == 2 else "TPU v4",
    )
    for i, place in enumerate(np.ndindex(chips))
  ]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  monkeypatch.setattr(jax, "process_count", lambda: int(np.prod(hosts)))
  monkeypatch.setattr(jax, "local_device_count", lambda: int(np.prod(host)))
  return devices


@pytest.mark.parametrize(
  ("chips", "host", "model"),
  [
    ((8, 8), (2, 2), 4),
    ((8, 8), (2, 2), 2),
    ((4, 4), (2, 2), 4),
    ((4, 4), (2, 2), 2),
    ((4, 4, 4), (1, 2, 2), 4),
  ],
)
def test_model_stays_within_a_host(monkeypatch, chips, host, model):
  devices = _pretend_slice(monkeypatch, chips, host)
  mesh = make_mesh(len(devices), model=model)
  assert mesh.devices.shape == (len(devices) // model, model)
  owners = np.vectorize(lambda d: d.process_index)(mesh.devices)
  assert (owners == owners[:, :1]).all()
  # The k-th process has the k-th slice of each batch.
  assert (np.diff(owners[:, 0]) >= 0).all()
  assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}


def test_model_that_a_host_cannot_hold_is_an_error(monkeypatch):
  devices = _pretend_slice(monkeypatch, (4, 4), (2, 2))
  for model in (0, 3, 8):
    with pytest.raises(InputError, match=f"is {model}; .* 4 devices"):
      make_mesh(16, model=model)
  devices.pop()  # the last process has three
  with pytest.raises(InputError, match=r"is 2; .* 3 devices of process 3"):
    make_mesh(15, model=2)


# Two processes with two devices: over hosts, and with model within each.
TWO = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from jtsm_jax.train.sharding import local_rows, make_mesh, put_batch

k = int(sys.argv[2])
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, k)
mine = {"x": np.arange(4, dtype="f") + 4 * k}
mesh = make_mesh(8, model=2)
whole = put_batch(mine, mesh)
assert whole["x"].shape == (8,)
np.testing.assert_array_equal(local_rows(whole, mesh)["x"], mine["x"])
across = Mesh(mesh.devices.T, ("data", "model"))
try:
  put_batch(mine, across)
except ValueError as error:
  print(error)
"""


def test_a_part_of_a_batch_that_is_not_the_mesh_s_is_an_error():
  with contextlib.closing(socket.socket()) as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, str(port), str(k)],
      cwd=ROOT,
      env=environment(2),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for k in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert "global_shape" in out, out
