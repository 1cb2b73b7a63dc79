"""Eight devices pool their own images, and nothing is gathered."""

from tests.devices import run_script

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jtsm_jax.models.proposal_features import ProposalFeatures
from tests import tiny

assert jax.device_count() == 8
batch = tiny.make_batch(8)
features = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("f")
module = ProposalFeatures(stride=tiny.STRIDE, output_size=(2, 2))
weights = np.random.default_rng(1).normal(size=(8, tiny.P, 12)).astype("f")

def loss(features, batch, weights):
  return jnp.sum(module.apply({}, features, batch) * weights)

function = jax.jit(jax.grad(loss))
alone = function(features, batch, weights)
mesh = jax.make_mesh((8,), ("data",))
arguments = jax.device_put(
  (features, batch, weights), NamedSharding(mesh, PartitionSpec("data"))
)
with jax.set_mesh(mesh):
  compiled = function.lower(*arguments).compile()
found = compiled(*arguments)
assert len(found.sharding.device_set) == 8
assert not found.sharding.is_fully_replicated
np.testing.assert_allclose(found, alone, rtol=1e-6)
text = compiled.as_text()
for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
  assert name not in text, name
print("nothing gathered")
"""


def test_nothing_is_gathered():
  assert run_script(SCRIPT, devices=8) == "nothing gathered"
