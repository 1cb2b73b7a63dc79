"""The authors' and torchvision's files fill the networks, entry by entry."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from jtsm_jax.backbones import pretrained, resnet, resnet_ws
from jtsm_jax.backbones.conv_norm import ConvNorm
from jtsm_jax.models.neck_and_heads import Neck
from jtsm_jax.types import InputError
from tests.backbones import (
  authors_cases,
  caffe2_writer,
  torch_writer,
  torchvision_cases,
)

CASES = {
  "raw.pkl": authors_cases.raw_caffe2_entries,
  "d2.pkl": authors_cases.converted_caffe2_entries,
  "raw.pth": authors_cases.torch_entries,
  "d2.pth": authors_cases.converted_torch_entries,
}


@pytest.fixture
def give(monkeypatch):
  """Stands in for reading: the next file has these entries."""

  def entries(arrays):
    monkeypatch.setattr(pretrained, "read_weights", lambda _: dict(arrays))

  return entries


def _caffe2(arrays):
  """What the reader leaves of a `.pkl` file."""
  return {k: v for k, v in arrays.items() if not k.endswith("_momentum")}


def _assert_is_the_authors(weights, depth, *, folded):
  """Every variable of the network and of the neck is set, from its source."""
  found = flatten_dict(weights.backbone, sep="/")
  wanted = jax.eval_shape(
    lambda key, x: resnet_ws.ResNetWS(depth=depth).init(key, x, train=False),
    jax.random.key(0),
    np.zeros((1, 32, 32, 3), np.float32),
  )
  wanted = flatten_dict(wanted, sep="/")
  assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
    k: (v.shape, v.dtype) for k, v in wanted.items()
  }
  checked = set()
  for ours, _, _, shape in authors_cases.layers(depth):
    kernel = authors_cases.values(f"{ours}/kernel", shape)
    kernel = np.moveaxis(kernel, (0, 1), (3, 2))  # O, I, H, W to H, W, I, O
    if ours == "stem1":
      kernel = np.stack([kernel[:, :, c] for c in (2, 1, 0)], axis=2)
    expected = {"params": {"conv/kernel": kernel}, "batch_stats": {}}
    for collection, kind in (
      ("params", "scale"),
      ("params", "bias"),
      ("batch_stats", "mean"),
      ("batch_stats", "var"),
    ):
      value = authors_cases.values(f"{ours}/{kind}", shape[:1])
      if folded and collection == "batch_stats":
        value = np.full_like(value, 0 if kind == "mean" else 1 - 1e-5)
      expected[collection][f"norm/{kind}"] = value
    for collection, entries in expected.items():
      for entry, value in entries.items():
        name = f"{collection}/{ours}/{entry}"
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        checked.add(name)
  assert checked == set(found)

  assert set(weights.neck) == {"fc1", "fc2"}
  for layer, (weight, bias) in authors_cases.neck(depth).items():
    kernel = weight.T
    if layer == "fc1":
      channels = 512 if depth == 18 else 2048
      rows = [
        weight[:, c * 49 + 7 * y + x]
        for y in range(7)
        for x in range(7)
        for c in range(channels)
      ]
      kernel = np.stack(rows)
    np.testing.assert_array_equal(weights.neck[layer]["kernel"], kernel)
    np.testing.assert_array_equal(weights.neck[layer]["bias"], bias)


@pytest.mark.parametrize("depth", [18, 50, 101])
@pytest.mark.parametrize("name", CASES)
def test_every_entry_finds_its_place(give, name, depth):
  give(_caffe2(CASES[name](depth)))
  weights = pretrained.load_resnet_ws(name, depth=depth)
  _assert_is_the_authors(weights, depth, folded=name.endswith(".pkl"))


@pytest.mark.parametrize(
  ("name", "write"),
  [
    ("raw.pkl", caffe2_writer.write_python2),
    ("d2.pkl", caffe2_writer.write_python3),
    ("raw.pth", torch_writer.write_zip),
    ("d2.pth", torch_writer.write_legacy),
  ],
)
def test_real_files_are_read(tmp_path, monkeypatch, name, write):
  torch_writer.install(monkeypatch)
  path = tmp_path / name
  entries = CASES[name](18)
  if path.suffix == ".pth":
    entries = {k: torch_writer.tensor(v) for k, v in entries.items()}
    entries = {"epoch": 120, "state_dict": entries}
  write(path, entries)
  weights = pretrained.load_resnet_ws(path, depth=18)
  _assert_is_the_authors(weights, 18, folded=path.suffix == ".pkl")


def test_first_layer_takes_red_green_blue(give):
  entries = authors_cases.converted_caffe2_entries(18)
  give(entries)
  weights = pretrained.load_resnet_ws("d2.pkl", depth=18)
  layer = ConvNorm(64, kernel=3, norm="frozen", dtype=np.float32, stride=2)
  variables = {k: v["stem1"] for k, v in weights.backbone.items()}
  rgb = np.random.default_rng(0).integers(0, 256, (1, 9, 11, 3), np.uint8)
  found = layer.apply(variables, resnet_ws.normalise(rgb), train=False)[0]

  # As the authors: B, G, R in 0 .. 255 without its mean, channels first.
  mean = np.array([102.9801, 115.9465, 122.7717])
  bgr = (rgb[0, :, :, ::-1] - mean).transpose(2, 0, 1)
  bgr = np.pad(bgr, ((0, 0), (1, 1), (1, 1)))
  kernel = entries["stem_conv1_w"]
  for y in range(5):
    for x in range(6):
      window = bgr[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
      value = (kernel * window).sum((1, 2, 3))
      value = value * entries["stem_conv1_bn_s"] + entries["stem_conv1_bn_b"]
      np.testing.assert_allclose(found[y, x], value, rtol=1e-4, atol=1e-3)


def test_folded_norm_is_a_scale_and_an_offset(give):
  entries = authors_cases.converted_caffe2_entries(18)
  give(entries)
  weights = pretrained.load_resnet_ws("d2.pkl", depth=18)
  layer = ConvNorm(64, kernel=3, norm="frozen", dtype=np.float32)
  variables = {k: v["stem2"] for k, v in weights.backbone.items()}
  # A kernel that hands its input on, so that the norm alone is seen.
  kernel = np.zeros((3, 3, 64, 64), np.float32)
  kernel[1, 1] = np.eye(64)
  variables["params"]["conv"]["kernel"] = kernel
  x = np.random.default_rng(0).normal(size=(1, 4, 4, 64)).astype(np.float32)
  scale, bias = (entries[f"stem_conv2_bn_{k}"] for k in "sb")

  def apply(x):
    return np.asarray(layer.apply(variables, x, train=False))

  np.testing.assert_array_equal(apply(0 * x), np.broadcast_to(bias, x.shape))
  variables["params"]["norm"]["bias"] = 0 * bias
  np.testing.assert_array_equal(apply(x), x * scale)


@pytest.mark.parametrize("depth", [18, 50])
def test_neck_reads_rows_columns_channels(give, depth):
  give(authors_cases.torch_entries(depth))
  neck = pretrained.load_resnet_ws("raw.pth", depth=depth).neck
  rng = np.random.default_rng(0)
  channels = 512 if depth == 18 else 2048
  pooled = rng.normal(size=(channels, 7, 7)).astype(np.float32)
  x = pooled.flatten().astype(np.float64)
  for weight, bias in authors_cases.neck(depth).values():
    x = np.maximum(weight @ x + bias, 0)
  assert (x > 0).any()
  found = Neck(widths=authors_cases.NECK_WIDTHS).apply(
    {"params": neck},
    pooled.transpose(1, 2, 0).reshape(1, 1, -1),
  )
  np.testing.assert_allclose(found[0, 0], x, rtol=1e-4)


def test_the_neck_may_be_absent(give):
  entries = authors_cases.converted_caffe2_entries(18)
  give({k: v for k, v in entries.items() if not k.startswith("fc")})
  weights = pretrained.load_resnet_ws("d2.pkl", depth=18)
  assert weights.neck == {}


@pytest.mark.parametrize(
  "names", [("rm", "riv"), ("running_mean", "running_var")]
)
def test_statistics_of_caffe2_are_used_where_there_are_any(give, names):
  entries = authors_cases.raw_caffe2_entries(18)
  for name in list(entries):
    if name.endswith("_bn_s"):
      stem = name.removesuffix("s")
      shape = entries[name].shape
      entries[stem + names[0]] = authors_cases.values(f"{stem}m", shape)
      entries[stem + names[1]] = authors_cases.values(f"{stem}v", shape)
  give(_caffe2(entries))
  stats = pretrained.load_resnet_ws("raw.pkl", depth=18).backbone["batch_stats"]
  np.testing.assert_array_equal(
    stats["stem1"]["norm"]["mean"], authors_cases.values("conv1_1_bn_m", (64,))
  )
  np.testing.assert_array_equal(
    stats["res5_1"]["conv2"]["norm"]["var"],
    authors_cases.values("res5_1_branch2b_bn_v", (512,)),
  )
  del entries[f"res3_0_branch1_bn_{names[1]}"]
  give(_caffe2(entries))
  with pytest.raises(InputError, match="res3_0_branch1_bn_riv is missing"):
    pretrained.load_resnet_ws("raw.pkl", depth=18)


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_torchvisions_entries_find_their_places(give, depth):
  # That they are the right ones, resnet_test.py shows.
  shapes = torchvision_cases.entry_shapes(depth)
  give({k: np.zeros(s, np.float32) for k, s in shapes.items()})
  weights = pretrained.load_resnet("w.pth", depth=depth)
  wanted = jax.eval_shape(
    lambda key, x: resnet.ResNet(depth=depth).init(key, x, train=False),
    jax.random.key(0),
    np.zeros((1, 32, 32, 3), np.float32),
  )
  assert jax.tree.map(np.shape, weights.backbone) == jax.tree.map(
    lambda x: x.shape, wanted
  )
  assert weights.neck == {}


def test_torchvisions_names_in_safetensors(tmp_path):
  entries = {
    name: np.asarray(torchvision_cases.make_entry(name, shape))
    for name, shape in torchvision_cases.entry_shapes(18).items()
  }
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(entries, path)
  weights = pretrained.load_resnet(path, depth=18, cache_dir=tmp_path / "cache")
  np.testing.assert_array_equal(
    weights.backbone["params"]["stem"]["conv"]["kernel"],
    entries["conv1.weight"].transpose(2, 3, 1, 0),
  )
  assert not (tmp_path / "cache").exists()  # nothing to convert it from


def test_every_fault_is_listed_in_order(give):
  entries = authors_cases.raw_caffe2_entries(18)
  del entries["res2_0_branch2a_bn_s"]
  entries["conv1_1_w"] = np.zeros((64, 3, 7, 7), np.float32)
  entries["res5_1_branch2b_bn_b"] = np.zeros(512, np.float16)
  entries["fc7_w"] = np.zeros((5, 7), np.float32)
  entries["res6_0_branch2a_w"] = np.zeros((2, 2), np.float32)
  give(_caffe2(entries))
  with pytest.raises(InputError) as error:
    pretrained.load_resnet_ws("raw.pkl", depth=18)
  assert str(error.value).split("\n") == [
    "raw.pkl does not fit the network:",
    "  conv1_1_w gives float32 (64, 3, 7, 7), wanted float32 (64, 3, 3, 3)",
    "  fc7_w gives float32 (5, 7), wanted float32 (5, 6)",
    "  res2_0_branch2a_bn_s is missing",
    "  res5_1_branch2b_bn_b gives float16 (512,), wanted float32 (512,)",
    "  res6_0_branch2a_w is not part of the network",
  ]


@pytest.mark.parametrize(("given", "asked"), [(50, 18), (18, 50), (101, 50)])
@pytest.mark.parametrize("name", ["raw.pkl", "raw.pth"])
def test_a_file_of_another_depth_is_named(give, name, given, asked):
  give(_caffe2(CASES[name](given)))
  with pytest.raises(
    InputError,
    match=rf"weights of {given} layers, not of {asked}; set .*depth={given}",
  ):
    pretrained.load_resnet_ws(name, depth=asked)


def test_a_file_of_50_layers_without_one_is_not_one_of_18(give):
  entries = authors_cases.converted_caffe2_entries(50)
  del entries["res4_5_branch2c_w"]
  give(entries)
  with pytest.raises(InputError) as error:
    pretrained.load_resnet_ws("d2.pkl", depth=50)
  lines = str(error.value).split("\n  ")[1:]
  assert lines == ["res4_5_branch2c_w is missing"]


def test_a_file_of_another_network_is_named(give):
  shapes = torchvision_cases.entry_shapes(18)
  give({k: np.zeros(s, np.float32) for k, s in shapes.items()})
  with pytest.raises(InputError, match=r"of resnet, .*name='resnet'"):
    pretrained.load_resnet_ws("w.pth", depth=18)
  give(authors_cases.torch_entries(18))
  with pytest.raises(InputError, match=r"of resnet_ws, .*name='resnet_ws'"):
    pretrained.load_resnet("w.pth", depth=18)
  give({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)})
  with pytest.raises(InputError, match=r"no network known .*features\.0\."):
    pretrained.load_resnet_ws("vgg16.pth", depth=18)
  give({})
  with pytest.raises(InputError, match="0 entries begin with none"):
    pretrained.load_resnet("nothing.pth", depth=18)


def test_entries_under_both_names_are_named(give):
  entries = authors_cases.converted_caffe2_entries(18)
  entries["conv1_1_w"] = entries["stem_conv1_w"]
  give(entries)
  with pytest.raises(InputError, match=r"twice, .*: stem_conv1_w;"):
    pretrained.load_resnet_ws("both.pkl", depth=18)


@pytest.fixture
def source(tmp_path, monkeypatch, give):
  """A file that stands for the authors', at home."""
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "w.pkl").write_bytes(b"stands for the weights")
  give(authors_cases.converted_caffe2_entries(18))
  return "~/w.pkl"


def test_cache_tells_where_it_is_from_and_is_read_again(
  tmp_path, monkeypatch, source
):
  cache = tmp_path / "cache"
  pretrained.load_resnet_ws(source, depth=18, cache_dir=cache)
  monkeypatch.setattr(
    pretrained, "read_weights", lambda _: pytest.fail("read twice")
  )
  again = pretrained.load_resnet_ws(source, depth=18, cache_dir=cache)
  _assert_is_the_authors(again, 18, folded=True)

  digest = hashlib.sha256(b"stands for the weights").hexdigest()
  (cached,) = cache.iterdir()
  assert cached.name == f"resnet_ws18-{digest[:16]}.safetensors"
  data = cached.read_bytes()
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
  assert header["__metadata__"] == {
    "source": "w.pkl",
    "sha256": digest,
    "converter": pretrained.CONVERTER,
  }


def test_a_cached_file_is_itself_a_file_of_weights(tmp_path, source, give):
  cache = tmp_path / "cache"
  pretrained.load_resnet_ws(source, depth=18, cache_dir=cache)
  (cached,) = cache.iterdir()
  arrays = safetensors.numpy.load_file(cached)
  give(arrays)
  weights = pretrained.load_resnet_ws(cached, depth=18)
  _assert_is_the_authors(weights, 18, folded=True)

  del arrays["params/stem1/conv/kernel"]
  arrays["neck/fc2/bias"] = np.zeros(4, np.float32)
  give(arrays)
  with pytest.raises(InputError) as error:
    pretrained.load_resnet_ws(cached, depth=18)
  lines = str(error.value).split("\n  ")[1:]
  assert lines == [
    "neck/fc2/kernel gives float32 (6, 5), wanted float32 (6, 4)",
    "params/stem1/conv/kernel is missing",
  ]


@pytest.mark.parametrize("damage", ["truncated", "empty", "version"])
def test_damaged_cache_is_converted_again(
  tmp_path, monkeypatch, caplog, source, damage
):
  cache = tmp_path / "cache"
  pretrained.load_resnet_ws(source, depth=18, cache_dir=cache)
  (cached,) = cache.iterdir()
  whole = cached.read_bytes()
  if damage == "version":
    arrays = {"params/old": np.zeros(2, np.float32)}
    cached.write_bytes(safetensors.numpy.save(arrays, {"converter": "1"}))
  else:
    cached.write_bytes(whole[: {"truncated": -5, "empty": 0}[damage]])
  again = pretrained.load_resnet_ws(source, depth=18, cache_dir=cache)
  _assert_is_the_authors(again, 18, folded=True)
  assert f"{cached} are" in caplog.text
  assert "converted again" in caplog.text
  assert len(cached.read_bytes()) == len(whole)
  caplog.clear()
  pretrained.load_resnet_ws(source, depth=18, cache_dir=cache)
  assert not caplog.text


def test_missing_source_is_named(tmp_path):
  with pytest.raises(InputError, match=r"cannot read .*gone\.pkl"):
    pretrained.load_resnet_ws(
      tmp_path / "gone.pkl", depth=18, cache_dir=tmp_path
    )
