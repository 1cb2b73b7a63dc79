"""Masks on the canvas against a loop over its cells."""

from concurrent.futures import Future
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from jtsm_jax.data.pipeline import with_fallback
from jtsm_jax.data.transforms import scale_labels, scaled_size
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.train import reestimation
from jtsm_jax.types import Proposals, pack_members
from tests import tiny


def _done(value):
  future = Future()
  future.set_result(value)
  return future


def _collect(mask, *, size, flip, window=None, canvas=(48, 64), stride=4):
  batch = tiny.make_batch(1, canvas=canvas).replace(
    size=np.array([size], np.int32),
    flip=np.array([flip]),
    window=np.array([window or (0, 0, *mask.shape)]),
  )
  found = reestimation.collect([[_done(mask)]], batch, mask_stride=stride)
  assert found.valid.tolist() == [[True]]
  return found.masks[0, 0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ((30, 37), (30, 37)),  # as it is
    ((30, 37), (48, 59)),  # enlarged
    ((211, 301), (44, 63)),  # shrunk
  ],
)
def test_masks_are_sampled_at_the_middle_of_each_cell(shape, size, flip):
  mask = np.random.default_rng(0).random(shape) < 0.5
  found = _collect(mask, size=size, flip=flip)
  seen = mask[:, ::-1] if flip else mask
  expected = np.zeros((12, 16), bool)
  for i in range(12):
    for j in range(16):
      y, x = 4 * i + 2, 4 * j + 2  # the middle, in pixels of the canvas
      if y < size[0] and x < size[1]:
        expected[i, j] = seen[
          int(y / size[0] * shape[0]), int(x / size[1] * shape[1])
        ]
  inside = np.s_[: (size[0] + 1) // 4, : (size[1] + 1) // 4]
  np.testing.assert_array_equal(found[inside], expected[inside])
  # Behind the last cell that the image touches there is nothing.
  assert not found[-(-size[0] // 4) :].any()
  assert not found[:, -(-size[1] // 4) :].any()


@pytest.mark.parametrize("flip", [False, True])
def test_masks_lie_where_the_pipeline_puts_the_image(flip):
  mask = np.zeros((90, 120), np.int32)
  mask[15:60, 70:110] = 1
  h, w = scaled_size(mask.shape, (48, 64))
  on_canvas = np.zeros((48, 64), np.int32)
  scale_labels(mask, on_canvas[:h, :w], flip=flip)
  found = _collect(mask > 0, size=(h, w), flip=flip)
  share = (on_canvas == 1).reshape(12, 4, 16, 4).mean((1, 3))
  assert found[share == 1].all()
  assert not found[share == 0].any()


def test_masks_are_cropped_to_the_window():
  mask = np.random.default_rng(0).random((40, 50)) < 0.5
  whole = _collect(mask[5:35, 10:47], size=(30, 37), flip=True)
  found = _collect(mask, size=(30, 37), flip=True, window=(5, 10, 35, 47))
  np.testing.assert_array_equal(found, whole)


def test_slots_without_a_segment_stay_empty():
  batch = tiny.make_batch(2)
  full = np.ones(tiny.IMAGE, bool)
  futures = [[_done(full), None], [None, None]]
  found = reestimation.collect(futures, batch, mask_stride=4)
  assert found.masks.shape == (2, 2, 16, 16)
  assert found.valid.tolist() == [[True, False], [False, False]]
  assert found.masks.sum() == found.masks[0, 0].sum() == 10 * 12


class _Source:
  """Three images, all the same."""

  image_ids = ("a", "b", "c")

  def __init__(self, image):
    _, data = cv2.imencode(".png", image[..., ::-1])
    self._record = SimpleNamespace(image=data.tobytes())

  def __getitem__(self, index):
    return self._record


def test_submit_asks_for_the_mined_segments_of_real_images():
  rng = np.random.default_rng(1)
  image = rng.integers(0, 256, (20, 30, 3), np.uint8)
  superpixels = np.repeat(np.arange(3), 10)[None].repeat(20, 0)
  membership = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0]], bool)
  proposals = Proposals(
    superpixels, pack_members(membership), np.zeros((3, 4)), np.ones(3)
  )
  batch = tiny.make_batch(3).replace(
    image_index=np.array([1, -1, 2], np.int32),
    size=np.tile([40, 60], (3, 1)),
    window=np.tile([0, 0, 20, 30], (3, 1)),
    flip=np.array([False, False, True]),
  )
  mined = tiny.make_mined(np.zeros((3, 2)), np.ones((3, 2))).replace(
    proposal=np.array([[2, 1], [0, 0], [0, 0]]),
    valid=np.array([[True, True], [True, True], [False, True]]),
  )
  with MaskReestimator(init="none", workers=2) as reestimator:
    futures = reestimation.submit(
      reestimator,
      batch,
      mined,
      source=_Source(image),
      # "c" has none: the image is its own proposal.
      get_proposals=with_fallback({"b": proposals}),
    )
    found = reestimation.collect(futures, batch, mask_stride=4)
  assert found.valid.tolist() == [[True, True], [False, False], [False, True]]
  columns = found.masks.any(2).astype(int)
  # Ten pixels of the image are twenty of the canvas, or five cells.
  assert columns[0, 0].tolist() == [0] * 5 + [1] * 5 + [0] * 6
  assert columns[0, 1].tolist() == [0] * 5 + [1] * 10 + [0]
  assert found.masks[2, 1].sum() == 10 * 15
