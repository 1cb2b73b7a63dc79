"""Outlines of detections that follow the colours of the image (GrabCut).

A mask of the instance branch has 28 x 28 cells, and a proposal is as good as
its superpixels. Both know where a thing is better than where it ends.
"""

from __future__ import annotations

import cv2
import numpy as np

from jtsm_jax.mining.masks import grab_cut, is_foreground

_SURE = 0.95  # probability of what stays foreground
_OUT = 0.02  # of what stays background
_BLUR = 0.0125  # standard deviation, in longest sides of the image
_LEAST = 0.3  # a mask that loses more of its area than 1 - this is refused


def follow_colours(
  image: np.ndarray,
  probability: np.ndarray,
  *,
  rounds: int = 2,
  longest_side: int = 400,
) -> np.ndarray:
  """Cuts a thing out of the image, starting from a soft mask.

  The probability is blurred, so that what is near its outline is open to both
  sides; colours decide there. The result is a pure function of the arguments,
  in any thread.

  Args:
    image: [H, W, 3] uint8 RGB.
    probability: [H, W] float32 in [0, 1].
    rounds: of GrabCut.
    longest_side: pixels at which it works; larger images are shrunk to it.

  Returns:
    [H, W] bool. It is `probability >= 0.5` where there is nothing to decide:
    where that is empty or everything, before the blur or after it; and where
    GrabCut keeps less than 30 % of its area.
  """
  plain = probability >= 0.5
  height, width = plain.shape
  scale = min(longest_side / max(height, width), 1)
  size = max(round(width * scale), 1), max(round(height * scale), 1)
  blurred = cv2.GaussianBlur(
    cv2.resize(
      probability.astype(np.float32), size, interpolation=cv2.INTER_AREA
    ),
    (0, 0),
    _BLUR * max(size),
  )
  labels = np.select(
    [blurred > _SURE, blurred >= 0.5, blurred > _OUT],
    [cv2.GC_FGD, cv2.GC_PR_FGD, cv2.GC_PR_BGD],
    cv2.GC_BGD,
  ).astype(np.uint8)
  before = is_foreground(labels)
  if not before.any() or before.all():
    return plain
  found = grab_cut(
    cv2.resize(image, size, interpolation=cv2.INTER_AREA),
    labels,
    iterations=rounds,
  )
  if found.sum() < _LEAST * before.sum():
    return plain
  full = cv2.resize(
    found.astype(np.uint8) * 255,
    (width, height),
    interpolation=cv2.INTER_LINEAR,
  )
  return full >= 128
