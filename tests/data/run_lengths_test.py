"""Run lengths against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from jtsm_jax.data.run_lengths import (
  decode_mask,
  encode_mask,
  encode_segments,
  mask_area,
  read_runs,
)
from tests.run_lengths import decode


def _random(seed):
  """A mask that is empty outside a box, and the box."""
  rng = np.random.default_rng(seed)
  size = rng.integers(1, 50, 2)
  low = rng.integers(0, size)
  high = rng.integers(low + 1, size + 1)
  whole = np.zeros(size, bool)
  inside = rng.random(high - low) < rng.random()
  whole[low[0] : high[0], low[1] : high[1]] = inside
  return whole, inside, np.array([*low, *high])


@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_are_those_of_pycocotools(seed):
  whole, inside, box = _random(seed)
  wanted = mask_utils.encode(np.asfortranarray(whole, np.uint8))
  counts = encode_mask(inside, box, whole.shape)
  assert counts == wanted["counts"]
  found = decode_mask(counts, whole.shape)
  assert found.dtype == bool
  np.testing.assert_array_equal(found, decode(wanted))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_segments_of_a_map(dtype):
  ids = np.array([[3, 3, 0, 200], [0, 3, 200, 0], [0, 0, 0, 3]], dtype)
  wanted = [200, 3, 7]  # the last one is not there
  boxes, rles = encode_segments(ids, wanted)
  assert boxes.tolist() == [[0, 2, 2, 4], [0, 0, 3, 4], [0, 0, 0, 0]]
  for counts, segment in zip(rles, wanted, strict=True):
    mask = decode_mask(counts, ids.shape)
    np.testing.assert_array_equal(mask, ids == segment)
    assert mask_area(counts) == mask.sum()
  one = encode_segments(np.full((2, 3), 5), [5])
  assert one[0].tolist() == [[0, 0, 2, 3]]
  assert encode_segments(ids, [])[0].shape == (0, 4)


def test_the_pixels_of_run_lengths():
  rng = np.random.default_rng(0)
  for _ in range(300):
    height, width = rng.integers(1, 300, 2)
    mask = rng.random((height, width)) < rng.choice([0, 0.001, 0.5, 1])
    mask[: rng.integers(height + 1)] = rng.random() < 0.5
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert read_runs(rle["counts"]).sum() == height * width


@pytest.mark.parametrize(
  ("counts", "message"),
  [
    (b"", "no complete string"),
    (b"26P", "no complete string"),  # one more character should follow
    (b"2 6", "no complete string"),
    (b"PPPPPP0", "more than 30 bits"),
  ],
)
def test_damaged_run_lengths(counts, message):
  with pytest.raises(ValueError, match=message):
    read_runs(counts)


@pytest.mark.parametrize("value", [False, True])
def test_nothing_and_everything(value):
  mask = np.full((3, 5), value)
  counts = encode_mask(mask, (0, 0, 3, 5), (3, 5))
  assert read_runs(counts).tolist() == ([0, 15] if value else [15])
  np.testing.assert_array_equal(decode_mask(counts, (3, 5)), mask)
