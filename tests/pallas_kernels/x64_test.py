"""With jax_enable_x64: the same bits of float32, and the digits of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.pallas_kernels.moi_pool.pooling_cases import random_case

FEATURES, MASKS, BOXES = random_case(1)
BOXES = np.clip(BOXES, 0, 8)
PIXELS = BOXES * 8 + np.array([0, 0, 8, 8], np.float32)


def _moi_pool(implementation, **options):
  return lambda features: pallas_kernels.moi_pool(
    features,
    MASKS,
    BOXES,
    output_size=(3, 2),
    implementation=implementation,
    interpret=(implementation or "").startswith("pallas"),
    **options,
  )


POOLS = {
  "xla": _moi_pool("xla"),
  "deterministic": _moi_pool("xla", deterministic=True),
  "reference": _moi_pool("reference"),
  "pallas_tpu": _moi_pool("pallas_tpu"),
  "pallas_triton": _moi_pool("pallas_triton"),
  "roi_pool": lambda f: pallas_kernels.roi_pool(f, BOXES),
  "roi_align": lambda f: pallas_kernels.roi_align(f, PIXELS, stride=8),
  "tps_pool": lambda f: pallas_kernels.tps_pool(f, MASKS, BOXES),
}


def _value_and_gradient(pool, features):
  pooled, pullback = jax.vjp(pool, features)
  return pooled, pullback(jnp.ones_like(pooled))[0]


@pytest.mark.parametrize("name", POOLS)
def test_float32_is_as_without(name):
  expected = _value_and_gradient(POOLS[name], jnp.asarray(FEATURES))
  with jax.enable_x64(True):
    found = _value_and_gradient(POOLS[name], jnp.asarray(FEATURES))
  atol = 1e-3 if name == "tps_pool" else 0  # its spline has more digits
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_of_float64_keep_their_digits(implementation):
  with jax.enable_x64(True):
    features = jnp.ones((1, 1, 1), jnp.float64)
    pooled, pullback = jax.vjp(
      lambda f: pallas_kernels.moi_pool(
        f,
        np.ones((2, 1, 1), bool),
        np.zeros((2, 4), np.int32),
        output_size=(1, 1),
        implementation=implementation,
      ),
      features,
    )
    (gradient,) = pullback(jnp.array([1, 1e-12]).reshape(pooled.shape))
    assert gradient.dtype == jnp.float64
    assert gradient[0, 0, 0] == 1 + 1e-12


@pytest.mark.parametrize("ratio", [1, None])
def test_roi_align_keeps_the_digits_of_float64(ratio):
  with jax.enable_x64(True):
    pooled, pullback = jax.vjp(
      lambda f: pallas_kernels.roi_align(
        f,
        np.array([[0, 0, 1, 1]] * 2),
        stride=1,
        output_size=(1, 1),
        sampling_ratio=ratio,
      ),
      jnp.full((1, 1, 1), 1 + 1e-12),
    )
    (gradient,) = pullback(jnp.array([1, 1e-12]).reshape(pooled.shape))
    assert pooled.dtype == gradient.dtype == jnp.float64
    assert pooled[0, 0, 0, 0] == gradient[0, 0, 0] == 1 + 1e-12


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_boxes_of_other_integers(integer):
  with jax.enable_x64(True):
    found = pallas_kernels.roi_pool(FEATURES, BOXES.astype(integer))
    expected = pallas_kernels.roi_pool(FEATURES, BOXES)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"implementation": "pallas_tpu"}, "float64.*'pallas_tpu'.*'xla'"),
    ({"deterministic": True}, "float64.*deterministic"),
  ],
)
def test_float64_that_would_lose_digits_is_an_error(options, message):
  with (
    jax.enable_x64(True),
    pytest.raises(ValueError, match=message),
  ):
    pallas_kernels.moi_pool(FEATURES.astype("d"), MASKS, BOXES, **options)
