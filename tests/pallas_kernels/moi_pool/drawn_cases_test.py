"""All implementations against the loop, on cases that hypothesis draws."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pallas_kernels
from tests.pallas_kernels.moi_pool.pooling_cases import loop_pool

# One compilation for all: what is drawn are values, not shapes, and the shapes
# that a case uses less of are filled up with what must not matter.
P, H, W, C = 3, 6, 7, 2
BINS = (3, 2)


@functools.cache
def value_and_gradient(implementation):
  """Compiled: maxima, and the gradient of their weighted sum."""

  @jax.jit
  def function(features, masks, boxes, weights):
    pooled, pullback = jax.vjp(
      lambda f: pallas_kernels.moi_pool(
        f,
        masks,
        boxes,
        output_size=BINS,
        compensation=None,
        implementation=implementation,
        interpret=implementation.startswith("pallas"),
      ),
      features,
    )
    return pooled, pullback(weights)[0]

  return function


# Few different values, for ties; boxes of one cell, on and over the border.
FEATURES = hnp.arrays(np.float32, (H, W, C), elements=st.integers(-2, 2))
MASKS = hnp.arrays(bool, (P, H, W)) | st.builds(
  lambda p, y, x: ((p, y, x) == np.indices((P, H, W)).T).all(-1).T,
  st.integers(0, P - 1),
  st.integers(0, H - 1),
  st.integers(0, W - 1),
)
BOXES = hnp.arrays(np.int32, (P, 4), elements=st.integers(-2, 8))


@pytest.mark.parametrize(
  "implementation", ["reference", "xla", "pallas_tpu", "pallas_triton"]
)
@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(FEATURES, MASKS, BOXES)
def test_equals_the_loop(implementation, features, masks, boxes):
  weights = np.arange(P * 6 * C, dtype=np.float32).reshape(P, *BINS, C)
  pooled, gradient = value_and_gradient(implementation)(
    jnp.asarray(features), masks, boxes, weights
  )
  expected, argmax = loop_pool(features, masks, boxes, BINS)
  np.testing.assert_array_equal(pooled, expected)
  total = np.zeros((H * W, C))
  *_, c = np.nonzero(argmax >= 0)
  np.add.at(total, (argmax[argmax >= 0], c), weights[argmax >= 0])
  np.testing.assert_array_equal(np.reshape(gradient, (H * W, C)), total)


def test_full_masks_equal_torchvision():
  torch = pytest.importorskip("torch", reason="the extra 'bench' has it")
  ops = pytest.importorskip("torchvision.ops")
  rng = np.random.default_rng(0)
  features = rng.normal(size=(61, 80, 3)).astype(np.float32)
  # As many boxes as it takes to have every height and width.
  y0, x0 = rng.integers(0, 61, 400), rng.integers(0, 80, 400)
  y1, x1 = rng.integers(y0, 61), rng.integers(x0, 80)
  y0[:61], y1[:61] = 0, np.arange(61)
  x0[:80], x1[:80] = 0, np.arange(80)
  boxes = np.stack([y0, x0, y1, x1], 1).astype(np.int32)
  image = torch.from_numpy(features.transpose(2, 0, 1)[None].copy())
  image.requires_grad_()
  rois = np.concatenate([np.zeros((400, 1)), boxes[:, [1, 0, 3, 2]]], 1)
  theirs = ops.roi_pool(image, torch.from_numpy(rois.astype("f")), (7, 7))
  weights = rng.integers(-4, 5, theirs.shape).astype(np.float32)
  theirs.backward(torch.from_numpy(weights))
  masks = np.ones((400, 61, 80), bool)
  ours, pullback = jax.vjp(
    lambda f: pallas_kernels.moi_pool(f, masks, boxes), jnp.asarray(features)
  )
  (gradient,) = pullback(jnp.asarray(weights.transpose(0, 2, 3, 1)))
  np.testing.assert_array_equal(
    ours, theirs.detach().numpy().transpose(0, 2, 3, 1)
  )
  # Sums of small integers have no rounding.
  np.testing.assert_array_equal(gradient, image.grad[0].permute(1, 2, 0))
