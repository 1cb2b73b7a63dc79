"""Re-estimation on scenes whose answer is known."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import tempfile
import threading

import cv2
import numpy as np
import pytest

from jtsm_jax.mining import masks
from jtsm_jax.mining.masks import MaskReestimator, reestimate_mask


def _scene(*, height=60, width=80, centre=(30, 40), radius=20, seed=0):
  """A red textured disc on a green textured ground: image and disc."""
  rng = np.random.default_rng(seed)
  y, x = np.ogrid[:height, :width]
  disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
  image = np.where(disc[..., None], (200, 60, 50), (60, 150, 70))
  image = image + rng.normal(0, 12, image.shape)
  return image.clip(0, 255).astype(np.uint8), disc


def _cross(disc):
  """About half of the disc: its two diameters, thick; the same box."""
  rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
  y, x = int(rows.mean()), int(columns.mean())
  segment = np.zeros_like(disc)
  segment[y - 4 : y + 5] = segment[:, x - 4 : x + 5] = True
  return segment & disc


def _iou(a, b):
  return (a & b).sum() / (a | b).sum()


def test_disc_is_recovered_from_half_of_it():
  image, disc = _scene()
  segment = _cross(disc)
  assert _iou(segment, disc) < 0.6
  mask = reestimate_mask(image, segment)
  assert mask.dtype == bool
  assert _iou(mask, disc) > 0.95
  assert (mask | ~segment).all()  # holds the firm foreground


def test_labels_that_grabcut_starts_from(monkeypatch):
  image, _ = _scene()
  segment = np.zeros((60, 80), bool)
  segment[10:20, 30] = segment[19, 30:50] = True
  expected = np.full((60, 80), cv2.GC_BGD)
  expected[10:20, 30:50] = cv2.GC_PR_BGD
  expected[segment] = cv2.GC_FGD
  calls = []

  def grab_cut(image, labels, rectangle, background, foreground, count, mode):
    calls.append((image, labels.copy(), rectangle, count, mode))

  monkeypatch.setattr(cv2, "grabCut", grab_cut)
  reestimate_mask(image, segment, longest_side=80, iterations=3)
  ((bgr, labels, rectangle, count, mode),) = calls
  np.testing.assert_array_equal(bgr, image[..., ::-1])
  np.testing.assert_array_equal(labels, expected)
  assert rectangle is None
  assert (count, mode) == (3, cv2.GC_INIT_WITH_MASK)


def test_outside_the_box_is_never_foreground():
  image, disc = _scene()
  segment = _cross(disc)
  segment[:, 40:] = False  # its box holds the left half of the disc
  mask = reestimate_mask(image, segment)
  assert mask.sum() > segment.sum()
  assert not mask[:, 40:].any()
  assert not mask[:10].any()
  assert not mask[51:].any()


def test_firm_foreground_stays_whatever_its_colour():
  image, disc = _scene()
  segment = _cross(disc)
  segment[12:16, 22:26] = True  # ground in a corner of the box
  segment[11, 20:40] = True  # and a line too thin for the working size
  mask = reestimate_mask(image, segment, longest_side=30)
  assert mask.sum() > segment.sum()
  assert (mask | ~segment).all()


@pytest.mark.parametrize("longest_side", [40, 80, 160])
def test_any_working_size_gives_the_image_size(longest_side):
  image, disc = _scene()
  mask = reestimate_mask(image, _cross(disc), longest_side=longest_side)
  assert mask.shape == disc.shape
  assert _iou(mask, disc) > 0.9


def test_rectangle_needs_only_the_box():
  image, disc = _scene()
  corners = np.zeros_like(disc)
  corners[10, 20] = corners[50, 60] = True  # the box of the disc
  mask = reestimate_mask(image, corners, init="rectangle")
  assert _iou(mask, disc) > 0.9
  assert not mask[10, 20]  # the segment is not firm


def test_rectangle_of_the_whole_image_keeps_a_border_of_background():
  image, disc = _scene(radius=24)
  mask = reestimate_mask(image, np.ones_like(disc), init="rectangle")
  assert _iou(mask, disc) > 0.9


def test_segment_whose_box_is_the_whole_image():
  image, disc = _scene(radius=20)
  segment = _cross(disc)
  segment[0, 0] = segment[-1, -1] = True
  mask = reestimate_mask(image, segment)
  assert _iou(mask, disc | segment) > 0.9


def test_none_returns_the_segment():
  image, disc = _scene()
  segment = _cross(disc)
  mask = reestimate_mask(image, segment, init="none")
  np.testing.assert_array_equal(mask, segment)
  assert not np.shares_memory(mask, segment)


@pytest.mark.parametrize(
  "region",
  [
    np.s_[0:0, 0:0],  # empty
    np.s_[:, :],  # the whole image
    np.s_[10:40, 20:50],  # fills its box
    np.s_[10:11, 20:21],  # one pixel
  ],
)
def test_segment_with_nothing_to_decide_is_returned(region):
  image, disc = _scene()
  segment = np.zeros_like(disc)
  segment[region] = True
  np.testing.assert_array_equal(reestimate_mask(image, segment), segment)


@pytest.mark.parametrize("init", ["segment", "rectangle"])
def test_tiny_box_keeps_its_segment(init, monkeypatch):
  monkeypatch.setattr(cv2, "grabCut", lambda *_: pytest.fail("was called"))
  image, disc = _scene()
  segment = np.zeros_like(disc)
  segment[10, 20] = segment[11, 21] = True
  mask = reestimate_mask(image, segment, init=init, longest_side=80)
  np.testing.assert_array_equal(mask, segment)


def test_segment_that_vanishes_at_the_working_size_is_kept():
  image, disc = _scene()
  segment = np.zeros_like(disc)
  segment[5, 5] = segment[50, 70] = True
  mask = reestimate_mask(image, segment, longest_side=16)
  np.testing.assert_array_equal(mask, segment)


def test_image_of_one_colour_does_not_fail():
  image, disc = _scene()
  segment = _cross(disc)
  mask = reestimate_mask(np.full_like(image, 7), segment)
  assert (mask | ~segment).all()


def test_inputs_are_not_changed():
  image, disc = _scene()
  segment = _cross(disc)
  before = image.copy(), segment.copy()
  reestimate_mask(image, segment)
  np.testing.assert_array_equal(image, before[0])
  np.testing.assert_array_equal(segment, before[1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image": np.zeros((6, 8, 3))}, "image is float64"),
    ({"image": np.zeros((6, 8), np.uint8)}, "image is uint8"),
    ({"segment": np.zeros((6, 8), np.uint8)}, "segment is uint8"),
    ({"segment": np.zeros((8, 6), bool)}, "segment is bool"),
    ({"init": "box"}, "init is 'box'"),
    ({"iterations": 0}, "iterations is 0"),
  ],
)
def test_wrong_arguments_are_named(change, message):
  arguments = {
    "image": np.zeros((6, 8, 3), np.uint8),
    "segment": np.zeros((6, 8), bool),
    **change,
  }
  image, segment = arguments.pop("image"), arguments.pop("segment")
  with pytest.raises(ValueError, match=message):
    reestimate_mask(image, segment, **arguments)


def _noisy_cases():
  """Scenes without a clear answer, where chance would show."""
  rng = np.random.default_rng(0)
  cases = []
  for seed in range(6):
    _, disc = _scene(seed=seed)
    image = rng.integers(0, 256, (*disc.shape, 3), dtype=np.uint8)
    cases.append((cv2.GaussianBlur(image, (0, 0), 1.5), _cross(disc)))
  return cases


def test_result_does_not_depend_on_chance_or_threads():
  cases = _noisy_cases()
  expected = [reestimate_mask(*case, longest_side=80) for case in cases]
  cv2.setRNGSeed(123)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    futures = [
      pool.submit(reestimate_mask, *case, longest_side=80) for case in cases * 4
    ]
    for i, future in enumerate(futures):
      np.testing.assert_array_equal(future.result(), expected[i % len(cases)])


def test_reestimator_counts_and_remembers():
  image, disc = _scene()
  segment = _cross(disc)
  loads = []

  def load():
    loads.append(1)
    return image, segment

  with MaskReestimator(longest_side=80) as reestimator:
    first = reestimator.submit("a", 0, load).result()
    assert (reestimator.hits, reestimator.misses) == (0, 1)
    again = reestimator.submit("a", 0, load).result()
    assert (reestimator.hits, reestimator.misses) == (1, 1)
    reestimator.submit("a", 1, load).result()
    reestimator.submit("b", 0, load).result()
    assert (reestimator.hits, reestimator.misses) == (1, 3)
  assert len(loads) == 3
  expected = reestimate_mask(image, segment, longest_side=80)
  np.testing.assert_array_equal(first, expected)
  np.testing.assert_array_equal(again, expected)
  assert not first.flags.writeable
  assert not again.flags.writeable


def test_one_computation_for_two_askers():
  image, disc = _scene()
  gate = threading.Event()

  def load():
    gate.wait(10)
    return image, _cross(disc)

  with MaskReestimator(longest_side=80) as reestimator:
    a = reestimator.submit("a", 0, load)
    b = reestimator.submit("a", 0, load)
    other = reestimator.submit("a", 1, load)
    assert reestimator.queue_depth == 2
    gate.set()
    concurrent.futures.wait([a, b, other])
  assert (reestimator.hits, reestimator.misses) == (1, 2)
  assert reestimator.queue_depth == 0
  np.testing.assert_array_equal(a.result(), b.result())


def test_memory_is_bounded_and_the_oldest_goes_first():
  image, disc = _scene()
  load = lambda: (image, np.zeros_like(disc))  # noqa: E731
  # One mask of 60 x 80 pixels takes 600 bytes: two fit.
  with MaskReestimator(memory_bytes=1200, workers=1) as reestimator:
    for proposal in (0, 1, 0, 2):  # 0 is used again, so 2 drives out 1
      reestimator.submit("a", proposal, load).result()
    assert (reestimator.hits, reestimator.misses) == (1, 3)
    reestimator.submit("a", 0, load).result()
    assert reestimator.misses == 3
    reestimator.submit("a", 1, load).result()
    assert reestimator.misses == 4


def test_disk_outlives_the_process(tmp_path):
  image, disc = _scene(height=61, width=83)  # not a multiple of 8 bits
  load = lambda: (image, _cross(disc))  # noqa: E731
  settings = {"longest_side": 80, "cache_dir": tmp_path}
  with MaskReestimator(**settings) as first:
    expected = first.submit("a", 7, load).result()
  files = [p for p in tmp_path.rglob("*") if p.is_file()]
  assert [p.name for p in files] == ["7.png"]  # no temporary file is left

  with MaskReestimator(**settings) as second:
    found = second.submit("a", 7, lambda: pytest.fail("loaded")).result()
  assert (second.hits, second.misses) == (1, 0)
  np.testing.assert_array_equal(found, expected)

  with MaskReestimator(**settings, iterations=1) as other:
    other.submit("a", 7, load).result()
  assert (other.hits, other.misses) == (0, 1)  # other settings, other mask


def test_damaged_file_is_computed_again(tmp_path, caplog):
  image, disc = _scene()
  load = lambda: (image, _cross(disc))  # noqa: E731
  settings = {"longest_side": 80, "cache_dir": tmp_path}
  with MaskReestimator(**settings) as first:
    expected = first.submit("a", 7, load).result()
  (path,) = tmp_path.rglob("7.png")
  path.write_bytes(b"")
  with MaskReestimator(**settings) as second:
    found = second.submit("a", 7, load).result()
  assert second.misses == 1
  assert "7.png is damaged" in caplog.text
  np.testing.assert_array_equal(found, expected)
  assert path.stat().st_size > 0


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, caplog):
  # As a full disk: no folder can be made where a file is.
  (tmp_path / "full").write_text("")
  image, disc = _scene()
  load = lambda: (image, _cross(disc))  # noqa: E731
  with MaskReestimator(longest_side=80, workers=2) as without:
    expected = without.submit("a", 7, load).result()
  cache = tmp_path / "full" / "masks"
  with MaskReestimator(longest_side=80, workers=2, cache_dir=cache) as full:
    futures = [full.submit(name, 7, load) for name in "abcd"]
    for future in futures:
      np.testing.assert_array_equal(future.result(), expected)
    assert full.submit("a", 7, load).done()  # still kept in memory
  assert caplog.text.count("masks cannot be kept in") == 1


def test_a_disk_that_fills_up_loses_no_mask(tmp_path, caplog, monkeypatch):
  def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  image, disc = _scene()
  load = lambda: (image, _cross(disc))  # noqa: E731
  with MaskReestimator(longest_side=80, cache_dir=tmp_path) as reestimator:
    expected = reestimator.submit("a", 7, load).result()
    monkeypatch.setattr(tempfile, "mkstemp", full)
    for name in "bc":
      found = reestimator.submit(name, 7, load).result()
      np.testing.assert_array_equal(found, expected)
  assert caplog.text.count("(No space left on device)") == 1
  assert [p.name for p in tmp_path.rglob("*.*")] == ["7.png"]


def test_failure_reaches_the_caller_and_is_not_remembered():
  image, disc = _scene()

  def broken():
    raise OSError("no such image")

  with MaskReestimator(longest_side=80) as reestimator:
    with pytest.raises(OSError, match="no such image"):
      reestimator.submit("a", 0, broken).result()
    mask = reestimator.submit("a", 0, lambda: (image, disc)).result()
  assert mask.shape == disc.shape
  assert reestimator.queue_depth == 0


def test_close_cancels_what_waits():
  gate = threading.Event()
  reestimator = MaskReestimator(workers=1)
  image, disc = _scene()

  def load():
    gate.wait(10)
    return image, disc

  running = reestimator.submit("a", 0, load)
  while not running.running():
    pass
  waiting = reestimator.submit("a", 1, load)
  threading.Timer(0.1, gate.set).start()
  reestimator.close()
  assert running.done()
  assert waiting.cancelled()
  assert reestimator.queue_depth == 0


def test_resizing_keeps_the_box_around_the_segment():
  for size in (37, 61, 113):
    segment = np.zeros((60, 80), bool)
    segment[13:29, 31:64] = True
    segment[20, 40] = False
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    mask = reestimate_mask(image, segment, longest_side=size)
    y0, x0, y1, x1 = masks._bounding_box(mask)
    assert (y0, x0, y1, x1) == (13, 31, 29, 64)
