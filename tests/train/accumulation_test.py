"""Synchronised SGD: the result is a matter of the batch, not of its division.

Eight devices exist only in a process that is started for it.
"""

from tests.devices import run_script

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np, optax
from jtsm_jax.models.neck_and_heads import Neck
from jtsm_jax.train import objectives, step
from jtsm_jax.train.sharding import (
  make_mesh, place, put_batch, state_shardings, to_host)
from jtsm_jax.train.state import create_state
from tests import tiny

STEPS, BATCH = 20, 32
assert jax.device_count() == 8
model = tiny.make_model(frozen=False).clone(
  neck=Neck(widths=(16, 16), dropout=0.5)
)
optimizer = optax.sgd(0.05, momentum=0.9)
batches = [tiny.make_batch(BATCH, seed=s) for s in range(3)]
variables = tiny.make_variables(model, batches[0])
losses = objectives.LossSettings(instances_per_image=4)


def train(data, model_axis, accumulation, divide=False):
  mesh = make_mesh(data, model=model_axis)
  assert mesh.devices.shape == (data, model_axis), mesh
  shapes = jax.eval_shape(
    lambda v: create_state(v, optimizer, averages=True), variables)
  shardings = state_shardings(shapes, mesh, divide_optimizer=divide)
  mining = step.make_mining_gradients(
    jax.random.key(0),
    model,
    mining=objectives.MiningSettings(num_things=tiny.NUM_THINGS, num_slots=5),
    losses=losses,
    accumulation=accumulation,
    proposal_block=0 if accumulation == 1 else 8,
  )
  branches = step.make_branch_gradients(
    jax.random.key(0), model, num_things=tiny.NUM_THINGS, losses=losses,
    accumulation=accumulation)
  apply = step.make_apply_gradients(
    optimizer, ema_decay=0.9, shardings=shardings)
  masks = jax.jit(tiny.pseudo_masks)
  state = jax.device_get(create_state(variables, optimizer, averages=True))
  state = place(state, shardings)
  for t in range(STEPS):
    with jax.set_mesh(mesh):
      batch = put_batch(batches[t % 3], mesh)
      assert len(batch.images.addressable_shards[0].data) == BATCH // data
      grads, mined, metrics = mining(state, batch)
      more, branch_metrics = branches(state, batch, mined, masks(batch, mined))
      state, norm = apply(state, grads, more)
  kernel = state.params["neck"]["fc1"]["kernel"]
  width = kernel.addressable_shards[0].data.shape[1]
  assert width == 16 // model_axis, width
  slots = state.opt_state[0].trace["neck"]["fc1"]["kernel"]
  rows, columns = slots.addressable_shards[0].data.shape
  assert columns == 16 // model_axis
  assert rows == 32 // (data if divide else 1)
  metrics = jax.device_get(metrics | branch_metrics | norm)
  return to_host(state), jax.device_get(mined), metrics


def paths(tree):
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x)
          for p, x in jax.tree_util.tree_leaves_with_path(tree)}


expected = paths(train(1, 1, 1))
moved = expected["0/params/neck/fc1/kernel"] - variables["params"]["neck"][
  "fc1"]["kernel"]
assert np.abs(moved).max() > 1e-2
for data, model_axis, accumulation, divide in (
  (1, 1, 4, False),
  (8, 1, 1, False),
  (8, 1, 4, True),
  (4, 2, 1, True),
  (4, 2, 4, False),
  (2, 4, 1, False),
  (2, 4, 4, False),
):
  found = paths(train(data, model_axis, accumulation, divide))
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    # The smallest values of an array have no digits of their own; and the
    # gradient of one bias, which a softmax cancels, is rounding alone.
    atol = max(1e-5 * np.abs(value).max(), 1e-6)
    np.testing.assert_allclose(
      found[name], value, rtol=1e-5, atol=atol,
      err_msg=f"{name} {data, model_axis, accumulation, divide}")
print("equal")
"""


def test_twenty_steps_are_the_same_on_every_mesh():
  # NPROC: threads for the devices that wait for one another. With as many as
  # there are devices, two sums in flight at once can take them all.
  found = run_script(SCRIPT, devices=8, timeout=900, NPROC="64")
  assert found == "equal"
