"""The semantic branch against a convolution by loops."""

import jax
import numpy as np

from jtsm_jax.models.semantic_branch import SemanticBranch


def _conv(x, layer):
  """3 x 3 with zeros around, [H, W, C]."""
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  h, w = x.shape[:2]
  out = layer["bias"].astype(np.float64)
  for i in range(3):
    for j in range(3):
      out = out + padded[i : i + h, j : j + w] @ layer["kernel"][i, j]
  return out


def test_equals_two_convolutions_and_a_linear_layer():
  branch = SemanticBranch(num_stuff=2, channels=4)
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 5, 6, 3)).astype(np.float32)
  shapes = jax.eval_shape(branch.init, jax.random.key(0), features)
  params = jax.tree.map(
    lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes
  )["params"]
  found = jax.jit(branch.apply)({"params": params}, features)
  assert found.shape == (2, 5, 6, 3)  # a thing, and two stuff classes
  for b in range(2):
    x = np.maximum(_conv(features[b], params["conv1"]), 0)
    x = np.maximum(_conv(x, params["conv2"]), 0)
    last = params["predictor"]
    expected = x @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-4)
