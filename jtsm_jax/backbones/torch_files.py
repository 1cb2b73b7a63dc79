"""PyTorch's files of weights, read without PyTorch and without executing them.

A PyTorch file is a pickle with the tensors' bytes beside it. The pickle gives
descriptions of the tensors, and numpy reads their bytes.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jtsm_jax.backbones import restricted_pickle
from jtsm_jax.types import InputError

_STORAGE_DTYPES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

LEGACY_HEADER = pickle.dumps(_LEGACY_MAGIC, protocol=2)
"""How a file of PyTorch before 1.6 begins."""


class _Storage(NamedTuple):
  key: str
  dtype: str  # name of a storage class
  size: int  # elements


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Unpickler(restricted_pickle.Unpickler):
  """Builds dictionaries and descriptions of tensors, and nothing else."""

  def __init__(self, file: BinaryIO):
    super().__init__(
      file,
      {
        "collections.OrderedDict": collections.OrderedDict,
        "torch._utils._rebuild_tensor_v2": (
          lambda storage, offset, shape, strides, *_: _Tensor(
            storage, offset, shape, strides
          )
        ),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        **{f"torch.{name}": name for name in _STORAGE_DTYPES},
      },
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, size, *view = pid
    if kind != "storage" or dtype not in _STORAGE_DTYPES or any(view):
      raise pickle.UnpicklingError(f"unknown storage {pid!r}")
    return _Storage(key, dtype, size)


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
  """Returns the pickled object and the bytes of each storage."""
  with zipfile.ZipFile(file) as archive:
    # What PyTorch writes is not compressed.
    size = file.seek(0, os.SEEK_END)
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > size:
      raise pickle.UnpicklingError(
        f"the archive claims {claimed} bytes and has {size}"
      )
    tops = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(tops) != 1:
      raise pickle.UnpicklingError(
        f"the archive has {len(tops)} files data.pkl instead of one"
      )
    root = tops[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist():
      order = archive.read(f"{root}byteorder")
      if order != b"little":
        raise pickle.UnpicklingError(f"byte order {order!r}, not little")
    with archive.open(tops[0]) as top:
      value = _Unpickler(top).load()
    prefix = f"{root}data/"
    storages = {
      info.filename.removeprefix(prefix): archive.read(info)
      for info in archive.infolist()
      if info.filename.startswith(prefix)
    }
  return value, storages


def _read_legacy(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
  """The same for files written before PyTorch 1.6: pickles, then raw bytes."""
  for wanted in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
    if (found := _Unpickler(file).load()) != wanted:
      raise pickle.UnpicklingError(f"starts with {found!r}, not {wanted}")
  if not _Unpickler(file).load()["little_endian"]:
    raise pickle.UnpicklingError("byte order big, not little")

  sizes = {}  # bytes per element of each storage, known from the pickle alone

  class Unpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> _Storage:
      storage = super().persistent_load(pid)
      sizes[storage.key] = np.dtype(_STORAGE_DTYPES[storage.dtype]).itemsize
      return storage

  value = Unpickler(file).load()
  storages = {}
  for key in _Unpickler(file).load():
    count = int.from_bytes(file.read(8), "little", signed=True)
    storages[key] = file.read(max(count, 0) * sizes[key])
  return value, storages


def _materialise(tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
  """Copies a tensor out of its storage, after checking that it lies inside."""
  storage = tensor.storage
  shape = tuple(int(n) for n in tensor.shape)
  strides = tuple(int(n) for n in tensor.strides)
  flat = np.frombuffer(storages[storage.key], _STORAGE_DTYPES[storage.dtype])
  if len(flat) != storage.size:
    raise ValueError(f"{len(flat)} elements stored instead of {storage.size}")
  if 0 in shape:
    return np.empty(shape, flat.dtype)
  last = tensor.offset + sum(
    (n - 1) * step for n, step in zip(shape, strides, strict=True)
  )
  if (
    min((tensor.offset, *shape, *strides)) < 0
    or last >= len(flat)
    or math.prod(shape) > len(flat)
  ):
    raise ValueError(f"shape {shape} reaches beyond its {len(flat)} elements")
  view = np.lib.stride_tricks.as_strided(
    flat[tensor.offset :], shape, [s * flat.itemsize for s in strides]
  )
  return view.copy()


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors of a `.pth` file; executes nothing that it names.

  Both of PyTorch's formats are read: the zip archive and the older sequence of
  pickles. The file must hold a state_dict, or a dictionary whose "state_dict"
  is one; in that case its other entries are not returned.

  Args:
    path: the file.

  Returns:
    Name -> array, in the file's order, shape and dtype.

  Raises:
    InputError: the file is missing or damaged, names anything but tensors and
      dictionaries, or holds something else than a state_dict.
  """
  path = Path(path)
  try:
    with path.open("rb") as file:
      read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
      file.seek(0)
      value, storages = read(file)
  except OSError as error:
    raise InputError(f"cannot read the weights {path}: {error}") from error
  except InputError as error:
    raise InputError(
      f"refused to read {path}: {error}. Save the plain state_dict"
    ) from None
  # A damaged pickle raises nearly anything, none of it more telling.
  except Exception as error:
    raise InputError(
      f"{path} is not a whole PyTorch file ({error!r}); download it again"
    ) from error

  if isinstance(value, Mapping) and isinstance(
    value.get("state_dict"), Mapping
  ):
    value = value["state_dict"]
  if not isinstance(value, Mapping):
    raise InputError(f"{path} holds a {type(value).__name__}, not a state_dict")
  arrays = {}
  for name, tensor in value.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise InputError(
        f"{path}: the entry {name!r} is not a tensor; save the plain state_dict"
      )
    try:
      arrays[name] = _materialise(tensor, storages)
    except (KeyError, TypeError, ValueError) as error:
      raise InputError(
        f"{path}: the tensor {name!r} is damaged ({error}); download it again"
      ) from error
  return arrays
