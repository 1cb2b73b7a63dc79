"""The instance branch: layers, values, and that it sees its box alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from jtsm_jax.models.instance_branch import (
  MASK_SIZE,
  Deconvolution,
  InstanceBranch,
)

BRANCH = InstanceBranch(num_things=3, channels=4, num_convs=2, stride=8)


def _variables(module, *args):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes
  )


def test_paper_layers():
  branch = InstanceBranch(num_things=20)
  shapes = jax.eval_shape(
    branch.init,
    jax.random.key(0),
    np.zeros((1, 8, 8, 512), np.float32),
    np.zeros((1, 2, 4), np.float32),
  )["params"]
  kernels = {name: layer["kernel"].shape for name, layer in shapes.items()}
  assert kernels == {
    "conv1": (3, 3, 512, 256),
    **{f"conv{i}": (3, 3, 256, 256) for i in (2, 3, 4)},
    "deconv": (2, 2, 256, 256),
    "predictor": (256, 20),
  }


def test_logits_of_a_box_depend_on_its_cells_only():
  rng = np.random.default_rng(1)
  features = rng.normal(size=(2, 9, 9, 5)).astype(np.float32)
  # The same cells at another place, in another image, among other boxes.
  features[1, 5:9, 4:8] = features[0, 1:5, 2:6]
  boxes = np.array(
    [
      [[12, 20, 36, 44], [0, 0, 72, 72]],
      [[8, 0, 16, 60], [44, 36, 68, 60]],
    ],
    np.float32,
  )
  variables = _variables(BRANCH, features, boxes)
  found = jax.jit(BRANCH.apply)(variables, features, boxes)
  assert found.shape == (2, 2, MASK_SIZE, MASK_SIZE, 3)
  scale = np.abs(found[0, 0]).max()
  np.testing.assert_allclose(
    found[0, 0] / scale, found[1, 1] / scale, atol=1e-5
  )
  assert np.abs(found[0, 0] - found[0, 1]).max() > 0.1 * scale


@pytest.mark.parametrize("ratio", [2, None])
def test_equals_its_layers_one_by_one(ratio):
  rng = np.random.default_rng(3)
  features = rng.normal(size=(1, 9, 9, 5)).astype(np.float32)
  boxes = np.array([[[12, 20, 36, 44], [0, 0, 72, 72]]], np.float32)
  variables = _variables(BRANCH, features, boxes)
  branch = BRANCH.clone(sampling_ratio=ratio)
  found = jax.jit(branch.apply)(variables, features, boxes)
  layers = variables["params"]
  with jax.default_matmul_precision("highest"):
    x = pk.roi_align(
      features[0],
      boxes[0],
      stride=8,
      output_size=(14, 14),
      sampling_ratio=ratio,
    )
    x = np.asarray(x, np.float64)
    for name in ("conv1", "conv2"):
      kernel = layers[name]["kernel"]  # [3, 3, C, D]
      padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
      x = layers[name]["bias"] + sum(
        padded[:, dy : dy + 14, dx : dx + 14] @ kernel[dy, dx]
        for dy in range(3)
        for dx in range(3)
      )
      assert 0.2 < (x < 0).mean() < 0.8
      x = np.maximum(x, 0)
  # Cell (2 y + dy, 2 x + dx) has the weights [1 - dy, 1 - dx]: flax flips them.
  wide = np.zeros((2, 28, 28, 4))
  for dy in range(2):
    for dx in range(2):
      kernel = layers["deconv"]["kernel"][1 - dy, 1 - dx]
      wide[:, dy::2, dx::2] = x @ kernel + layers["deconv"]["bias"]
  assert 0.2 < (wide < 0).mean() < 0.8
  last = layers["predictor"]
  wanted = np.maximum(wide, 0) @ last["kernel"] + last["bias"]
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found[0] / scale, wanted / scale, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (1, 1, 1, 1)])
def test_deconvolution_is_that_of_flax(shape):
  rng = np.random.default_rng(2)
  x = rng.normal(size=shape).astype(np.float32)
  ours = Deconvolution(6, kernel_init=nn.initializers.normal())
  theirs = nn.ConvTranspose(6, (2, 2), strides=(2, 2))
  variables = _variables(ours, x)
  shapes = jax.tree.map(
    np.shape, jax.eval_shape(theirs.init, jax.random.key(0), x)
  )
  assert jax.tree.map(np.shape, variables) == shapes

  def result_and_gradients(layer):
    y, pull_back = jax.vjp(layer.apply, variables, x)
    return y, pull_back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    result_and_gradients(ours),
    result_and_gradients(theirs),
  )
