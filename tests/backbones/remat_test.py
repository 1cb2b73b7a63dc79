"""Blocks that are computed twice: the same network, and less to keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.backbones.efficientnet_lite import EfficientNetLite0
from jtsm_jax.backbones.resnet import ResNet
from jtsm_jax.backbones.resnet_ws import ResNetWS
from jtsm_jax.train.cost import matmul_flops, peak_bytes
from tests.tiny import paths

IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("f")
NETWORKS = {
  "resnet_ws": functools.partial(ResNetWS, width=0.125, norm="batch"),
  "resnet": functools.partial(ResNet, depth=50, width=0.125, norm="batch"),
  "efficientnet": EfficientNetLite0,
}


def _loss(model, params, stats, images, *, train=True):
  stages, updated = model.apply(
    {"params": params, "batch_stats": stats},
    images,
    train=train,
    mutable=["batch_stats"],
  )
  return sum(jnp.square(x).mean() for x in stages.values()), updated


def _variables(model):
  """Shapes; compiling `init` takes longer than the tests."""
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_work(name):
  plain, remat = NETWORKS[name](), NETWORKS[name](remat=True)
  variables = _variables(plain)
  assert paths(_variables(remat)) == paths(variables)
  args = variables["params"], variables["batch_stats"]
  images = jax.ShapeDtypeStruct((2, 256, 256, 3), np.float32)
  flops, sizes = (
    [
      measure(
        jax.grad(functools.partial(_loss, model), has_aux=True), *args, images
      )
      for model in (plain, remat)
    ]
    for measure in (matmul_flops, peak_bytes)
  )
  # Three times the forward pass without, up to four times with.
  assert 1.1 < flops[1] / flops[0] < 1.34
  assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize("name", ["resnet_ws", "resnet"])
def test_gradients_and_statistics_are_the_same(name):
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: (
      (1 + rng.normal(size=x.shape) / 8).astype(np.float32)
      if len(x.shape) == 1
      else rng.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape).astype(
        np.float32
      )
    ),
    _variables(NETWORKS[name]()),
  )
  results = []
  for remat in (False, True):
    model = NETWORKS[name](remat=remat)
    gradient = jax.jit(jax.grad(functools.partial(_loss, model), has_aux=True))
    results.append(
      gradient(variables["params"], variables["batch_stats"], IMAGES)
    )
  wanted, found = map(paths, results)
  # Some gradients cancel and are rounding alone: on the scale of all of them.
  atol = 1e-6 * max(np.abs(value).max() for value in wanted.values())
  for path, value in wanted.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=atol)
