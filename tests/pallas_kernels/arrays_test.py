"""Four devices, `jax.shard_map` with its defaults: values and gradients."""

import pytest

from tests.devices import run_script

HEAD = """
import functools
import jax, jax.numpy as jnp, numpy as np
import pallas_kernels as pk
from jax.sharding import PartitionSpec

assert jax.device_count() == 4
rng = np.random.default_rng(0)
mesh = jax.make_mesh((4,), ("data",))
split, whole = PartitionSpec("data"), PartitionSpec()
pools = {
  "moi_pool": functools.partial(pk.moi_pool, output_size=(2, 3)),
  "deterministic": functools.partial(pk.moi_pool, deterministic=True),
  "roi_pool": lambda f, m, b: pk.roi_pool(f, b, output_size=(2, 3)),
  "roi_align": lambda f, m, b: pk.roi_align(f, b, stride=1),
  "adaptive": lambda f, m, b: pk.roi_align(
    f, b, stride=1, sampling_ratio=None
  ),
  "tps_pool": functools.partial(pk.tps_pool, output_size=(2, 3)),
  "masked_average": lambda f, m, b: pk.masked_average(f, m),
}
# XLA cannot divide the gradient of a product of empty matrices.
pools_of_none = {n: p for n, p in pools.items() if n != "masked_average"}

def case(images, proposals, channels):
  features = rng.normal(size=(images, 6, 7, channels)).astype("f")
  masks = rng.random((images, proposals, 6, 7)) < 0.5
  ends = rng.integers(0, 6, (images, proposals, 2, 2))
  boxes = np.sort(ends, axis=2).reshape(images, proposals, 4)
  return features, masks, boxes.astype("int32")

def put(arrays, specs):
  return [
    jax.device_put(x, jax.NamedSharding(mesh, spec))
    for x, spec in zip(arrays, specs, strict=True)
  ]

def value_and_gradient(pool):
  def loss(features, masks, boxes):
    pooled = pool(features, masks, boxes)
    return jnp.sum(pooled**2), pooled
  return jax.jit(jax.value_and_grad(loss, has_aux=True))

def compare(name, found, expected):
  for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)
"""

IMAGES = """
for proposals, channels in ((0, 3), (5, 1)):
  arguments = case(4, proposals, channels)
  for name, pool in (pools if proposals else pools_of_none).items():
    pool = jax.vmap(pool)
    specs = split, split, split
    shards = jax.shard_map(pool, mesh=mesh, in_specs=specs, out_specs=split)
    expected = value_and_gradient(pool)(*arguments)
    found = value_and_gradient(shards)(*put(arguments, specs))
    compare(name, found, expected)
"""

# Each device has all features and a share of the proposals.
PROPOSALS = """
for proposals, channels in ((0, 3), (8, 1)):
  arguments = [x[0] for x in case(1, proposals, channels)]
  for name, pool in (pools if proposals else pools_of_none).items():
    specs = whole, split, split
    shards = jax.shard_map(pool, mesh=mesh, in_specs=specs, out_specs=split)
    expected = value_and_gradient(pool)(*arguments)
    found = value_and_gradient(shards)(*put(arguments, specs))
    compare(name, found, expected)
    # The gradients of the devices' own losses are summed.
    inside = jax.shard_map(
      jax.grad(lambda *x, pool=pool: jnp.sum(pool(*x) ** 2)),
      mesh=mesh,
      in_specs=specs,
      out_specs=whole,
    )
    found = jax.jit(inside)(*put(arguments, specs))
    compare(name, found, expected[1])
"""

# Without shard_map, on the explicit axes that make_mesh makes.
REPLICATED = """
arguments = [x[0] for x in case(1, 5, 3)]
for name, pool in pools.items():
  expected = value_and_gradient(pool)(*arguments)
  replicated = put(arguments, (whole,) * 3)
  compare(name, value_and_gradient(pool)(*replicated), expected)
"""


@pytest.mark.parametrize(
  "body",
  [IMAGES, PROPOSALS, REPLICATED],
  ids=["images", "proposals", "replicated"],
)
def test_values_and_gradients_are_those_of_one_device(body):
  run_script(HEAD + body, devices=4)
