"""Outlines on scenes whose answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from jtsm_jax.evaluation import outlines
from jtsm_jax.evaluation.outlines import follow_colours


def _scene(*, height=90, width=120, scale=1, seed=0):
  """A red textured disc on a green textured ground: image and disc."""
  rng = np.random.default_rng(seed)
  y, x = np.ogrid[:height, :width]
  disc = (y - 45 * scale) ** 2 + (x - 60 * scale) ** 2 <= (25 * scale) ** 2
  image = np.where(disc[..., None], (200, 60, 50), (60, 150, 70))
  image = image + rng.normal(0, 12, image.shape)
  return image.clip(0, 255).astype(np.uint8), disc


def _iou(a, b):
  return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("rows", [slice(15, 75), slice(23, 67)])
def test_a_coarse_mask_becomes_the_disc(rows):
  """A square around the disc, and one whose sides cut it."""
  image, disc = _scene()
  probability = np.zeros(disc.shape, np.float32)
  probability[rows, rows.start + 15 : rows.stop + 15] = 0.9
  before = probability.copy()
  assert _iou(probability >= 0.5, disc) < 0.85
  mask = follow_colours(image, probability)
  assert mask.dtype == bool
  assert _iou(mask, disc) > 0.97
  np.testing.assert_array_equal(probability, before)
  np.testing.assert_array_equal(mask, follow_colours(image, probability))


def test_what_is_far_from_the_mask_is_not_taken():
  image, disc = _scene()
  image[:, :10] = (200, 60, 50)  # a second red thing
  mask = follow_colours(image, disc.astype(np.float32))
  assert _iou(mask, disc) > 0.97
  assert not mask[:, :10].any()


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7, 1.0])
def test_nothing_to_decide(value, monkeypatch):
  monkeypatch.setattr(cv2, "grabCut", None)  # is not called
  image, disc = _scene()
  mask = follow_colours(image, np.full(disc.shape, value, np.float32))
  assert (mask == (value >= 0.5)).all()


def test_a_mask_that_would_vanish_is_kept(monkeypatch):
  image, disc = _scene()

  def grab_cut(image, labels, *_):
    y, x = np.nonzero((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
    labels[:] = cv2.GC_BGD
    keep = round(share * len(y))
    labels[y[:keep], x[:keep]] = cv2.GC_FGD

  monkeypatch.setattr(cv2, "grabCut", grab_cut)
  probability = disc.astype(np.float32)
  share = 0.25
  np.testing.assert_array_equal(follow_colours(image, probability), disc)
  share = 0.35
  assert 0.3 < follow_colours(image, probability).sum() / disc.sum() < 0.4


def test_labels_that_grabcut_starts_from(monkeypatch):
  image, disc = _scene()
  probability = np.where(disc, 0.995, 0.0).astype(np.float32)
  calls = []
  monkeypatch.setattr(cv2, "grabCut", lambda *a: calls.append(a[1].copy()))
  follow_colours(image, probability)
  (labels,) = calls
  blurred = cv2.GaussianBlur(probability, (0, 0), 0.0125 * 120)
  for label, inside in (
    (cv2.GC_FGD, blurred > 0.95),
    (cv2.GC_PR_FGD, (blurred <= 0.95) & (blurred >= 0.5)),
    (cv2.GC_PR_BGD, (blurred < 0.5) & (blurred > 0.02)),
    (cv2.GC_BGD, blurred <= 0.02),
  ):
    assert inside.any()
    np.testing.assert_array_equal(labels == label, inside)


def test_large_images_are_shrunk(monkeypatch):
  image, disc = _scene(height=900, width=1200, scale=10)
  sizes = []
  grab_cut = cv2.grabCut

  def spy(image, labels, *rest):
    sizes.append((image.shape[:2], labels.shape))
    return grab_cut(image, labels, *rest)

  monkeypatch.setattr(outlines.cv2, "grabCut", spy)
  probability = np.zeros(disc.shape, np.float32)
  probability[230:670, 380:820] = 0.9
  mask = follow_colours(image, probability, longest_side=120)
  assert sizes == [((90, 120), (90, 120))]
  assert mask.shape == (900, 1200)
  assert _iou(mask, disc) > 0.96
