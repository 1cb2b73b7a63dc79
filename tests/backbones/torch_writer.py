"""Writes PyTorch files without PyTorch."""

from __future__ import annotations

import collections
import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np


def install(monkeypatch):
  """Puts in place what pickle stores under PyTorch's names."""
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


_STORAGE_NAMES = {
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype(np.int64): "LongStorage",
}


class Tensor:
  """A view of a storage, which pickles as PyTorch's tensors do.

  The storage is an array [N]; without a shape the tensor is all of it.
  """

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


def write_zip(path, value, *, truncate=0):
  file = io.BytesIO()
  pickler = _Pickler(file, legacy=False)
  pickler.dump(value)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", file.getvalue())
    archive.writestr("archive/byteorder", "little")
    for key, storage in pickler.storages.items():
      data = storage.tobytes()
      archive.writestr(f"archive/data/{key}", data[: len(data) - truncate])


def write_legacy(path, value, *, truncate=0):
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


def tensor(value):
  """A tensor of an array of any shape, in its own storage."""
  value = np.asarray(value)
  strides = [n // value.itemsize for n in np.empty_like(value).strides]
  return Tensor(value.reshape(-1), value.shape, tuple(strides))
