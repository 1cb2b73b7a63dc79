"""Masks as COCO's compressed run lengths: some hundred bytes each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage
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


def encode_segments(
  ids: np.ndarray, segments: Sequence[int]
) -> tuple[np.ndarray, tuple[bytes, ...]]:
  """Boxes and run lengths of segments of a map, made one at a time.

  Args:
    ids: [H, W] integers, of the segment that each pixel belongs to.
    segments: N ids; one that is not in the map has an empty mask.

  Returns:
    [N, 4] int64 (y0, x0, y1, x1), tight boxes, zeros of an empty mask; and
    COCO's `counts` of each.
  """
  # Runs along the rows, some thousands, are sorted in place of all pixels.
  flat = ids.ravel()
  start = np.append(0, 1 + np.flatnonzero(flat[1:] != flat[:-1]))
  found, position = np.unique(flat[start], return_inverse=True)
  labels = np.repeat(
    1 + position.astype(np.int32), np.diff(start, append=flat.size)
  )
  slices = scipy.ndimage.find_objects(labels.reshape(ids.shape))
  place = dict(zip(found.tolist(), slices, strict=True))
  boxes, rles = np.zeros((len(segments), 4), np.int64), []
  for box, segment in zip(boxes, segments, strict=True):
    if segment in place:
      rows, columns = place[segment]
      box[:] = rows.start, columns.start, rows.stop, columns.stop
    y0, x0, y1, x1 = box
    rles.append(encode_mask(ids[y0:y1, x0:x1] == segment, box, ids.shape))
  return boxes, tuple(rles)


def decode_mask(counts: bytes, size: tuple[int, int]) -> np.ndarray:
  """The mask [H, W] bool of run lengths for an image of `size` (H, W)."""
  runs = read_runs(counts)
  is_inside = np.arange(len(runs)) % 2 == 1
  return np.repeat(is_inside, runs).reshape(size, order="F")


def mask_area(counts: bytes) -> int:
  """The pixels of the mask of run lengths."""
  return int(read_runs(counts)[1::2].sum())


def read_runs(counts: bytes) -> np.ndarray:
  """The run lengths [R] int64, of background and foreground in turn, pixels.

  COCO's format: a character carries five bits and a flag that more follow,
  lowest first; the last one's highest bit is the sign. From the fourth on, a
  number is the difference to the one two before it.

  Raises:
    ValueError: the string is damaged, which pycocotools would not notice.
  """
  codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
  if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
    raise ValueError("'counts' is no complete string of run lengths")
  ends = np.flatnonzero(codes & 32 == 0)
  starts = np.append(0, ends[:-1] + 1)
  lengths = ends - starts + 1
  if lengths.max() > 6:
    raise ValueError("'counts' has a number of more than 30 bits")
  place = np.arange(len(codes)) - np.repeat(starts, lengths)
  runs = np.add.reduceat((codes & 31) << 5 * place, starts)
  runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
  for first in (1, 2):
    runs[first::2] = np.cumsum(runs[first::2])
  return runs
