"""Shape-interpolation pooling against scipy's thin-plate splines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import map_coordinates

import pallas_kernels
from pallas_kernels.tps_pool import control_points

tps_pool = jax.jit(
  pallas_kernels.tps_pool,
  static_argnames=("output_size", "points_per_side", "samples_per_bin"),
)


def _border(n):
  t = np.arange(n - 1) / (n - 1)
  o, e = np.zeros(n - 1), np.ones(n - 1)
  sides = [(o, t), (t, e), (e, 1 - t), (1 - t, o)]
  return np.concatenate([np.stack(side, -1) for side in sides])


def _expected(features, mask, box, *, bins, n, samples):
  """One proposal, by scipy in float64."""
  y0, x0, y1, x1 = box
  targets = _border(n)
  cells = np.argwhere(mask[y0 : y1 + 1, x0 : x1 + 1]) + np.array([y0, x0])
  aims = (y0, x0) + targets * (y1 - y0, x1 - x0)
  near = ((aims[:, None] - cells) ** 2).sum(-1).argmin(1)
  t = (np.arange(bins * samples) + 0.5) / (bins * samples)
  points = np.stack(np.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2)
  spline = RBFInterpolator(
    targets, cells[near].astype(float), kernel="thin_plate_spline", degree=1
  )
  source = np.clip(spline(points), 0, np.array(mask.shape) - 1).T
  values = np.stack(
    [
      map_coordinates(features[..., c].astype(float), source, order=1)
      for c in range(features.shape[-1])
    ],
    -1,
  )
  return values.reshape(bins, samples, bins, samples, -1).max((1, 3))


def _disc(height, width):
  y, x = np.mgrid[:height, :width]
  return ((y - height / 2 + 0.5) / height) ** 2 + (
    (x - width / 2 + 0.5) / width
  ) ** 2 <= 0.26


def _cases(rng):
  """Masks on a grid of 20 x 24: name -> (mask, box)."""
  shapes = {
    "disc": _disc(11, 15),
    "full": np.ones((9, 7), bool),
    "ring": _disc(11, 15) & ~np.pad(_disc(5, 7), ((3, 3), (4, 4))),
    "two parts": np.eye(8, dtype=bool)[[0, 1, 7, 7, 7, 7, 6, 7]],
    "line": np.ones((1, 9), bool),
    "diagonal": np.eye(9, dtype=bool),
    "cell": np.ones((1, 1), bool),
    "noise": rng.random((12, 10)) < 0.4,
  }
  for name, shape in shapes.items():
    mask = np.zeros((20, 24), bool)
    height, width = shape.shape
    y, x = rng.integers(20 - height + 1), rng.integers(24 - width + 1)
    mask[y : y + height, x : x + width] = shape
    yield name, mask, (y, x, y + height - 1, x + width - 1)


@pytest.mark.parametrize(
  ("bins", "n", "samples"), [(7, 5, 2), (3, 2, 3), (1, 9, 4)]
)
def test_equals_scipy(bins, n, samples):
  rng = np.random.default_rng(0)
  features = rng.normal(size=(20, 24, 3)).astype(np.float32)
  _, masks, boxes = zip(*_cases(rng), strict=True)
  got = tps_pool(
    features,
    np.stack(masks),
    np.array(boxes, np.int32),
    output_size=(bins, bins),
    points_per_side=n,
    samples_per_bin=samples,
  )
  for p, (name, mask, box) in enumerate(
    zip([c[0] for c in _cases(rng)], masks, boxes, strict=True)
  ):
    expected = _expected(features, mask, box, bins=bins, n=n, samples=samples)
    np.testing.assert_allclose(got[p], expected, atol=2e-3, err_msg=name)


def test_a_rectangle_is_not_bent():
  # Features that are rows and columns come out as the sample positions.
  features = np.stack(np.mgrid[:10, :12], -1).astype(np.float32)
  masks = np.ones((1, 10, 12), bool)
  got = tps_pool(
    features,
    masks,
    np.array([[2, 3, 6, 11]], np.int32),
    output_size=(4, 4),
    samples_per_bin=1,
  )
  t = (np.arange(4) + 0.5) / 4
  np.testing.assert_allclose(got[0, :, 0, 0], 2 + t * 4, atol=1e-3)
  np.testing.assert_allclose(got[0, 0, :, 1], 3 + t * 8, atol=1e-3)


def test_degenerate_segments():
  features = np.random.default_rng(1).normal(size=(6, 6, 2)).astype(np.float32)
  masks = np.zeros((3, 6, 6), bool)
  masks[0, 4, 1] = True
  masks[2, 5, 5] = True
  boxes = np.array([[2, 0, 5, 3], [0, 0, 5, 5], [0, 0, 3, 3]], np.int32)
  got = np.asarray(tps_pool(features, masks, boxes, output_size=(3, 3)))
  # One cell fills the rectangle; none, or none in the box, gives 0.
  np.testing.assert_allclose(
    got[0], np.broadcast_to(features[4, 1], (3, 3, 2)), atol=1e-4
  )
  assert (got[1:] == 0).all()


def test_gradient_is_that_of_finite_differences():
  rng = np.random.default_rng(2)
  # No two samples of a bin are equal, or nearly so: the maximum would have a
  # kink there.
  features = jnp.asarray(10 * rng.normal(size=(6, 7, 1)), jnp.float32)
  masks = np.ones((2, 6, 7), bool)
  masks[1, :3] = False
  boxes = np.array([[0, 1, 4, 6], [1, 0, 5, 5]], np.int32)
  check_grads(
    lambda f: tps_pool(f, masks, boxes, output_size=(2, 3)),
    (features,),
    order=1,
    modes=["rev"],
    eps=1e-2,
    rtol=1e-2,
    atol=1e-2,
  )


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_each_bin_is_shared_among_four_cells(seed):
  """The backward pass rounds otherwise: `max` lost parts of it."""
  rng = np.random.default_rng(seed)
  features = jnp.asarray(10 * rng.normal(size=(6, 7, 1)), jnp.float32)
  masks = np.ones((2, 6, 7), bool)
  boxes = np.array([[0, 1, 4, 6], [1, 0, 5, 5]], np.int32)
  jacobian = jax.jit(
    jax.jacrev(lambda f: tps_pool(f, masks, boxes, output_size=(2, 3)))
  )(features)[..., 0, :, :, 0]
  np.testing.assert_allclose(jacobian.sum((-1, -2)), 1, rtol=1e-5)
  assert (np.count_nonzero(jacobian, axis=(-1, -2)) <= 4).all()


def test_vmap_bfloat16_and_no_proposals():
  rng = np.random.default_rng(3)
  features = jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.bfloat16)
  masks = rng.random((2, 3, 8, 8)) < 0.6
  boxes = jnp.array([[[0, 0, 7, 7], [1, 2, 5, 6], [3, 3, 4, 4]]] * 2)
  many = jax.vmap(tps_pool)(features, masks, boxes)
  assert many.shape == (2, 3, 7, 7, 4)
  assert many.dtype == jnp.bfloat16
  one = tps_pool(features[1], masks[1], boxes[1])
  np.testing.assert_allclose(
    many[1].astype(np.float32), one.astype(np.float32), atol=0.02
  )
  assert tps_pool(features[0], masks[0, :0], boxes[0, :0]).shape[0] == 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"masks": np.ones((2, 5, 4), bool)}, r"masks.*\[2, 5, 4\]"),
    ({"boxes": np.zeros((2, 4), np.float32)}, "boxes.*float32"),
    ({"points_per_side": 1}, "points_per_side.*1.*at least 2"),
    ({"samples_per_bin": 0}, "samples_per_bin.*0"),
    ({"samples_per_bin": 2.0}, "samples_per_bin.*2.0.*integers"),
    ({"output_size": 7}, "output_size.*7"),
  ],
)
def test_bad_arguments(change, message):
  arguments = {
    "features": np.zeros((4, 4, 1), np.float32),
    "masks": np.ones((2, 4, 4), bool),
    "boxes": np.zeros((2, 4), np.int32),
  }
  with pytest.raises(ValueError, match=message):
    tps_pool(**(arguments | change))


def test_control_points_lie_on_the_contour():
  mask = np.zeros((9, 9), bool)
  mask[1:8, 1:8] = _disc(7, 7)
  found, exists = control_points(
    jnp.asarray(mask), jnp.array([1, 1, 7, 7]), jnp.asarray(_border(5))
  )
  assert exists
  for y, x in np.asarray(found, int):
    assert mask[y, x]
    assert not mask[y - 1 : y + 2, x - 1 : x + 2].all()
