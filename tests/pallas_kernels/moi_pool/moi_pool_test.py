"""MoIPool, each implementation against numpy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import pallas_kernels
from pallas_kernels.moi_pool import xla
from tests.pallas_kernels.moi_pool.pooling_cases import (
  loop_pool,
  random_case,
  unusual_case,
)

IMPLEMENTATIONS = ["reference", "xla"]  # kernels_test.py has the kernels

available_bins = jax.jit(
  pallas_kernels.available_bins, static_argnames="output_size"
)
masked_average = jax.jit(pallas_kernels.masked_average)
moi_pool = jax.jit(
  pallas_kernels.moi_pool,
  static_argnames=("output_size", "compensation", "implementation"),
)
roi_pool = jax.jit(pallas_kernels.roi_pool, static_argnames="output_size")


@pytest.fixture(params=IMPLEMENTATIONS)
def pool(request):
  """Uncompensated pooling by one implementation, jitted."""
  return functools.partial(
    moi_pool, compensation=None, implementation=request.param
  )


@pytest.mark.parametrize("output_size", [(7, 7), (1, 1), (3, 5), (12, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_loop(pool, output_size, ties):
  features, masks, boxes = random_case(ties=ties)
  got = pool(features, masks, boxes, output_size=output_size)
  expected, argmax = loop_pool(features, masks, boxes, output_size)
  assert (argmax < 0).any()
  assert (expected < 0).any()  # a masked maximum, not max(mask * features)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("grid", [(1, 1), (1, 17), (16, 16), (20, 15)])
def test_odd_grids(pool, grid):
  features, masks, boxes = random_case(1, grid=grid)
  got = pool(features, masks, boxes, output_size=(4, 3))
  expected, _ = loop_pool(features, masks, boxes, (4, 3))
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("ties", [False, True])
def test_gradient_is_the_scatter_from_the_argmax(pool, ties):
  features, masks, boxes = random_case(2, ties=ties)
  _, argmax = loop_pool(features, masks, boxes, (3, 4))
  weights = np.random.default_rng(3).normal(size=argmax.shape)

  def loss(features):
    pooled = pool(features, masks, boxes, output_size=(3, 4))
    return jnp.sum(pooled * weights)

  got = jax.grad(loss)(jnp.asarray(features))
  expected = np.zeros((features.shape[0] * features.shape[1], 3))
  *_, c = np.nonzero(argmax >= 0)
  np.add.at(expected, (argmax[argmax >= 0], c), weights[argmax >= 0])
  np.testing.assert_allclose(
    got, expected.reshape(features.shape), rtol=1e-5, atol=1e-5
  )


def test_first_of_equal_maxima_gets_the_gradient(pool):
  features = jnp.ones((3, 4, 1))
  masks = np.ones((1, 3, 4), bool)
  masks[0, 0, :2] = False
  boxes = jnp.array([[0, 0, 2, 3]])
  got = jax.grad(lambda f: pool(f, masks, boxes, output_size=(1, 1)).sum())(
    features
  )
  expected = np.zeros((3, 4, 1))
  expected[0, 2] = 1
  np.testing.assert_array_equal(got, expected)


def test_gradient_equals_finite_differences(pool):
  features, masks, boxes = random_case(4, grid=(5, 6), channels=2)
  # Distinct values, far enough apart for the step of the differences.
  order = np.random.default_rng(5).permutation(features.size)
  features = jnp.asarray(order.reshape(features.shape), jnp.float32) / 10
  check_grads(
    lambda f: pool(f, masks, boxes, output_size=(2, 3)),
    (features,),
    order=1,
    modes=["rev"],
    eps=0.02,
    rtol=1e-2,
    atol=1e-2,
  )


def test_rematerialised(pool):
  features, masks, boxes = random_case(2)

  def loss(features):
    pooled = pool(features, masks, boxes, output_size=(3, 4))
    return jnp.sum(jnp.sin(pooled))  # its gradient needs the pooled values

  kept = jax.value_and_grad(loss)(features)
  computed_again = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(features)
  for again, once in zip(computed_again, kept, strict=True):
    np.testing.assert_allclose(again, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"deterministic": True},
    {"implementation": "pallas_tpu", "interpret": True},
    {"implementation": "pallas_triton", "interpret": True},
  ],
)
def test_gradients_of_second_order(options):
  features, masks, boxes = random_case(2, grid=(5, 6), proposals=6)
  boxes = np.clip(boxes, 0, 4)

  def square_of_gradient(features, options):
    def loss(features):
      pooled = pallas_kernels.moi_pool(
        features, masks, boxes, output_size=(2, 3), **options
      )
      return jnp.sum(pooled**3)

    return jnp.sum(jax.grad(loss)(features) ** 2)

  found, expected = (
    jax.jit(jax.grad(functools.partial(square_of_gradient, options=o)))(
      jnp.asarray(features)
    )
    for o in (options, {"implementation": "reference"})
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cells", [255, 256, 65_536])
def test_argmax_type_holds_the_last_cell_and_the_mark(cells):
  features = jnp.arange(cells, dtype=jnp.float32).reshape(1, cells, 1)
  # The last two cells, and a box outside.
  boxes = jnp.array([[0, cells - 2, 0, cells - 1], [2, 0, 2, 0]])
  _, got = xla.pooled_argmax(features, None, boxes, (1, 1))
  np.testing.assert_array_equal(got.ravel(), [cells - 1, cells])
  assert got.dtype == {255: "uint8", 256: "uint16", 65_536: "uint32"}[cells]


def test_nan_and_infinities(pool):
  features, masks, boxes = unusual_case()
  got, pullback = jax.vjp(
    lambda f: pool(f, masks, boxes, output_size=(2, 3)), jnp.asarray(features)
  )
  expected, argmax = loop_pool(features, masks, boxes, (2, 3))
  np.testing.assert_array_equal(got, expected)
  (gradient,) = pullback(jnp.ones_like(got))
  counts = np.zeros((9 * 13, 3))
  *_, c = np.nonzero(argmax >= 0)
  np.add.at(counts, (argmax[argmax >= 0], c), 1)
  np.testing.assert_array_equal(gradient.reshape(-1, 3), counts)


def test_no_proposals(pool):
  features, masks, boxes = random_case()
  got = pool(features, masks[:0], boxes[:0], output_size=(7, 7))
  assert got.shape == (0, 7, 7, 3)
  gradient = jax.grad(
    lambda f: pool(f, masks[:0], boxes[:0], output_size=(7, 7)).sum()
  )(features)
  np.testing.assert_array_equal(gradient, 0)


def test_bfloat16(pool):
  features, masks, boxes = random_case(6)
  features = jnp.asarray(features, jnp.bfloat16)
  got, pullback = jax.vjp(
    lambda f: pool(f, masks, boxes, output_size=(3, 3)), features
  )
  expected, _ = loop_pool(
    np.asarray(features, np.float32), masks, boxes, (3, 3)
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(got, np.float32), expected)
  (gradient,) = pullback(got)
  assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("over_images", [jax.vmap, None])
def test_over_images(pool, over_images):
  cases = [random_case(seed) for seed in range(3)]
  # Different largest boxes, so that the images need different step counts.
  cases[1][2][:] = np.clip(cases[1][2], 2, 4)
  features, masks, boxes = (jnp.stack(x) for x in zip(*cases, strict=True))
  one = functools.partial(pool, output_size=(3, 3))
  if over_images is None:
    many = lambda *x: jax.lax.map(lambda y: one(*y), x)  # noqa: E731
  else:
    many = over_images(one)
  got, pullback = jax.vjp(lambda f: many(f, masks, boxes), features)
  (gradient,) = pullback(jnp.ones_like(got))
  for i, (f, m, b) in enumerate(cases):
    np.testing.assert_array_equal(got[i], loop_pool(f, m, b, (3, 3))[0])
    expected = jax.grad(lambda x, m=m, b=b: one(x, m, b).sum())(jnp.asarray(f))
    np.testing.assert_allclose(gradient[i], expected, rtol=1e-6)


def _torchvision_roi_pool(features, boxes, output_size):
  """RoIPool with torchvision's float32 bin edges."""
  height, width, channels = features.shape
  out = np.zeros((len(boxes), *output_size, channels), np.float32)
  for p, (y0, x0, y1, x1) in enumerate(boxes):
    bin_height = np.float32(max(y1 - y0 + 1, 1)) / np.float32(output_size[0])
    bin_width = np.float32(max(x1 - x0 + 1, 1)) / np.float32(output_size[1])
    for u in range(output_size[0]):
      for v in range(output_size[1]):
        top = int(np.floor(np.float32(u) * bin_height)) + y0
        bottom = int(np.ceil(np.float32(u + 1) * bin_height)) + y0
        left = int(np.floor(np.float32(v) * bin_width)) + x0
        right = int(np.ceil(np.float32(v + 1) * bin_width)) + x0
        top, bottom = np.clip([top, bottom], 0, height)
        left, right = np.clip([left, right], 0, width)
        if top < bottom and left < right:
          out[p, u, v] = features[top:bottom, left:right].max((0, 1))
  return out


def test_full_mask_equals_roi_pool(pool):
  features, masks, boxes = random_case(7, grid=(30, 40), proposals=40)
  expected = _torchvision_roi_pool(features, boxes, (7, 7))
  full = np.ones_like(masks)
  got = pool(features, full, boxes, output_size=(7, 7))
  np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(roi_pool(features, boxes), expected)
  inside = boxes[(boxes.min(1) >= 0) & (boxes[:, 2] < 30) & (boxes[:, 3] < 40)]
  np.testing.assert_array_equal(
    moi_pool(features, full[: len(inside)], inside),
    roi_pool(features, inside),
  )


@pytest.mark.parametrize(
  "options",
  [
    {"implementation": "reference"},
    {"implementation": "pallas_triton", "interpret": True},
    {"deterministic": True},
  ],
)
def test_roi_pool_takes_the_options_of_moi_pool(options):
  features, _, boxes = random_case(7)
  boxes = np.clip(boxes, 0, 8)
  found = pallas_kernels.roi_pool(
    features, boxes, output_size=(3, 2), **options
  )
  expected = pallas_kernels.roi_pool(features, boxes, output_size=(3, 2))
  np.testing.assert_array_equal(found, expected)
  with pytest.raises(ValueError, match=r"implementation.*'cuda'"):
    pallas_kernels.roi_pool(features, boxes, implementation="cuda")


def test_roi_pool_gradient_is_that_of_the_full_mask():
  features, masks, boxes = random_case(8, ties=True)
  full = np.ones_like(masks)
  weights = np.random.default_rng(9).normal(size=(12, 3, 3, 3))

  def roi_loss(f):
    return jnp.sum(roi_pool(f, boxes, output_size=(3, 3)) * weights)

  _, argmax = loop_pool(features, full, boxes, (3, 3))
  expected = np.zeros((9 * 13, 3))
  *_, c = np.nonzero(argmax >= 0)
  np.add.at(expected, (argmax[argmax >= 0], c), weights[argmax >= 0])
  np.testing.assert_allclose(
    jax.grad(roi_loss)(jnp.asarray(features)).reshape(-1, 3),
    expected,
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("compensation", ["bins", "official", "features"])
def test_compensation(implementation, compensation):
  features, masks, boxes = random_case(10)
  features = np.abs(features)
  got, pullback = jax.vjp(
    lambda f: moi_pool(
      f,
      masks,
      boxes,
      output_size=(3, 4),
      compensation=compensation,
      implementation=implementation,
    ),
    jnp.asarray(features),
  )
  pooled, argmax = loop_pool(features, masks, boxes, (3, 4))
  bins = (argmax[..., 0] >= 0).sum((1, 2)).reshape(-1, 1, 1, 1)
  if compensation == "bins":
    psi = 12 / np.maximum(bins, 1)
  elif compensation == "official":
    psi = 12 / (bins + 1)
  else:
    total = pooled.sum((1, 2), keepdims=True)
    psi = 12 / np.where(total > 0, total, 12)
  np.testing.assert_allclose(got, psi * pooled, rtol=1e-5)

  # psi is a constant to the gradient.
  (gradient,) = pullback(jnp.ones_like(got))
  expected = np.zeros((9 * 13, 3))
  *_, c = np.nonzero(argmax >= 0)
  scale = np.broadcast_to(psi, argmax.shape)[argmax >= 0]
  np.add.at(expected, (argmax[argmax >= 0], c), scale)
  np.testing.assert_allclose(gradient.reshape(-1, 3), expected, rtol=1e-4)


def test_compensation_constants():
  features = jnp.ones((7, 7, 1))
  boxes = jnp.array([[0, 0, 6, 6]] * 2)
  masks = np.ones((2, 7, 7), bool)
  masks[1] = False
  masks[1, 3, 3] = True
  psi = {
    c: np.asarray(moi_pool(features, masks, boxes, compensation=c))[:, 3, 3, 0]
    for c in ("bins", "official", None)
  }
  np.testing.assert_allclose(psi["bins"], [1, 49])
  np.testing.assert_allclose(psi["official"], [0.98, 24.5])
  np.testing.assert_allclose(psi[None], [1, 1])


def test_literal_compensation_of_zeros_stays_finite():
  boxes = jnp.array([[0, 0, 3, 3]])
  masks = np.ones((1, 4, 4), bool)
  got = moi_pool(jnp.zeros((4, 4, 2)), masks, boxes, compensation="features")
  np.testing.assert_array_equal(got, 0)


def test_masked_average():
  features, masks, _ = random_case(11)
  got = masked_average(jnp.asarray(features, jnp.bfloat16), masks)
  rounded = np.asarray(jnp.asarray(features, jnp.bfloat16), np.float32)
  assert got.dtype == jnp.float32
  for p, mask in enumerate(masks):
    expected = rounded[mask].mean(0) if mask.any() else np.zeros(3)
    np.testing.assert_allclose(got[p], expected, rtol=1e-5, atol=1e-6)
  assert not masks[5].any()
  assert masked_average(features, masks[:0]).shape == (0, 3)


def test_available_bins_are_the_bins_that_are_pooled():
  features, masks, boxes = random_case(12)
  _, argmax = loop_pool(features, masks, boxes, (7, 7))
  np.testing.assert_array_equal(
    available_bins(masks, boxes), argmax[..., 0] >= 0
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"features": jnp.zeros((1, 4, 4, 2))}, "features.*float32.*vmap"),
    ({"features": jnp.zeros((4, 4, 2), jnp.int32)}, "features.*int32"),
    ({"masks": jnp.zeros((3, 4, 4))}, "masks.*float32.*bool"),
    ({"masks": jnp.zeros((3, 4, 5), bool)}, r"masks.*\[3, 4, 5\]"),
    ({"masks": jnp.zeros((2, 4, 4), bool)}, "2 masks and 3 boxes"),
    ({"boxes": jnp.zeros((3, 4))}, "boxes.*float32.*grid_boxes"),
    (
      {"boxes": jnp.array([[0, 0, 9, 9], [1, 4, 1, 5], [0, 0, 1, 1]])},
      "box 1 is",
    ),
    ({"output_size": (7, 0)}, "output_size"),
    ({"output_size": 7}, "output_size.*7.*two positive integers"),
    ({"output_size": (7.0, 7.0)}, "output_size.*7.0"),
    ({"output_size": (7, 7, 7)}, "output_size"),
    ({"compensation": "sum"}, "compensation.*'sum'"),
    ({"implementation": "cuda"}, "implementation.*'cuda'"),
    ({"interpret": True}, "interpret.*=None.*'pallas_tpu', 'pallas_triton'"),
    ({"interpret": True, "implementation": "xla"}, "interpret.*'xla'"),
    (
      {"interpret": True, "implementation": "pallas_mosaic_gpu"},
      "interpret.*'pallas_mosaic_gpu'",
    ),
    (
      {"deterministic": True, "implementation": "reference"},
      "deterministic.*'reference'",
    ),
  ],
)
def test_bad_arguments(change, message):
  arguments = {
    "features": jnp.zeros((4, 4, 2)),
    "masks": jnp.ones((3, 4, 4), bool),
    "boxes": jnp.zeros((3, 4), jnp.int32),
  }
  with pytest.raises(ValueError, match=message):
    pallas_kernels.moi_pool(**(arguments | change))


@pytest.mark.parametrize(
  ("box", "cell"), [((0, 0, -1, -1), (0, 0)), ((3, 2, -4, 1), (3, 2))]
)
def test_a_box_that_ends_before_it_starts_is_one_cell(box, cell):
  features = jnp.arange(20.0).reshape(4, 5, 1)
  boxes = np.array([box])
  for pool in (roi_pool, pallas_kernels.roi_pool):  # traced, and not
    found = pool(features, boxes, output_size=(2, 2))
    np.testing.assert_array_equal(
      found, jnp.broadcast_to(features[cell], (1, 2, 2, 1))
    )
  with pytest.raises(ValueError, match=r"box 0 is.*outside"):
    pallas_kernels.roi_pool(features, np.array([[-1, 0, -3, 2]]))


def test_numpy_arguments_without_jit():
  features, masks, boxes = random_case(13)
  boxes = np.clip(boxes, 0, 8)
  got = pallas_kernels.moi_pool(
    features, masks, boxes, output_size=(3, 3), compensation=None
  )
  expected, _ = loop_pool(features, masks, boxes, (3, 3))
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_jitted_function_may_hold_masks_and_boxes(array):
  features, masks, boxes = random_case(13)
  masks, boxes = array(masks), array(np.clip(boxes, 0, 8))
  for pool, arguments in (
    (pallas_kernels.moi_pool, (masks, boxes)),
    (pallas_kernels.roi_pool, (boxes,)),
    (pallas_kernels.tps_pool, (masks, boxes)),
  ):
    held = jax.jit(lambda f, pool=pool, rest=arguments: pool(f, *rest))
    expected = pool(features, *arguments)
    np.testing.assert_allclose(held(features), expected, atol=1e-4)


def test_a_jitted_function_that_holds_a_box_outside_the_grid():
  features, _, _ = random_case(13)
  outside = jnp.array([[0, 0, 8, 8], [9, 0, 9, 8]])
  with pytest.raises(ValueError, match=r"box 1 is \[9, 0, 9, 8\]"):
    jax.jit(lambda f: pallas_kernels.roi_pool(f, outside))(features)
