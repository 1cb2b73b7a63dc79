"""Operations and bytes worked by hand, and XLA's own counts."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jtsm_jax.backbones.resnet_ws import ResNetWS
from jtsm_jax.train.cost import (
  PEAK_FLOPS,
  matmul_flops,
  peak_bytes,
  peak_flops,
)


def _floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = _floats(5, 7), _floats(7, 3)
SQUARE = _floats(8, 8)
PRODUCT = 2 * 8 * 8 * 8


def _dense(w, x):
  return jnp.square(jax.nn.relu(x @ w)).sum()


def test_dense_layer():
  assert matmul_flops(_dense, W, X) == 2 * 5 * 7 * 3
  # Twice for the weights alone, three times with the input.
  assert matmul_flops(jax.grad(_dense), W, X) == 2 * 2 * 5 * 7 * 3
  assert matmul_flops(jax.grad(_dense, (0, 1)), W, X) == 3 * 2 * 5 * 7 * 3
  again = jax.grad(lambda w, x: jax.checkpoint(_dense)(w, x) ** 2)
  assert matmul_flops(again, W, X) == 3 * 2 * 5 * 7 * 3
  batch = jax.vmap(_dense, (None, 0))
  assert matmul_flops(batch, W, _floats(4, 5, 7)) == 4 * 2 * 5 * 7 * 3


@pytest.mark.parametrize(
  ("function", "products"),
  [
    (lambda x: x * x + x.sum(), 0),
    (lambda x: jnp.einsum("ij,kj->ik", x, x), 1),
    (lambda x: [x @ x, x][1], 0),  # nothing reads the product
    (lambda x: lax.fori_loop(0, 5, lambda i, y: y @ x, x), 5),
    (lambda x: lax.scan(lambda y, _: (y @ x @ x, y), x, None, length=5), 10),
    (lambda x: lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ x, x), 1),
    (lambda x: lax.cond(x[0, 0] < 1, lambda: x @ x @ x, lambda: x @ x), 2),
    (lambda x: lax.platform_dependent(x, tpu=lambda x: x, default=x.dot), 1),
    (jax.jit(lambda x: jax.jit(jnp.matmul)(x, jax.jit(jnp.matmul)(x, x))), 2),
    (jax.checkpoint(lambda x: x @ x), 1),
  ],
)
def test_counts_products_wherever_they_are(function, products):
  assert matmul_flops(function, SQUARE) == products * PRODUCT


def test_shards_add_up():
  mesh = jax.sharding.AbstractMesh(
    (4, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )

  def function(x):
    return jax.shard_map(
      lambda x: x @ x.T,
      mesh=mesh,
      in_specs=PartitionSpec("data"),
      out_specs=PartitionSpec("data"),
    )(x)

  # Four times [2, 8] x [8, 2]; four results of 2 x 2 numbers.
  assert matmul_flops(function, SQUARE) == 4 * 2 * 2 * 2 * 8
  assert peak_bytes(function, SQUARE) == 4 * 2 * 2 * 4


CONVOLUTIONS = [
  {"padding": "VALID"},
  {"padding": "SAME"},
  {"padding": "SAME", "window_strides": (2, 3)},
  {"padding": [(2, 0), (0, 3)], "rhs_dilation": (2, 1)},
  {"padding": [(2, 2), (1, 1)], "lhs_dilation": (2, 3)},
  {"padding": "SAME", "feature_group_count": 2},
]


def _convolution(options, x, w):
  return lax.conv_general_dilated(
    x,
    w,
    **{"window_strides": (1, 1)} | options,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _multiplications(x, w, options):
  """Of a convolution: how often a kernel of ones meets a pixel."""
  ones = _convolution(options, jnp.ones(x.shape), jnp.ones(w.shape))
  return float(ones.sum())


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution(options):
  """Counted by adding ones; and as XLA counts, forward and backward."""
  x = _floats(2, 9, 11, 4)
  w = _floats(3, 2, 4 // options.get("feature_group_count", 1), 6)
  function = functools.partial(_convolution, options)
  assert matmul_flops(function, x, w) == 2 * _multiplications(x, w, options)
  for f in (function, jax.grad(lambda *a: function(*a).sum(), (0, 1))):
    counted = jax.jit(f).lower(x, w).cost_analysis()["flops"]
    assert matmul_flops(f, x, w) == pytest.approx(counted, rel=0.02)


X100 = _floats(100)  # 400 bytes, which are not counted


@pytest.mark.parametrize(
  ("function", "expected"),
  [
    (lambda x: x, 0),
    (lambda x: 2 * x + jnp.arange(100.0), 400),
    (lambda x: (2 * x).sum(), 4),
    # A sorted array lives until the next is there; one result of 4 bytes.
    (lambda x: jnp.sort(jnp.sort(jnp.sort(x))).sum(), 2 * 400 + 4),
    # The first lives until it is added to the third.
    (lambda x: _then_add(jnp.sort(x)).sum(), 3 * 400 + 4),
    # Results live all the time.
    (lambda x: (jnp.sort(jnp.sort(x)).sum(), 2 * x), 3 * 400 + 4),
    # What is read twice is computed twice if that is cheap.
    (lambda x: _sum_and_max(-x), 3 * 4),
    (lambda x: _sum_and_max(jnp.tanh(x)), 400 + 3 * 4),
    # A product reads numbers from memory; a transposition moves none.
    (lambda x: jnp.dot(-x, x), 400 + 4),
    (lambda x: jnp.dot(x.reshape(4, 25).T.reshape(100), x), 4),
  ],
)
def test_values_live_until_their_last_use(function, expected):
  assert peak_bytes(function, X100) == expected


def _then_add(x):
  return jnp.sort(jnp.sort(x)) + x


def _sum_and_max(x):
  return x.sum() * x.max()


def test_bytes_of_loops_and_branches():
  turn = jnp.sort

  def loop(x):
    return lax.while_loop(lambda y: y[0] < 1, turn, x)

  # What it carries, and what a turn makes of that.
  assert peak_bytes(loop, X100) == pytest.approx(2 * 400, abs=8)

  def scan(x):
    return lax.map(lambda row: turn(turn(row)).sum(), x.reshape(5, 20))

  # Two of the row and its sorted ones at a time; a result for each row.
  assert peak_bytes(scan, X100) == 2 * 80 + 5 * 4

  def branch(x):
    return lax.cond(x[0] < 1, lambda: turn(x[:50]).sum(), lambda: x.sum())

  assert peak_bytes(branch, X100) == pytest.approx(2 * 200 + 4, abs=12)


def test_bytes_of_another_platform():
  def function(x):
    return lax.platform_dependent(
      x, cpu=jnp.sum, default=lambda x: jnp.sort(x).sum()
    )

  assert peak_bytes(function, X100, platform="cpu") < 100
  assert peak_bytes(function, X100, platform="gpu") >= 400


def _network(weights, x):
  for w in weights:
    x = jax.nn.gelu(x @ w)
  return jnp.square(x).mean()


def _in_blocks(weights, x):
  block = jax.checkpoint(lambda rows: _network(weights, rows))
  return lax.map(block, x.reshape(16, -1, x.shape[1])).sum()


def _backbone():
  model = ResNetWS(depth=18, width=0.25, norm="group")
  images = _floats(1, 64, 96, 3)
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), images)

  def loss(variables, images):
    stages = model.apply(variables, images, train=True)
    return jnp.square(stages["res5"]).mean()

  return loss, variables, images


@pytest.mark.parametrize(
  "case",
  [
    (_network, [_floats(64, 64)] * 4, _floats(512, 64)),
    (_in_blocks, [_floats(64, 64)] * 4, _floats(512, 64)),
    _backbone(),
  ],
  ids=["network", "blocks", "backbone"],
)
def test_bytes_are_about_those_of_xla(case):
  loss, *args = case
  gradient = jax.grad(loss)
  memory = jax.jit(gradient).lower(*args).compile().memory_analysis()
  total = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert 0.5 < peak_bytes(gradient, *args) / total < 2


def test_blocks_save_memory():
  args = ([_floats(64, 64)] * 4, _floats(512, 64))
  whole, blocks = (
    peak_bytes(jax.grad(loss), *args) for loss in (_network, _in_blocks)
  )
  assert blocks < whole / 3


def test_peak_of_devices():
  assert peak_flops(jax.devices("cpu")[0]) is None
  device = types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-40GB")
  assert peak_flops(device) == 312e12
  assert all(1e13 < figure < 1e16 for figure in PEAK_FLOPS.values())
