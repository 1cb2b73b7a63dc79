"""The bytes of the proposals of one image.

magic "JTSM", header length (uint32), header (JSON: image id, H, W, S, P),
and one Zstandard frame of superpixels (uint16 [H, W]), member bits (uint8
[S, ceil(P / 8)], see `types.pack_members`), boxes (int32 [P, 4]), scores
(float32 [P]), all little-endian
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct

import numpy as np
import zstandard

from jtsm_jax.types import Proposals

MAGIC = b"JTSM"
MAX_SUPERPIXELS = 65535
LEVEL = 12  # of compression
MAX_BYTES = 1 << 30  # unpacked; 64 megapixels and 4,000 proposals have less


def encode_proposals(image_id: str, proposals: Proposals) -> bytes:
  """Packs the proposals of one image; `decode_proposals` is the inverse.

  Raises:
    ValueError: a superpixel id does not fit, or the arrays disagree.
  """
  fault = _find_fault(proposals)
  if fault:
    raise ValueError(f"proposals of image {image_id!r}: {fault}.")
  height, width = proposals.superpixels.shape
  num_proposals, num_superpixels = len(proposals), len(proposals.member_bits)
  header = json.dumps(
    dict(
      image_id=image_id,
      height=height,
      width=width,
      superpixels=num_superpixels,
      proposals=num_proposals,
    )
  ).encode()
  body = b"".join(
    [
      proposals.superpixels.astype("<u2").tobytes(),
      proposals.member_bits.tobytes(),
      proposals.boxes.astype("<i4").tobytes(),
      proposals.scores.astype("<f4").tobytes(),
    ]
  )
  prefix = MAGIC + struct.pack("<I", len(header))
  # A fifth larger than what LZMA makes, and unpacked eight times as fast.
  compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
  return prefix + header + compressor.compress(body)


def decode_proposals(data: bytes) -> tuple[str, Proposals]:
  """The image id and proposals of one record, checked.

  Raises:
    ValueError: the record is damaged; says how.
  """
  if data[:4] != MAGIC or len(data) < 8:
    raise ValueError("it does not start like a record of proposals")
  end = 8 + struct.unpack("<I", data[4:8])[0]
  try:
    header = json.loads(data[8:end])
    image_id = str(header["image_id"])
    height, width, num_superpixels, num_proposals = (
      int(header[k]) for k in ("height", "width", "superpixels", "proposals")
    )
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"the header is damaged: {error}") from error
  if (
    min(height, width, num_superpixels) < 1
    or num_proposals < 0
    or num_superpixels > MAX_SUPERPIXELS
  ):
    raise ValueError(f"sizes are impossible: {header}")
  row = -(-num_proposals // 8)
  lengths = [2 * height * width, row * num_superpixels]
  lengths += [16 * num_proposals, 4 * num_proposals]
  if sum(lengths) > MAX_BYTES:
    raise ValueError(f"sizes are impossible: {header}")
  try:  # never more than the header promises
    if zstandard.frame_content_size(data[end:]) != sum(lengths):
      raise ValueError(f"the data do not hold {sum(lengths)} bytes")
    body = zstandard.ZstdDecompressor().decompress(
      data[end:], allow_extra_data=False
    )
  except zstandard.ZstdError as error:
    raise ValueError(f"the data are damaged: {error}") from error
  body, stops = memoryview(body), [0, *itertools.accumulate(lengths)]
  labels, bits, boxes, scores = (
    np.frombuffer(body[a:b], dtype)
    for a, b, dtype in zip(
      stops, stops[1:], ("<u2", "u1", "<i4", "<f4"), strict=False
    )
  )
  proposals = Proposals(
    superpixels=labels.reshape(height, width),
    member_bits=bits.reshape(num_superpixels, row),
    boxes=boxes.reshape(num_proposals, 4).astype(np.int32),
    scores=scores.astype(np.float32),
  )
  fault = _find_fault(proposals)
  if fault:
    raise ValueError(fault)
  superpixels = proposals.superpixels.astype(np.int32)
  return image_id, dataclasses.replace(proposals, superpixels=superpixels)


def _find_fault(proposals: Proposals) -> str | None:
  """What is wrong with `proposals`, or None."""
  labels, bits = proposals.superpixels, proposals.member_bits
  count = len(proposals)
  if labels.ndim != 2 or labels.size == 0 or bits.ndim != 2:
    return f"superpixels are {labels.shape}, their bits are {bits.shape}"
  height, width = labels.shape
  num_superpixels, row = bits.shape
  spare = 8 * row - count
  if not 0 <= spare < 8 or (bits[:, -1:] & (1 << spare) - 1).any():
    return f"{row} bytes of bits for {count} proposals, or one bit too many"
  if num_superpixels > MAX_SUPERPIXELS:
    return f"{num_superpixels} superpixels, at most {MAX_SUPERPIXELS} fit"
  signed = labels.dtype.kind != "u"
  if labels.max() >= num_superpixels or (signed and labels.min() < 0):
    return (
      f"superpixel ids are {labels.min()} .. {labels.max()}, wanted"
      f" 0 .. {num_superpixels - 1}"
    )
  boxes, scores = proposals.boxes, proposals.scores
  if boxes.shape != (count, 4) or scores.shape != (count,):
    return (
      f"boxes are {boxes.shape} and scores {scores.shape} for {count} proposals"
    )
  low, high = boxes[:, :2], boxes[:, 2:]
  if (low < 0).any() or (high <= low).any() or (high > (height, width)).any():
    return f"a box is empty or leaves the image of {height} x {width}"
  if not np.isfinite(scores).all():
    return "a score is not finite"
  return None
