"""Masks as COCO's compressed run lengths: some hundred bytes each."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_utils


def encode_mask(
  mask: np.ndarray, box: np.ndarray, size: tuple[int, int]
) -> bytes:
  """The run lengths of a mask that is empty outside a box.

  Args:
    mask: [h, w] bool, the part inside the box.
    box: (y0, x0, y1, x1), h x w pixels.
    size: (H, W) of the image.

  Returns:
    COCO's `counts`.
  """
  whole = np.zeros(size, np.uint8, order="F")  # run lengths go down columns
  y0, x0, y1, x1 = box
  whole[y0:y1, x0:x1] = mask
  return mask_utils.encode(whole)["counts"]


def decode_mask(counts: bytes, size: tuple[int, int]) -> np.ndarray:
  """The mask [H, W] bool of run lengths for an image of `size` (H, W)."""
  runs = read_runs(counts)
  is_inside = np.arange(len(runs)) % 2 == 1
  return np.repeat(is_inside, runs).reshape(size, order="F")


def read_runs(counts: bytes) -> np.ndarray:
  """The run lengths [R] int64, of background and foreground in turn, pixels.

  COCO's format: five bits a character, the sixth says that more follow, the
  last one of a number carries its sign; from the fourth number on it is the
  difference to the last but one.
  """
  code = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
  is_last = (code & 32) == 0
  number = np.cumsum(is_last) - is_last  # which number a character is of
  start = np.flatnonzero(np.append(True, is_last[:-1]))[: len(code)]
  shift = 5 * (np.arange(len(code)) - start[number])
  values = np.add.reduceat((code & 31) << shift, start) if len(code) else code
  negative = is_last & ((code & 16) != 0)
  values[number[negative]] -= 1 << (shift[negative] + 5)
  runs = values.copy()
  runs[1::2] = np.cumsum(values[1::2])
  runs[2::2] = np.cumsum(values[2::2])
  return runs
