"""Checks ResNet-WS against a numpy network and torchvision's known sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.backbones import resnet_ws


def _variables(model, *, seed=0):
  """Random variables, with statistics that are not the identity's.

  Drawn with numpy: compiling the initialisers takes longer than the tests.
  """
  image = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(
    lambda key: model.init(key, image, train=False), jax.random.key(0)
  )
  rng = np.random.default_rng(seed)

  def draw(path, x):
    name = path[-1].key
    if name in ("scale", "var"):
      value = rng.uniform(0.5, 1.5, x.shape)
    elif name in ("bias", "mean"):
      value = rng.normal(0, 0.3, x.shape)
    else:
      value = rng.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape)
    return value.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(model, variables, images, **options):
  options = {"train": False, **options}
  apply = jax.jit(lambda v, x: model.apply(v, x, **options))
  return apply(variables, images)


def _numpy_conv(x, kernel, *, stride=1, dilation=1):
  """Zero-padded convolution of [H, W, I] by [k, k, I, O], tap by tap."""
  k = len(kernel)
  pad = dilation * (k // 2)
  height, width = x.shape[:2]
  padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
  out = 0.0
  for i in range(k):
    for j in range(k):
      y0, x0 = i * dilation, j * dilation
      tap = padded[y0 : y0 + height, x0 : x0 + width]
      out = out + tap @ kernel[i, j]
  return out[::stride, ::stride]


def _numpy_layer(x, variables, path, **options):
  params, stats = variables["params"], variables["batch_stats"]
  for name in path:
    params, stats = params[name], stats[name]
  y = _numpy_conv(x, params["conv"]["kernel"], **options)
  p, s = params["norm"], stats["norm"]
  return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def _numpy_halve(x):
  height, width = (n // 2 for n in x.shape[:2])
  x = x[: 2 * height, : 2 * width]
  return x.reshape(height, 2, width, 2, -1).max((1, 3))


def _numpy_pool_in_place(x):
  out = np.zeros_like(x)
  for i in range(x.shape[0]):
    for j in range(x.shape[1]):
      out[i, j] = x[i : i + 2, j : j + 2].max((0, 1))
  return out


def _numpy_resnet(x, variables, blocks, *, bottleneck, dilated):
  """The network as the paper's table has it, one image [H, W, 3]."""
  relu = lambda y: np.maximum(y, 0)  # noqa: E731
  for name, stride in (("stem1", 2), ("stem2", 1), ("stem3", 1)):
    x = relu(_numpy_layer(x, variables, [name], stride=stride))
  x = _numpy_halve(x)
  features = {}
  for stage, count in enumerate(blocks, start=2):
    dilation = 2 if dilated and stage in (4, 5) else 1
    for i in range(count):
      if i == 0 and (stage == 3 or (stage == 4 and not dilated)):
        x = _numpy_halve(x)
      if i == 0 and stage == 4 and dilated:
        x = _numpy_pool_in_place(x)
      block = f"res{stage}_{i}"
      y = x
      dilations = (1, dilation, 1) if bottleneck else (dilation, dilation)
      for n, d in enumerate(dilations, start=1):
        y = _numpy_layer(y, variables, [block, f"conv{n}"], dilation=d)
        y = relu(y) if n < len(dilations) else y
      if "shortcut" in variables["params"][block]:
        x = _numpy_layer(x, variables, [block, "shortcut"])
      x = relu(x + y)
    features[f"res{stage}"] = x
  return features


@pytest.mark.parametrize("dilated", [True, False])
@pytest.mark.parametrize("depth", [18, 50])
def test_equals_a_numpy_network(depth, dilated):
  model = resnet_ws.ResNetWS(depth=depth, width=0.125, dilated=dilated)
  variables = _variables(model)
  image = np.random.default_rng(1).normal(size=(33, 42, 3))
  expected = _numpy_resnet(
    image,
    variables,
    {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth],
    bottleneck=depth == 50,
    dilated=dilated,
  )
  found = _apply(model, variables, jnp.asarray(image[None], jnp.float32))
  assert set(found) == {"res2", "res3", "res4", "res5"}
  for name, value in expected.items():
    scale = np.abs(value).max()
    np.testing.assert_allclose(
      found[name][0] / scale, value / scale, atol=2e-5, err_msg=name
    )


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_network_holds_the_undilated_one(depth):
  # On even sizes each cell of the stride-16 network is every second cell of
  # the stride-8 one: same pooling window, same taps, same zero border.
  fine = resnet_ws.ResNetWS(depth=depth, width=0.125, dilated=True)
  coarse = resnet_ws.ResNetWS(depth=depth, width=0.125, dilated=False)
  variables = _variables(fine, seed=2)
  images = jax.random.normal(jax.random.key(3), (2, 64, 96, 3))
  a = _apply(fine, variables, images)
  b = _apply(coarse, variables, images)
  for name in ("res4", "res5"):
    scale = jnp.abs(b[name]).max()
    np.testing.assert_allclose(
      a[name][:, ::2, ::2] / scale, b[name] / scale, atol=2e-5
    )


@pytest.mark.parametrize(
  ("depth", "count", "channels"),
  [
    # torchvision's networks without classifier, with the 7x7 stem's 9,536
    # parameters replaced by the 75,840 of three 3x3 layers:
    # 27*64 + 2 * 9*64*64 + 3 * 2*64.
    (18, 11_176_512 - 9_536 + 75_840, (64, 128, 256, 512)),
    (50, 23_508_032 - 9_536 + 75_840, (256, 512, 1024, 2048)),
    (101, 42_500_160 - 9_536 + 75_840, (256, 512, 1024, 2048)),
  ],
)
def test_parameters_and_channels(depth, count, channels):
  model = resnet_ws.ResNetWS(depth=depth)
  image = jnp.zeros((1, 32, 32, 3))
  variables = jax.eval_shape(
    lambda key: model.init(key, image, train=False), jax.random.key(0)
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == count
  features = jax.eval_shape(
    lambda v: model.apply(v, image, train=False), variables
  )
  assert tuple(f.shape[-1] for f in features.values()) == channels


@pytest.mark.parametrize(
  ("size", "dilated", "expected"),
  [
    # The first convolution rounds up, every pooling down.
    ((64, 96), True, [(16, 24), (8, 12), (8, 12), (8, 12)]),
    ((64, 96), False, [(16, 24), (8, 12), (4, 6), (4, 6)]),
    ((63, 97), True, [(16, 24), (8, 12), (8, 12), (8, 12)]),
    ((65, 109), True, [(16, 27), (8, 13), (8, 13), (8, 13)]),
    ((65, 109), False, [(16, 27), (8, 13), (4, 6), (4, 6)]),
  ],
)
def test_strides(size, dilated, expected):
  model = resnet_ws.ResNetWS(width=0.125, dilated=dilated)
  features = jax.eval_shape(
    lambda key, x: model.init_with_output(key, x, train=False)[0],
    jax.random.key(0),
    jnp.zeros((2, *size, 3)),
  )
  assert [f.shape[1:3] for f in features.values()] == expected
  assert {f.shape[0] for f in features.values()} == {2}


def test_frozen_norm_ignores_the_batch_while_training():
  model = resnet_ws.ResNetWS(width=0.125)
  variables = _variables(model)
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  out, updates = _apply(
    model, variables, images, train=True, mutable=["batch_stats"]
  )
  expected = _apply(model, variables, images)
  np.testing.assert_array_equal(out["res5"], expected["res5"])
  jax.tree.map(
    np.testing.assert_array_equal,
    updates["batch_stats"],
    variables["batch_stats"],
  )


def test_batch_norm_learns_the_statistics_of_the_batch():
  model = resnet_ws.ResNetWS(width=0.125, norm="batch")
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  variables = _variables(model)
  _, updates = _apply(
    model, variables, images, train=True, mutable=["batch_stats"]
  )
  first = variables["params"]["stem1"]["conv"]["kernel"]
  y = np.stack([_numpy_conv(x, first, stride=2) for x in images])
  before = variables["batch_stats"]["stem1"]["norm"]["mean"]
  np.testing.assert_allclose(
    updates["batch_stats"]["stem1"]["norm"]["mean"],
    0.9 * before + 0.1 * y.mean((0, 1, 2)),
    atol=1e-6,
  )


def test_group_norm_needs_no_statistics():
  model = resnet_ws.ResNetWS(width=0.375, norm="group")  # 24 channels: 8 groups
  images = 5 + jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
  variables = _variables(model)
  assert set(variables) == {"params"}
  features = _apply(model, variables, images, train=True)
  doubled = _apply(model, variables, 2 * images, train=True)  # scale-free
  np.testing.assert_allclose(features["res5"], doubled["res5"], rtol=0.01)


def test_bfloat16_computation_keeps_float32_parameters():
  model = resnet_ws.ResNetWS(width=0.125, dtype=jnp.bfloat16)
  variables = _variables(model)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
  features = _apply(model, variables, jnp.ones((1, 32, 32, 3)))
  assert features["res5"].dtype == jnp.bfloat16


def test_normalise_subtracts_the_mean_in_rgb_order():
  image = np.array([[[255, 0, 0]]], np.uint8)  # red
  expected = [[[255 - 122.7717, -115.9465, -102.9801]]]
  for found in (
    resnet_ws.normalise(image),
    resnet_ws.normalise(jnp.asarray(image)),
  ):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("options", [{"depth": 34}, {"norm": "layer"}])
def test_unknown_options_are_named(options):
  model = resnet_ws.ResNetWS(**options)
  with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
    model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
