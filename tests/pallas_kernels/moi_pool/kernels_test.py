"""The Pallas kernels: emulated on this machine, lowered for their own.

Emulation shows that the numbers are right; lowering that the compiler's front
end takes the kernel. `benchmarks/compile_kernels.py` goes on to machine code.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels.moi_pool import pallas_tpu, vjp, xla
from tests.pallas_kernels.moi_pool.pooling_cases import (
  loop_pool,
  random_case,
  unusual_case,
)

GRIDS = ((30, 40), (60, 80), (152, 203))
CHANNELS = (256, 512, 2048)


@pytest.fixture(params=["pallas_tpu", "pallas_triton"])
def pool(request):
  """Uncompensated pooling by an emulated kernel, jitted."""
  return functools.partial(
    jax.jit(
      pallas_kernels.moi_pool,
      static_argnames=(
        "output_size",
        "compensation",
        "implementation",
        "interpret",
      ),
    ),
    compensation=None,
    implementation=request.param,
    interpret=True,
  )


@pytest.mark.parametrize(
  ("grid", "channels", "output_size"),
  [((9, 13), 3, (3, 2)), ((1, 17), 130, (1, 4)), ((16, 16), 300, (2, 2))],
)
def test_value_and_gradient_equal_the_loop(pool, grid, channels, output_size):
  features, masks, boxes = random_case(
    1, grid=grid, channels=channels, ties=True
  )
  pooled, argmax = loop_pool(features, masks, boxes, output_size)
  weights = np.random.default_rng(2).normal(size=pooled.shape)

  def loss(features):
    found = pool(features, masks, boxes, output_size=output_size)
    return jnp.sum(found * weights), found

  (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(features)
  )
  np.testing.assert_array_equal(found, pooled)
  expected = np.zeros((grid[0] * grid[1], channels))
  *_, c = np.nonzero(argmax >= 0)
  np.add.at(expected, (argmax[argmax >= 0], c), weights[argmax >= 0])
  np.testing.assert_allclose(
    gradient.reshape(-1, channels), expected, rtol=1e-4, atol=1e-5
  )


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


def test_bfloat16_over_images(pool):
  cases = [random_case(seed, channels=4, proposals=7) for seed in range(2)]
  features, masks, boxes = (jnp.stack(x) for x in zip(*cases, strict=True))
  features = features.astype(jnp.bfloat16)
  one = functools.partial(pool, output_size=(2, 2))
  got, pullback = jax.vjp(lambda f: jax.vmap(one)(f, masks, boxes), features)
  assert got.dtype == jnp.bfloat16
  (gradient,) = pullback(jnp.ones_like(got))
  assert gradient.dtype == jnp.bfloat16
  for i in range(2):
    f = np.asarray(features[i], np.float32)
    expected, argmax = loop_pool(f, masks[i], boxes[i], (2, 2))
    np.testing.assert_array_equal(got[i].astype(np.float32), expected)
    assert gradient[i].astype(np.float32).sum() == (argmax >= 0).sum()


def test_no_proposals(pool):
  features, masks, boxes = random_case()

  def loss(features):
    return pool(features, masks[:0], boxes[:0]).sum()

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(features))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton"])
def test_full_masks_need_none(implementation):
  features, masks, boxes = random_case(3)
  full = np.ones_like(masks)
  without = vjp.max_pool(
    jnp.asarray(features),
    None,
    boxes,
    (3, 3),
    implementation=implementation,
    interpret=True,
  )
  expected, _ = loop_pool(features, full, boxes, (3, 3))
  np.testing.assert_array_equal(without, expected)


def test_tpu_kernels_have_no_races():
  features, masks, boxes = random_case(4, channels=5, proposals=6)
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
  )
  pooled, argmax = pallas_tpu.pooled_argmax(
    features, masks, boxes, (2, 2), interpret=interpret
  )
  expected, cells = loop_pool(features, masks, boxes, (2, 2))
  np.testing.assert_array_equal(jnp.maximum(pooled, -99) > -99, cells >= 0)
  np.testing.assert_array_equal(
    np.where(cells >= 0, pooled, 0), np.where(cells >= 0, expected, 0)
  )
  gradient = pallas_tpu.add_gradient(
    jnp.ones_like(pooled), argmax, boxes, (9, 13), interpret=interpret
  )
  counts = np.zeros((9 * 13, 5))
  *_, c = np.nonzero(cells >= 0)
  np.add.at(counts, (cells[cells >= 0], c), 1)
  np.testing.assert_array_equal(gradient.reshape(-1, 5), counts)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
  ("implementation", "platform", "target"),
  [
    ("pallas_tpu", "tpu", "tpu_custom_call"),
    ("pallas_triton", "cuda", "__gpu$xla.gpu.triton"),
    ("pallas_mosaic_gpu", "cuda", "mosaic_gpu"),
  ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_lowers_for_its_device(
  implementation, platform, target, dtype, channels, grid
):
  def value_and_pullback(features, masks, boxes):
    pooled, pullback = jax.vjp(
      lambda f: vjp.max_pool(
        f, masks, boxes, (7, 7), implementation=implementation
      ),
      features,
    )
    return pooled, pullback(pooled)

  shapes = (
    jax.ShapeDtypeStruct((*grid, channels), dtype),
    jax.ShapeDtypeStruct((1000, *grid), bool),
    jax.ShapeDtypeStruct((1000, 4), jnp.int32),
  )
  traced = jax.jit(value_and_pullback).trace
  # Newer jax asks what GPU it lowers for.
  gpu = jax.sharding.AbstractDevice(
    "NVIDIA H100", num_cores=None, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
  with (
    jax.sharding.use_abstract_mesh(mesh)
    if platform == "cuda"
    else contextlib.nullcontext()
  ):
    lowered = traced(*shapes).lower(lowering_platforms=(platform,)).as_text()
  assert target in lowered


def test_another_device_is_an_error():
  features, masks, boxes = map(jnp.asarray, random_case())
  boxes = jnp.clip(boxes, 0, 8)
  for implementation in ("pallas_tpu", "pallas_triton"):
    with pytest.raises(ValueError, match="interpret mode is supported on CPU"):
      pallas_kernels.moi_pool(
        features, masks, boxes, implementation=implementation
      )


@pytest.mark.parametrize(
  ("deterministic", "sums"),
  [(True, ["43x3xi32"] * 3), (False, [f"{43 * 3}xf32"])],
)
def test_gpus_sum_in_integers_where_asked_to(deterministic, sums):
  features = jnp.ones((6, 7, 3))
  masks, boxes = np.ones((4, 6, 7), bool), np.zeros((4, 4), np.int32)

  def loss(features):
    return pallas_kernels.moi_pool(
      features, masks, boxes, deterministic=deterministic
    ).sum()

  traced = jax.jit(jax.grad(loss)).trace(features)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  found = re.findall(
    r"stablehlo\.scatter.*?-> tensor<(\w+)>\n", lowered, re.DOTALL
  )
  assert found == sums


@pytest.mark.parametrize(
  ("grid", "differentiated"), [((304, 406), False), ((256, 274), True)]
)
def test_a_grid_that_vmem_cannot_hold_is_an_error(grid, differentiated):
  def pool(features):
    return vjp.max_pool(
      features,
      None,
      jnp.zeros((2, 4), jnp.int32),
      (7, 7),
      implementation="pallas_tpu",
    )

  function = jax.grad(lambda f: pool(f).sum()) if differentiated else pool
  features = jax.ShapeDtypeStruct((*grid, 256), jnp.float32)
  with pytest.raises(ValueError, match=r"features: \d+ x \d+ cells.*'xla'"):
    jax.eval_shape(function, features)


def test_sums_in_integers_equal_sums_in_float64():
  rng = np.random.default_rng(5)
  scale = 10.0 ** rng.integers(-6, 3, (40, 3, 3, 1))
  gradient = (rng.normal(size=(40, 3, 3, 4)) * scale).astype(np.float32)
  argmax = rng.integers(0, 31, (40, 3, 3, 4)).astype(np.uint8)  # 30: empty
  got = xla.add_gradient_in_integers(
    jnp.asarray(gradient), jnp.asarray(argmax), (5, 6)
  )
  expected = np.zeros((31, 4))
  channel = np.broadcast_to(np.arange(4), argmax.shape)
  np.add.at(expected, (argmax, channel), gradient.astype(np.float64))
  np.testing.assert_allclose(
    np.reshape(got, (30, 4)), expected[:30], rtol=1e-6, atol=1e-6
  )
  # Any order, the same bits.
  order = rng.permutation(40)
  again = xla.add_gradient_in_integers(
    jnp.asarray(gradient[order]), jnp.asarray(argmax[order]), (5, 6)
  )
  np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("value", [0.0, 2e-38, 3e38])
def test_sums_in_integers_of_extreme_gradients(value):
  gradient = jnp.full((2, 1, 1, 3), value, jnp.float32)
  argmax = jnp.zeros((2, 1, 1, 3), jnp.uint8)
  argmax = argmax.at[1].set(1)
  got = xla.add_gradient_in_integers(gradient, argmax, (1, 2))
  np.testing.assert_allclose(got, np.full((1, 2, 3), np.float32(value)))


def test_sums_in_integers_of_infinities_are_nan():
  gradient = jnp.ones((2, 1, 1, 3)).at[0, 0, 0, 1].set(jnp.inf)
  argmax = jnp.zeros((2, 1, 1, 3), jnp.uint8)
  got = xla.add_gradient_in_integers(gradient, argmax, (1, 2))
  assert np.isnan(got).all()
