"""Checks ResNet against torchvision's features and a numpy network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.backbones import pretrained, resnet
from tests.backbones import torchvision_cases as cases


def _converted(depth):
  """The weights of `cases` as our variables."""
  arrays = {
    name: cases.make_entry(name, shape)
    for name, shape in cases.entry_shapes(depth).items()
  }
  flat = pretrained._convert_resnet(arrays, "resnet", depth, source="cases")
  variables = {}
  for path, value in flat.items():
    *folders, name = path.split("/")
    tree = variables
    for folder in folders:
      tree = tree.setdefault(folder, {})
    tree[name] = value
  return variables


def _apply(model, variables, images, **options):
  options = {"train": False, **options}
  return jax.jit(lambda v, x: model.apply(v, x, **options))(variables, images)


def _our_features(depth, output_stride, norm="frozen"):
  model = resnet.ResNet(depth=depth, norm=norm, output_stride=output_stride)
  features = _apply(model, _converted(depth), cases.make_image()[None])
  return {stage: np.asarray(value[0]) for stage, value in features.items()}


def _assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for stage, value in expected.items():
    assert found[stage].shape == value.shape
    scale = np.abs(value).max()
    assert scale > 0.1
    np.testing.assert_allclose(
      found[stage] / scale, value / scale, atol=2e-5, err_msg=stage
    )


@pytest.mark.parametrize(("depth", "output_stride"), cases.STORED)
def test_equals_what_torchvision_computed(depth, output_stride):
  with np.load(cases.FEATURES) as stored:
    expected = {
      stage: stored[f"{depth}/{output_stride}/{stage}"]
      for stage in cases.STAGES
    }
  found = _our_features(depth, output_stride)
  assert {v.shape[-1] for v in expected.values()} == {8}
  _assert_equal({k: cases.some_channels(v) for k, v in found.items()}, expected)


@pytest.mark.parametrize(
  ("depth", "output_stride"),
  [(18, 32), (50, 32), (50, 16), (50, 8), (101, 32), (101, 16), (101, 8)],
)
def test_equals_torchvision(depth, output_stride):
  pytest.importorskip("torch", reason="torch is not installed")
  pytest.importorskip("torchvision", reason="torchvision is not installed")
  expected = cases.torchvision_features(depth, output_stride)
  _assert_equal(_our_features(depth, output_stride), expected)
  if (depth, output_stride) in cases.STORED:
    with np.load(cases.FEATURES) as stored:
      for stage, value in expected.items():
        np.testing.assert_allclose(
          stored[f"{depth}/{output_stride}/{stage}"],
          cases.some_channels(value),
          rtol=1e-4,
          atol=1e-4,
        )


def _variables(model, *, seed=0):
  """Random variables, with statistics that are not the identity's."""
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


def _numpy_layer(x, variables, path, *, stride=1, dilation=1):
  """A convolution tap by tap and its norm; x is [H, W, C]."""
  params, stats = variables["params"], variables["batch_stats"]
  for name in path:
    params, stats = params[name], stats[name]
  kernel = params["conv"]["kernel"]
  pad = dilation * (len(kernel) // 2)
  height, width = x.shape[:2]
  padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
  y = 0.0
  for i in range(len(kernel)):
    for j in range(len(kernel)):
      top, left = i * dilation, j * dilation
      y = y + padded[top : top + height, left : left + width] @ kernel[i, j]
  y = y[::stride, ::stride]
  p, s = params["norm"], stats["norm"]
  return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def _numpy_resnet(x, variables, blocks, *, bottleneck):
  """The network of the paper's table 1, one image [H, W, 3], stride 32."""
  relu = lambda y: np.maximum(y, 0)  # noqa: E731
  x = relu(_numpy_layer(x, variables, ["stem"], stride=2))
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))  # x >= 0
  height, width = (-(-n // 2) for n in x.shape[:2])
  pooled = [
    padded[i : i + 2 * height : 2, j : j + 2 * width : 2][:height, :width]
    for i in range(3)
    for j in range(3)
  ]
  x = np.max(pooled, axis=0)
  features = {}
  for stage, count in enumerate(blocks, start=2):
    for i in range(count):
      stride = 2 if i == 0 and stage > 2 else 1
      block = f"res{stage}_{i}"
      strides = (1, stride, 1) if bottleneck else (stride, 1)
      y = x
      for n, s in enumerate(strides, start=1):
        y = _numpy_layer(y, variables, [block, f"conv{n}"], stride=s)
        y = relu(y) if n < len(strides) else y
      if "shortcut" in variables["params"][block]:
        x = _numpy_layer(x, variables, [block, "shortcut"], stride=stride)
      x = relu(x + y)
    features[f"res{stage}"] = x
  return features


@pytest.mark.parametrize("depth", [18, 50])
def test_equals_a_numpy_network(depth):
  model = resnet.ResNet(depth=depth, width=0.125)
  variables = _variables(model)
  image = np.random.default_rng(1).normal(size=(47, 66, 3)).astype(np.float32)
  blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
  expected = _numpy_resnet(image, variables, blocks, bottleneck=depth == 50)
  found = _apply(model, variables, image[None])
  _assert_equal({k: np.asarray(v[0]) for k, v in found.items()}, expected)


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_networks_hold_the_plain_one(depth):
  # At a cell of the coarse network every dilated tap reads what a tap of the
  # coarse network reads: also in basic blocks, which torchvision cannot dilate.
  plain = resnet.ResNet(depth=depth, width=0.125)
  variables = _variables(plain, seed=2)
  images = np.random.default_rng(3).normal(size=(2, 64, 96, 3))
  images = images.astype(np.float32)
  coarse = _apply(plain, variables, images)
  for output_stride in (16, 8):
    model = resnet.ResNet(depth=depth, width=0.125, output_stride=output_stride)
    fine = _apply(model, variables, images)
    for stage, stride in zip(cases.STAGES, (4, 8, 16, 32), strict=True):
      assert fine[stage].shape[1] == 64 // min(stride, output_stride)
      step = max(1, stride // output_stride)
      scale = jnp.abs(coarse[stage]).max()
      np.testing.assert_allclose(
        fine[stage][:, ::step, ::step] / scale,
        coarse[stage] / scale,
        atol=2e-5,
      )


def test_batch_norm_with_stored_statistics_is_frozen_norm():
  frozen, batch = (_our_features(18, 32, norm=n) for n in ("frozen", "batch"))
  _assert_equal(batch, frozen)


def test_group_norm_needs_no_statistics():
  model = resnet.ResNet(depth=18, width=0.125, norm="group")
  assert set(_variables(model)) == {"params"}


@pytest.mark.parametrize(
  ("depth", "count"),
  # torchvision's published counts without the classifier.
  [(18, 11_689_512 - 513_000), (50, 25_557_032 - 2_049_000)],
)
def test_parameters(depth, count):
  model = resnet.ResNet(depth=depth)
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False),
    jax.random.key(0),
  )
  assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == count


def test_normalise_is_torchvisions():
  image = np.array([[[255, 0, 51]]], np.uint8)
  expected = [
    [[(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]]
  ]
  for found in (resnet.normalise(image), resnet.normalise(jnp.asarray(image))):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "options", [{"depth": 34}, {"norm": "layer"}, {"output_stride": 4}]
)
def test_unknown_options_are_named(options):
  model = resnet.ResNet(**options)
  with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
    model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
