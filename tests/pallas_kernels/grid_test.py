"""Boxes, masks and bins against pixel loops and hand-worked numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import grid

available_bins = jax.jit(
  pallas_kernels.available_bins, static_argnames="output_size"
)
superpixel_masks = jax.jit(
  pallas_kernels.superpixel_masks, static_argnames=("stride", "availability")
)


def test_grid_boxes_of_the_known_box():
  boxes = jnp.array([[0.0, 0.0, 111.0, 111.0]])
  got = pallas_kernels.grid_boxes(boxes, stride=8)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, [[0, 0, 14, 14]])


def test_grid_boxes_round_half_away_from_zero():
  # 0.49999997 is the largest float32 below a half; adding 0.5 makes it 1.
  below = np.nextafter(np.float32(0.5), np.float32(0))
  boxes = jnp.array([[4.0, 12.0, 20.0, 28.0], [-4.0, -12.0, below * 8, 3.99]])
  got = pallas_kernels.grid_boxes(boxes, stride=8)
  np.testing.assert_array_equal(got, [[1, 2, 3, 4], [-1, -2, 0, 0]])


def test_grid_boxes_without_an_end():
  boxes = jnp.array([[0, -jnp.inf, jnp.inf, 1e30]])
  got = pallas_kernels.grid_boxes(boxes, stride=8)
  np.testing.assert_array_equal(got, [[0, -(2**24), 2**24, 2**24]])
  pooled = pallas_kernels.roi_pool(jnp.arange(6.0).reshape(3, 2, 1), got)
  assert pooled.max() == 5  # one bin has the whole grid


def test_bin_edges_of_the_known_box():
  boxes = jnp.array([[0, 0, 14, 14]])
  top, bottom, left, right = grid.bin_edges(
    boxes, output_size=(7, 7), grid_size=(20, 14)
  )
  np.testing.assert_array_equal(top[0], [0, 2, 4, 6, 8, 10, 12])
  np.testing.assert_array_equal(bottom[0], [3, 5, 7, 9, 11, 13, 15])
  np.testing.assert_array_equal(left[0], [0, 2, 4, 6, 8, 10, 12])
  np.testing.assert_array_equal(right[0], [3, 5, 7, 9, 11, 13, 14])


@pytest.mark.parametrize("bins", [1, 3, 7, 14])
def test_bin_edges_round_as_roi_pool_does(bins):
  extent = np.arange(1, 300)
  boxes = np.stack([0 * extent, 0 * extent, extent - 1, 0 * extent], axis=1)
  top, bottom, _, _ = grid.bin_edges(
    jnp.asarray(boxes), output_size=(bins, 1), grid_size=(301, 1)
  )
  size = extent.astype(np.float32)[:, None] / np.float32(bins)
  u = np.arange(bins, dtype=np.float32)
  np.testing.assert_array_equal(top, np.floor(u * size))
  np.testing.assert_array_equal(bottom, np.ceil((u + 1) * size))
  past = extent[np.asarray(bottom)[:, -1] > extent]
  if bins == 7:
    assert past[:3].tolist() == [57, 114, 121]


def test_bin_edges_of_very_large_boxes_are_exact():
  extent = 57 * 2**5  # as a float32 its seventh rounds up, too
  assert np.ceil(np.float32(7) * (np.float32(extent) / np.float32(7))) > extent
  boxes = jnp.array([[0, 0, extent - 1, 0]])
  top, bottom, _, _ = grid.bin_edges(
    boxes, output_size=(7, 1), grid_size=(5000, 1)
  )
  u = np.arange(7)
  np.testing.assert_array_equal(top[0], extent * u // 7)
  np.testing.assert_array_equal(bottom[0], -(-extent * (u + 1) // 7))


@pytest.mark.parametrize("extent", [2**24 + 1, 2**31 - 1])
def test_bin_edges_of_huge_boxes_do_not_overflow(extent):
  boxes = jnp.array([[0, 0, extent - 1, 0]])
  top, bottom, _, _ = grid.bin_edges(
    boxes, output_size=(100, 1), grid_size=(extent, 1)
  )
  u = np.arange(100)
  np.testing.assert_array_equal(top[0], extent * u // 100)
  np.testing.assert_array_equal(bottom[0], -(-extent * (u + 1) // 100))


def test_bin_edges_outside_the_grid_are_empty():
  boxes = jnp.array([[-9, -9, -3, -3], [20, 20, 30, 30]])
  top, bottom, left, right = grid.bin_edges(
    boxes, output_size=(3, 3), grid_size=(8, 8)
  )
  np.testing.assert_array_equal(top, bottom)
  np.testing.assert_array_equal(left, right)


def _loop_masks(superpixels, membership, boxes, stride, availability):
  """Eq. 6, pixel by pixel."""
  height, width = superpixels.shape
  hf, wf = height // stride, width // stride
  out = np.zeros((len(membership), hf, wf), bool)
  for p, members in enumerate(membership):
    counts = np.zeros((hf, wf), int)
    for y in range(height):
      for x in range(width):
        s = superpixels[y, x]
        if s >= 0 and members[s]:
          counts[y // stride, x // stride] += 1
    if boxes is not None:
      y0, x0, y1, x1 = boxes[p]
      for y in range(hf):
        for x in range(wf):
          if not (y0 <= y <= y1 and x0 <= x <= x1):
            counts[y, x] = 0
    if availability == "any":
      out[p] = counts > 0
    else:
      out[p] = counts * 2 >= stride**2
      if counts.max() > 0:
        out[p].flat[counts.argmax()] = True
  return out


@pytest.mark.parametrize("availability", ["any", "coverage"])
@pytest.mark.parametrize("with_boxes", [False, True])
def test_superpixel_masks_equal_the_pixel_loop(availability, with_boxes):
  rng = np.random.default_rng(0)
  superpixels = rng.integers(-1, 9, (12, 20))
  superpixels[:4, :7] = 3  # whole cells
  superpixels[8:, 12:] = -1
  membership = rng.random((11, 9)) < 0.3
  membership[4] = False
  membership[5] = np.arange(9) == 3
  boxes = np.sort(rng.integers(-1, 6, (11, 2, 2)), axis=1).reshape(11, 4)
  got = superpixel_masks(
    jnp.asarray(superpixels, jnp.int32),
    jnp.asarray(membership),
    jnp.asarray(boxes, jnp.int32) if with_boxes else None,
    stride=4,
    availability=availability,
  )
  expected = _loop_masks(
    superpixels, membership, boxes if with_boxes else None, 4, availability
  )
  assert 0 < expected.sum() < expected.size
  np.testing.assert_array_equal(got, expected)


def test_coverage_keeps_one_cell_of_a_thin_segment():
  superpixels = np.full((8, 8), -1)
  superpixels[2:6, 3] = 0  # two pixels in each of two cells: a tie
  membership = jnp.array([[True], [False]])
  got = superpixel_masks(
    jnp.asarray(superpixels),
    membership,
    None,
    stride=4,
    availability="coverage",
  )
  expected = np.zeros((2, 2, 2), bool)
  expected[0, 0, 0] = True
  np.testing.assert_array_equal(got, expected)


def test_coverage_of_exactly_half_is_available():
  superpixels = np.full((4, 8), -1)
  superpixels[:, :6] = 0  # all of the first cell, half of the second
  superpixels[0, 6] = 1
  got = superpixel_masks(
    jnp.asarray(superpixels),
    jnp.array([[True, False]]),
    None,
    stride=4,
    availability="coverage",
  )
  np.testing.assert_array_equal(got, [[[True, True]]])


def test_superpixel_masks_vmap_over_images():
  rng = np.random.default_rng(1)
  superpixels = rng.integers(-1, 5, (3, 8, 12))
  membership = rng.random((3, 4, 5)) < 0.4
  got = jax.vmap(lambda s, m: superpixel_masks(s, m, None, stride=4))(
    jnp.asarray(superpixels), jnp.asarray(membership)
  )
  expected = [
    _loop_masks(s, m, None, 4, "any")
    for s, m in zip(superpixels, membership, strict=True)
  ]
  np.testing.assert_array_equal(got, expected)


def test_superpixel_masks_reject_bad_arguments():
  superpixels = jnp.zeros((8, 10), jnp.int32)
  membership = jnp.ones((1, 1), bool)
  with pytest.raises(ValueError, match=r"8 x 10.*stride 4"):
    pallas_kernels.superpixel_masks(superpixels, membership, None, stride=4)
  with pytest.raises(ValueError, match=r"availability.*half"):
    pallas_kernels.superpixel_masks(
      superpixels, membership, None, stride=2, availability="half"
    )
  for stride in (0, 2.0):
    with pytest.raises(ValueError, match=f"stride.*{stride}.*integer"):
      pallas_kernels.superpixel_masks(
        superpixels, membership, None, stride=stride
      )
  with pytest.raises(ValueError, match=r"stride.*static under jit"):
    jax.jit(pallas_kernels.superpixel_masks)(
      superpixels, membership, None, stride=2
    )


def test_options_of_bins_and_boxes_are_checked():
  for stride in (0, -8.0):
    with pytest.raises(ValueError, match=f"stride.*{stride}"):
      pallas_kernels.grid_boxes(PIXELS, stride=stride)
  for output_size in (7, (0, 2), (1, 2, 3)):
    with pytest.raises(ValueError, match="output_size"):
      pallas_kernels.available_bins(
        ARGUMENTS["masks"], ARGUMENTS["boxes"], output_size=output_size
      )


ARGUMENTS = {
  "superpixels": np.zeros((8, 12), np.int32),
  "membership": np.ones((3, 5), bool),
  "boxes": np.zeros((3, 4), np.int32),
  "coverage": np.ones((3, 2, 3), np.float32),
  "masks": np.ones((3, 2, 3), bool),
}
PIXELS = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
  ("function", "names", "change", "message"),
  [
    ("grid_boxes", "boxes", PIXELS.T, r"boxes.*\[4, 3\].*pixels"),
    (
      "superpixel_masks",
      "superpixels membership boxes",
      {"superpixels": np.zeros((1, 8, 12), np.int32)},
      r"superpixels.*\[1, 8, 12\].*vmap",
    ),
    (
      "superpixel_masks",
      "superpixels membership boxes",
      {"superpixels": np.zeros((8, 12), np.float32)},
      "superpixels.*float32",
    ),
    (
      "superpixel_masks",
      "superpixels membership boxes",
      {"membership": np.ones((5, 3), bool)},
      r"boxes.*\[3, 4\].*\[5, 4\]",
    ),
    (
      "superpixel_coverage",
      "superpixels membership",
      {"membership": np.ones((3, 5), np.uint8)},
      "membership.*uint8",
    ),
    (
      "superpixel_coverage",
      "superpixels membership",
      {"membership": np.ones(5, bool)},
      r"membership.*\[5\]",
    ),
    ("superpixel_cells", "superpixels", np.zeros(8, np.int32), "superpixels"),
    (
      "available_cells",
      "coverage boxes",
      {"coverage": np.ones((2, 3), np.float32)},
      r"coverage.*\[2, 3\]",
    ),
    ("available_cells", "coverage boxes", {"boxes": PIXELS}, "boxes.*float32"),
    ("cells_in_boxes", "boxes", PIXELS, "boxes.*float32.*grid_boxes"),
    ("cells_in_boxes", "boxes", np.zeros(4, np.int32), r"boxes.*\[4\]"),
    (
      "available_bins",
      "masks boxes",
      {"masks": np.ones((3, 2, 3))},
      "masks.*float",
    ),
    (
      "available_bins",
      "masks boxes",
      {"boxes": np.zeros((2, 4), np.int32)},
      r"boxes.*\[2, 4\].*\[3, 4\]",
    ),
  ],
)
def test_bad_arguments(function, names, change, message):
  options = {
    "grid_boxes": {"stride": 4},
    "superpixel_masks": {"stride": 4},
    "superpixel_coverage": {"stride": 4},
    "superpixel_cells": {"stride": 4, "num_superpixels": 5},
    "cells_in_boxes": {"grid_size": (2, 3)},
  }
  if not isinstance(change, dict):
    change = {names: change}
  arguments = {name: ARGUMENTS[name] for name in names.split()}
  call = getattr(pallas_kernels, function)
  with pytest.raises(ValueError, match=message):
    call(**(arguments | change), **options.get(function, {}))


def test_available_bins_equal_the_loop():
  rng = np.random.default_rng(2)
  masks = rng.random((9, 11, 13)) < 0.08
  boxes = np.sort(rng.integers(-2, 15, (9, 2, 2)), axis=1).reshape(9, 4)
  got = available_bins(
    jnp.asarray(masks), jnp.asarray(boxes), output_size=(3, 4)
  )
  expected = np.zeros((9, 3, 4), bool)
  for p, (y0, x0, y1, x1) in enumerate(boxes):
    for u in range(3):
      for v in range(4):
        rows = slice(
          max(y0 + (y1 - y0 + 1) * u // 3, 0),
          max(y0 + math.ceil((y1 - y0 + 1) * (u + 1) / 3), 0),
        )
        columns = slice(
          max(x0 + (x1 - x0 + 1) * v // 4, 0),
          max(x0 + math.ceil((x1 - x0 + 1) * (v + 1) / 4), 0),
        )
        expected[p, u, v] = masks[p, rows, columns].any()
  assert 0 < expected.sum() < expected.size
  np.testing.assert_array_equal(got, expected)


def test_cells_in_boxes_have_an_inclusive_end():
  found = pallas_kernels.cells_in_boxes(
    jnp.array([[0, 1, 1, 1], [2, 2, 5, 9]]), grid_size=(3, 4)
  )
  assert found.astype(int).tolist() == [
    [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]],
  ]


def test_cells_of_superpixels_equal_the_pixel_loop():
  superpixels = np.random.default_rng(6).integers(-1, 5, (12, 18))
  found = pallas_kernels.superpixel_cells(
    superpixels, num_superpixels=5, stride=6
  )
  wanted = np.zeros((5, 2, 3))
  for y, x in np.argwhere(superpixels >= 0):
    wanted[superpixels[y, x], y // 6, x // 6] += 1 / 36
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
