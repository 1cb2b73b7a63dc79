"""Writes Caffe2-style files as Python 2 did, opcode by opcode."""

from __future__ import annotations

import pickle
import struct

import numpy as np


def _text(value: bytes) -> bytes:
  """A `str` of Python 2, which is bytes."""
  return b"T" + struct.pack("<i", len(value)) + value


def _number(value: int) -> bytes:
  return b"J" + struct.pack("<i", value)


def python2_array(
  value, *, code=None, order=b"<", shape=None, data=None, fortran=False
) -> bytes:
  """Opcodes of numpy's array under Python 2 and numpy 1.

  What is given replaces what `value` has, which makes damaged files.
  """
  value = np.asarray(value)
  code = value.dtype.str[1:].encode() if code is None else code
  shape = value.shape if shape is None else shape
  if data is None:
    data = value.tobytes("F" if fortran else "C")
  return b"".join(
    (
      b"cnumpy.core.multiarray\n_reconstruct\n",
      b"cnumpy\nndarray\n",
      *(_number(0), b"\x85", _text(b"b"), b"\x87R"),  # ndarray, (0,), "b"
      b"(",
      _number(1),
      b"(" + b"".join(_number(n) for n in shape) + b"t",
      b"cnumpy\ndtype\n",
      *(_text(code), _number(0), _number(1), b"\x87R"),
      b"(" + _number(3) + _text(order) + b"NNN",
      _number(-1) + _number(-1) + _number(0) + b"tb",
      b"\x88" if fortran else b"\x89",
      _text(data),
      b"tb",
    )
  )


def python2_file(entries: dict[str, bytes]) -> bytes:
  """A dictionary of text to opcodes, in protocol 2."""
  items = b"".join(_text(k.encode()) + v for k, v in entries.items())
  return b"\x80\x02}(" + items + b"u."


def write_python2(path, arrays) -> None:
  """As the authors' own files."""
  entries = {name: python2_array(value) for name, value in arrays.items()}
  path.write_bytes(python2_file(entries))


def write_python3(path, arrays, protocol=2) -> None:
  """As the authors' tool writes them, with protocol 2."""
  with path.open("wb") as file:
    pickle.dump(dict(arrays), file, protocol=protocol)
