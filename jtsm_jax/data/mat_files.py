"""Reads MATLAB files from strangers.

SciPy trusts the types and counts in a file, so that one wrong byte can end the
process with a segmentation fault, or fill the memory. Here the structure is
checked before SciPy sees it.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import scipy.io

# Types of data elements and classes of arrays, as the format numbers them.
_SIMPLE = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13})
_UNICODE = frozenset({16, 17, 18})
_ARRAY, _COMPRESSED = 14, 15
_CELL, _STRUCT, _SPARSE = 1, 2, 5
_TEXT, _NUMERIC = 4, range(6, 16)


def read_mat(
  data: bytes, names: list[str], *, max_bytes: int
) -> dict[str, Any]:
  """Variables of a MATLAB file of the versions 5 to 7.

  Args:
    data: the file.
    names: of the variables; those that are not there are left out.
    max_bytes: that a compressed variable may have when it is unpacked.

  Returns:
    What `scipy.io.loadmat` makes of them.

  Raises:
    ValueError: the file is damaged, or holds more than arrays of numbers and
      texts, cells and structs.
  """
  try:
    _check_mat(data, max_bytes)
    # SciPy is changing what it makes of sparse matrices; here there are none.
    return scipy.io.loadmat(
      io.BytesIO(data), variable_names=names, spmatrix=False
    )
  except Exception as error:  # SciPy and zlib raise whatever they meet.
    raise ValueError(str(error)) from error


def _check_mat(data: bytes, max_bytes: int) -> None:
  orders = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
  order = orders.get(data[124:128])
  if order is None or 0 in data[:4]:
    raise ValueError("it has no header of MATLAB 5 to 7")
  for kind, content in _mat_elements(data[128:], order):
    if kind != _COMPRESSED:
      _check_mat_array(kind, content, order)
      continue
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content, max_bytes)
    if not unpacker.eof:  # only there is the checksum compared
      raise ValueError(f"it is cut off, or unpacks to over {max_bytes} bytes")
    for kind, content in _mat_elements(unpacked, order):
      _check_mat_array(kind, content, order)


def _mat_elements(data: bytes, order: str) -> list[tuple[int, bytes]]:
  """Splits a sequence of data elements into their types and contents."""
  elements, position = [], 0
  while position < len(data):
    if position + 8 > len(data):
      raise ValueError("a data element is cut off")
    kind, count = struct.unpack_from(f"{order}II", data, position)
    start = position = position + 8
    if kind >> 16:  # type, count and up to 4 bytes packed into 8
      kind, count, start = kind & 0xFFFF, kind >> 16, start - 4
      if count > 4 or kind not in _SIMPLE | _UNICODE:
        raise ValueError(f"a small data element has {count} bytes of {kind}")
    else:
      padding = 0 if kind == _COMPRESSED else -count % 8
      position = start + count + padding
    if position > len(data):
      raise ValueError("a data element is cut off")
    elements.append((kind, data[start : start + count]))
  return elements


def _check_mat_array(
  kind: int, content: bytes, order: str, depth: int = 0
) -> None:
  if kind != _ARRAY or depth > 4:
    raise ValueError(f"a data element has type {kind}, in {depth} arrays")
  if not content and depth:
    return  # an empty array in a cell or struct
  (flags_kind, flags), (shape_kind, shape), (name_kind, _), *parts = (
    _mat_elements(content, order)
  )
  if (flags_kind, len(flags)) != (6, 8) or (shape_kind, name_kind) != (5, 1):
    raise ValueError("an array has a damaged header")
  (flag,) = struct.unpack_from(f"{order}I", flags)
  array_class, is_complex = flag & 0xFF, bool(flag & 0x800)
  sides = struct.unpack(f"{order}{len(shape) // 4}i", shape)
  if len(sides) < 2 or min(sides) < 0:
    raise ValueError(f"an array has the shape {sides}")
  count = math.prod(sides)
  kinds = [kind for kind, _ in parts]
  if array_class in (_CELL, _STRUCT):
    if array_class == _STRUCT:
      (length_kind, length), (names_kind, names), *parts = parts
      if (length_kind, len(length), names_kind) != (5, 4, 1):
        raise ValueError("a struct has damaged names")
      count *= len(names) // struct.unpack(f"{order}i", length)[0]
    if len(parts) != count:
      raise ValueError(f"{len(parts)} arrays lie where {count} should")
    for part in parts:
      _check_mat_array(*part, order, depth + 1)
  elif array_class in (_SPARSE, _TEXT, *_NUMERIC):
    wanted = (3 if array_class == _SPARSE else 1) + is_complex
    known = _SIMPLE | _UNICODE if array_class == _TEXT else _SIMPLE
    if len(kinds) != wanted or not known.issuperset(kinds):
      raise ValueError(f"an array has parts of the types {kinds}")
  else:
    raise ValueError(f"an array has class {array_class}")
