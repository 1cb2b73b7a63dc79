"""Caffe2-style files of weights, read without executing them.

Such a file, `.pkl`, is a pickled dictionary of numpy arrays. The pickle gives
descriptions of the arrays, and `np.frombuffer` reads their bytes once they are
known to be numbers, and as many as the shape says.
"""

from __future__ import annotations

import collections
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from jtsm_jax.backbones import restricted_pickle
from jtsm_jax.types import InputError

_NUMBERS = frozenset(
  ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)


class _Dtype:
  """What a pickle says of a dtype."""

  def __init__(self, code: Any, *flags: Any):
    self.code = code
    self.order = "|"

  def __setstate__(self, state: tuple) -> None:
    _, self.order, *structure = state
    if any(structure[:3]):
      raise ValueError("elements have fields or are arrays themselves")


class _Array:
  """What a pickle says of an array."""

  def __init__(
    self,
    shape: Any = (),
    dtype: Any = None,
    fortran: Any = False,
    data: Any = b"",
  ):
    self.shape, self.dtype, self.fortran, self.data = (
      shape,
      dtype,
      fortran,
      data,
    )

  def __setstate__(self, state: tuple) -> None:
    _, self.shape, self.dtype, self.fortran, self.data = state


def _encode(text: str, encoding: str) -> bytes:
  """How bytes are written where a pickle knows only text."""
  if encoding != "latin1":
    raise ValueError(f"bytes are written as {encoding!r}")
  return text.encode("latin1")


def _stand_ins() -> dict[str, Any]:
  """For the names that numpy's arrays are pickled with."""
  names = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": lambda text, encoding: _encode(text, encoding),
    "__builtin__.bytes": lambda: b"",
    "numpy.ndarray": "numpy.ndarray",
    "numpy.dtype": lambda code, *flags: _Dtype(code, *flags),
  }
  for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    names[f"{core}.multiarray._reconstruct"] = lambda *_: _Array()
    names[f"{core}.numeric._frombuffer"] = lambda data, dtype, shape, order: (
      _Array(shape, dtype, order == "F", data)
    )
  return names


def _materialise(array: _Array) -> np.ndarray:
  """Makes the array, after checking that it is numbers and all there."""
  dtype = array.dtype
  if not isinstance(dtype, _Dtype):
    raise ValueError("its dtype is missing")
  if dtype.code not in _NUMBERS or dtype.order not in ("<", ">", "|"):
    raise ValueError(
      f"its elements are {dtype.order}{dtype.code}, not plain numbers"
    )
  kind = np.dtype(dtype.order + dtype.code)
  if isinstance(array.data, str):  # of Python 2
    array.data = array.data.encode("latin1")
  shape = tuple(array.shape)
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f"its shape is {shape}")
  found, wanted = len(array.data), math.prod(shape) * kind.itemsize
  if found != wanted:
    raise ValueError(
      f"{shape} {kind} takes {wanted} bytes and there are {found}"
    )
  flat = np.frombuffer(array.data, kind).astype(
    kind.newbyteorder("="), copy=False
  )
  return flat.reshape(shape, order="F" if array.fortran else "C")


def read_caffe2_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the arrays of a `.pkl` file; executes nothing that it names.

  The file must hold a dictionary of arrays, or one whose "blobs" is such a
  dictionary; in that case its other entries are not returned. Neither are those
  whose name ends in "_momentum": the optimizer's.

  Args:
    path: the file, of any protocol, written by Python 2 or 3.

  Returns:
    Name -> array, in the file's order, shape and dtype. Some are read-only.

  Raises:
    InputError: the file is missing or damaged, names anything but arrays of
      numbers and dictionaries, or holds something else.
  """
  path = Path(path)
  try:
    with path.open("rb") as file:
      value = restricted_pickle.Unpickler(file, _stand_ins()).load()
  except OSError as error:
    raise InputError(f"cannot read the weights {path}: {error}") from error
  except InputError as error:
    raise InputError(
      f"refused to read {path}: {error}. Save a plain dictionary of numpy "
      "arrays, or get the file from its authors"
    ) from None
  # A damaged pickle raises nearly anything, none of it more telling.
  except Exception as error:
    raise InputError(
      f"{path} is not a whole Caffe2 file ({error!r}); download it again"
    ) from error

  if isinstance(value, dict) and isinstance(value.get("blobs"), dict):
    value = value["blobs"]
  if not isinstance(value, dict):
    raise InputError(
      f"{path} holds a {type(value).__name__}, not a dictionary of arrays; "
      "wanted a Caffe2-style file"
    )
  arrays = {}
  for name, array in value.items():
    if not isinstance(name, str):
      raise InputError(
        f"{path}: a name is a {type(name).__name__}, not text; save a plain "
        "dictionary of numpy arrays"
      )
    if not isinstance(array, _Array):
      raise InputError(
        f"{path}: the entry {name!r} is a {type(array).__name__}, not an array;"
        " save a plain dictionary of numpy arrays"
      )
    if name.endswith("_momentum"):
      continue
    try:
      arrays[name] = _materialise(array)
    except (TypeError, ValueError, RecursionError) as error:
      raise InputError(
        f"{path}: the array {name!r} is damaged ({error}); download it again"
      ) from error
  return arrays
