"""Checks EfficientNet-Lite0 against numpy loops and its published size."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from jtsm_jax.backbones import efficientnet_lite
from jtsm_jax.backbones.efficientnet_lite import EfficientNetLite0


@pytest.fixture(scope="module")
def variables():
  """Random variables with statistics that are not the identity's."""
  shapes = jax.eval_shape(
    EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  rng = np.random.default_rng(0)

  def draw(path, x):
    name = path[-1].key
    if name in ("scale", "var"):
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    if name in ("bias", "mean"):
      return rng.normal(0, 0.3, x.shape).astype(np.float32)
    fan_in = np.prod(x.shape[:2]) if path[-2].key == "depthwise" else None
    fan_in = fan_in or np.prod(x.shape[:-1])
    return rng.normal(0, np.sqrt(1 / fan_in), x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(variables, images, **options):
  model = EfficientNetLite0(**options)
  return jax.jit(model.apply)(variables, images)


def _numpy_depthwise(x, kernel, *, stride, dilation):
  """The definition: SAME padding, [H, W, C] by [k, k, C], cell by cell."""
  k = len(kernel)
  span = (k - 1) * dilation + 1
  sizes = [-(-n // stride) for n in x.shape[:2]]
  offsets = [
    max((m - 1) * stride + span - n, 0) // 2
    for m, n in zip(sizes, x.shape[:2], strict=True)
  ]
  out = np.zeros((*sizes, x.shape[2]))
  for y, z, i, j in itertools.product(*map(range, (*sizes, k, k))):
    r = y * stride - offsets[0] + i * dilation
    c = z * stride - offsets[1] + j * dilation
    if 0 <= r < x.shape[0] and 0 <= c < x.shape[1]:
      out[y, z] += x[r, c] * kernel[i, j]
  return out


@pytest.mark.parametrize(
  ("size", "kernel", "stride", "dilation", "expected"),
  [
    (224, 3, 2, 1, (0, 1)),  # even: the odd pixel goes to the end
    (225, 3, 2, 1, (1, 1)),
    (112, 5, 2, 1, (1, 2)),
    (7, 5, 1, 1, (2, 2)),
    (20, 5, 1, 2, (4, 4)),  # dilated: symmetric
  ],
)
def test_same_padding(size, kernel, stride, dilation, expected):
  found = efficientnet_lite.same_padding(
    size, kernel, stride=stride, dilation=dilation
  )
  assert found == expected


@pytest.mark.parametrize("size", [(7, 8), (8, 5), (2, 3)])
@pytest.mark.parametrize(
  ("kernel", "stride", "dilation"),
  [(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (3, 1, 2), (5, 1, 4)],
)
def test_depthwise_conv_equals_the_definition(size, kernel, stride, dilation):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, 4)).astype(np.float32)
  weights = rng.normal(size=(kernel, kernel, 4)).astype(np.float32)
  found = efficientnet_lite.depthwise_conv(
    x, weights, stride=stride, dilation=dilation
  )
  expected = np.stack(
    [_numpy_depthwise(y, weights, stride=stride, dilation=dilation) for y in x]
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_depthwise_conv_of_accelerators_equals_that_of_cpus(monkeypatch):
  x = jax.random.normal(jax.random.key(0), (1, 9, 12, 8))
  weights = jax.random.normal(jax.random.key(1), (5, 5, 8))
  on_cpu = efficientnet_lite.depthwise_conv(x, weights, stride=2)
  monkeypatch.setattr(
    lax, "platform_dependent", lambda *args, cpu, default: default(*args)
  )
  elsewhere = efficientnet_lite.depthwise_conv(x, weights, stride=2)
  np.testing.assert_allclose(on_cpu, elsewhere, atol=1e-5)


def test_depthwise_conv_has_the_gradient_of_its_value():
  x = jax.random.normal(jax.random.key(0), (1, 5, 6, 2))
  weights = jax.random.normal(jax.random.key(1), (3, 3, 2))
  conv = jax.jit(lambda *a: efficientnet_lite.depthwise_conv(*a, stride=2))
  check_grads(conv, (x, weights), order=1, modes=["rev"], rtol=1e-2)


def test_block_equals_numpy(variables):
  # block4 (stage 3): 40 -> 240 -> 5x5 depthwise -> 40 channels, residual.
  params = variables["params"]["block4"]
  stats = variables["batch_stats"]["block4"]
  block = efficientnet_lite._Block(
    kernel=5,
    stride=1,
    dilation=1,
    expansion=6,
    channels=40,
    dtype=jnp.float32,
  )
  x = np.random.default_rng(1).normal(size=(6, 7, 40))

  def norm(y, name):
    p, s = params[name], stats[name]
    return (y - s["mean"]) / np.sqrt(s["var"] + 1e-3) * p["scale"] + p["bias"]

  y = np.clip(norm(x @ params["expand"]["kernel"], "expand_norm"), 0, 6)
  y = _numpy_depthwise(y, params["depthwise"]["kernel"], stride=1, dilation=1)
  y = np.clip(norm(y, "depthwise_norm"), 0, 6)
  expected = x + norm(y @ params["project"]["kernel"], "project_norm")
  found = block.apply(
    {"params": params, "batch_stats": stats}, x[None].astype(np.float32)
  )
  np.testing.assert_allclose(found[0], expected, atol=2e-4)


@pytest.mark.parametrize("size", [(64, 97), (67, 66)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_network_holds_the_strided_one(variables, size, output_stride):
  # A strided SAME layer on n cells is centred on the odd cells where n is even
  # and on the even cells where n is odd; dilation then meets the same cells.
  images = jax.random.normal(jax.random.key(0), (1, *size, 3))
  fine = _apply(variables, images, output_stride=output_stride)
  coarse = _apply(variables, images, output_stride=32)

  def cells(n, stride):
    """Cells of the fine grid that the coarse grid has kept."""
    kept = np.arange(-(-n // min(stride, output_stride)))
    while stride > output_stride:
      kept = kept[1::2] if len(kept) % 2 == 0 else kept[::2]
      stride //= 2
    return kept

  for name, stride in (
    ("stage3", 8),
    ("stage4", 16),
    ("stage5", 16),
    ("stage6", 32),
    ("stage7", 32),
    ("head", 32),
  ):
    rows, columns = (cells(n, stride) for n in size)
    a, b = fine[name][0][np.ix_(rows, columns)], coarse[name][0]
    scale = np.abs(b).max()
    np.testing.assert_allclose(a / scale, b / scale, atol=3e-5, err_msg=name)


@pytest.mark.parametrize(
  ("size", "output_stride", "expected"),
  [
    ((64, 96), 32, [(32, 48), (16, 24), (8, 12), (4, 6), (4, 6), (2, 3)]),
    ((64, 96), 16, [(32, 48), (16, 24), (8, 12), (4, 6), (4, 6), (4, 6)]),
    ((64, 96), 8, [(32, 48), (16, 24), (8, 12), (8, 12), (8, 12), (8, 12)]),
    ((65, 97), 16, [(33, 49), (17, 25), (9, 13), (5, 7), (5, 7), (5, 7)]),
  ],
)
def test_shapes_of_the_stages(variables, size, output_stride, expected):
  model = EfficientNetLite0(output_stride=output_stride)
  features = jax.eval_shape(model.apply, variables, jnp.zeros((2, *size, 3)))
  expected = [*expected, expected[-1], expected[-1]]  # stage7, head
  channels = (16, 24, 40, 80, 112, 192, 320, 1280)
  assert {k: v.shape for k, v in features.items()} == {
    name: (2, *cells, c)
    for name, cells, c in zip(
      [*(f"stage{i}" for i in range(1, 8)), "head"],
      expected,
      channels,
      strict=True,
    )
  }


def test_size_is_the_published_one():
  model = EfficientNetLite0(num_classes=1000)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == 4_652_008


def test_logits_are_linear_in_the_mean_of_the_head(variables):
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(1280, 10)).astype(np.float32)
  bias = rng.normal(size=10).astype(np.float32)
  params = {
    **variables["params"],
    "classifier": {"kernel": kernel, "bias": bias},
  }
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  out = _apply({**variables, "params": params}, images, num_classes=10)
  expected = np.asarray(out["head"]).mean((1, 2)) @ kernel + bias
  np.testing.assert_allclose(out["logits"], expected, rtol=1e-4, atol=1e-4)


def test_normalise():
  image = np.array([[[127, 255, 0]]], np.uint8)
  for found in (
    efficientnet_lite.normalise(image),
    efficientnet_lite.normalise(jnp.asarray(image)),
  ):
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[[0.0, 1.0, -127 / 128]]])


def test_unknown_output_stride_is_named():
  with pytest.raises(ValueError, match="output_stride is 4"):
    EfficientNetLite0(output_stride=4).init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
