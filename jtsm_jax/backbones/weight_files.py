"""Files of weights by their endings: names and arrays, nothing executed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from jtsm_jax.backbones.caffe2_files import read_caffe2_file
from jtsm_jax.backbones.torch_files import LEGACY_HEADER, read_torch_file
from jtsm_jax.types import InputError


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a `.pkl` (Caffe2), `.pth` (PyTorch) or `.safetensors` file.

  Args:
    path: the file.

  Returns:
    Name -> array, in the file's order, shape and dtype.

  Raises:
    InputError: the name has another ending, the file is not what its name says,
      is missing or damaged, or holds anything but arrays of numbers.
  """
  path = Path(path)
  readers = {
    ".pkl": read_caffe2_file,
    ".pth": read_torch_file,
    ".safetensors": _read_safetensors,
  }
  if path.suffix not in readers:
    raise InputError(
      f"the weights {path}: wanted a name that ends in {', '.join(readers)}"
    )
  try:
    with path.open("rb") as file:
      head = file.read(512)
  except OSError as error:
    raise InputError(f"cannot read the weights {path}: {error}") from error
  found, suffix = _look(head)
  if found and suffix != path.suffix:
    remedy = (
      f"give it a name that ends in {suffix}"
      if suffix
      else "download the file itself again"
    )
    raise InputError(
      f"{path} is {found}, not a {path.suffix} file of weights; {remedy}"
    )
  return readers[path.suffix](path)


def _look(head: bytes) -> tuple[str, str]:
  """What a file is by its first bytes, and the ending that it should have."""
  if not head:
    return "empty", ""
  if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
    return "a web page", ""
  if head.startswith((b"PK\3\4", LEGACY_HEADER)):
    return "a PyTorch file", ".pth"
  if head.startswith(b"\x80"):
    return "a pickle of another kind than PyTorch's", ".pkl"
  if head[8:10] == b'{"':
    return "a safetensors file", ".safetensors"
  return "", ""


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except OSError as error:
    raise InputError(f"cannot read the weights {path}: {error}") from error
  # An element type that numpy lacks is a KeyError.
  except (safetensors.SafetensorError, ValueError, KeyError) as error:
    raise InputError(
      f"{path} is not a whole safetensors file ({error!r}); download it again"
    ) from error
