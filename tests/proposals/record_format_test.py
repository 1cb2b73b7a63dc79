"""Tests of the bytes of an image's proposals."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
import zstandard

from jtsm_jax.proposals import record_format
from jtsm_jax.types import Proposals, pack_members


def assert_equal(a, b):
  for field in dataclasses.fields(Proposals):
    x, y = getattr(a, field.name), getattr(b, field.name)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def random_proposals(height=7, width=9, count=5, superpixels=11):
  rng = np.random.default_rng(0)
  boxes = np.stack(
    [
      rng.integers(0, 3, count),
      rng.integers(0, 4, count),
      rng.integers(4, height + 1, count),
      rng.integers(5, width + 1, count),
    ],
    1,
  )
  return Proposals(
    superpixels=rng.integers(0, superpixels, (height, width)).astype(np.int32),
    member_bits=pack_members(rng.random((count, superpixels)) < 0.5),
    boxes=boxes.astype(np.int32),
    scores=np.sort(rng.random(count).astype(np.float32))[::-1].copy(),
  )


@pytest.mark.parametrize("superpixels", [1, 8, 11, 3000])
@pytest.mark.parametrize("count", [1, 5])
def test_encoding_is_exact(superpixels, count):
  proposals = random_proposals(superpixels=superpixels, count=count)
  data = record_format.encode_proposals("a/ü", proposals)
  image_id, found = record_format.decode_proposals(data)
  assert image_id == "a/ü"
  assert_equal(found, proposals)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(superpixels=np.full((7, 9), 11, np.int32)), "superpixel ids"),
    (dict(superpixels=np.full((7, 9), -1, np.int32)), "superpixel ids"),
    (dict(member_bits=np.zeros((11, 2), np.uint8)), "2 bytes of bits for 5"),
    (dict(member_bits=np.full((11, 1), 4, np.uint8)), "one bit too many"),
    (dict(boxes=np.full((5, 4), 3, np.int32)), "a box is empty"),
    (dict(boxes=np.tile([0, 0, 8, 9], (5, 1)).astype(np.int32)), "a box"),
    (dict(scores=np.ones(4, np.float32)), "scores"),
    (dict(scores=np.full(5, np.nan, np.float32)), "not finite"),
  ],
)
def test_impossible_proposals_are_not_written(change, message):
  proposals = dataclasses.replace(random_proposals(), **change)
  with pytest.raises(ValueError, match=message):
    record_format.encode_proposals("x", proposals)


def test_every_damaged_byte_is_noticed_or_harmless():
  """No damage may pass as other proposals or raise another error."""
  proposals = random_proposals()
  data = record_format.encode_proposals("x", proposals)
  for n in range(len(data)):
    damaged = data[:n] + bytes([data[n] ^ 0x41]) + data[n + 1 :]
    try:
      found = record_format.decode_proposals(damaged)[1]
    except ValueError:
      continue
    # Only the header's id carries no check of its own; the
    # store compares the id with its index.
    assert_equal(found, proposals)
  for n in range(len(data)):
    with pytest.raises(ValueError, match=r"."):
      record_format.decode_proposals(data[:n])


def forged(body, **header):
  """A record that claims what `header` says."""
  text = json.dumps(
    dict(image_id="x", height=7, width=9, superpixels=1, proposals=0) | header
  ).encode()
  return (
    b"JTSM" + struct.pack("<I", len(text)) + text + zstandard.compress(body)
  )


def test_a_bomb_is_not_unpacked():
  """A few kilobytes that would fill the memory."""
  data = forged(bytes(1 << 26))
  assert len(data) < 20_000
  with pytest.raises(ValueError, match="do not hold 126 bytes"):
    record_format.decode_proposals(data)


@pytest.mark.parametrize(
  "header",
  [
    dict(height=0),
    dict(proposals=-1),
    dict(superpixels=1 << 40),
    dict(height=1 << 20, width=1 << 20),
    dict(width=[]),
  ],
)
def test_impossible_sizes(header):
  with pytest.raises(ValueError, match=r"impossible|damaged"):
    record_format.decode_proposals(forged(bytes(126), **header))
