"""The same gradients on four devices as on one."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from jtsm_jax.train.sharding import make_mesh, put_batch, replicated
from tests import tiny

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
  root = pathlib.Path(__file__).parents[2]
  found = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    cwd=root,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    },
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  assert found.stdout.strip() == "equal"


def test_batches_keep_their_values_and_what_is_absent_stays_so():
  batch = tiny.make_batch(2)
  mesh = make_mesh(1)
  placed = put_batch(batch, mesh)
  assert placed.features is None
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert mesh.axis_names == ("data", "model")
  assert replicated(mesh).is_fully_replicated
