"""Panoptic fusion: detections first, stuff into what is left."""

from __future__ import annotations

import dataclasses

import numpy as np

from jtsm_jax.data.run_lengths import decode_mask
from jtsm_jax.types import VOID, Detections, PanopticMap, Segment


@dataclasses.dataclass(frozen=True)
class FusionSettings:
  """Thresholds of the fusion.

  Attributes:
    instance_score: detections below it are left out.
    instance_overlap: a detection is left out if more than this share of it is
      taken already.
    stuff_area: smallest stuff segment, as a share of the image's area.
  """

  instance_score: float = 0.5
  instance_overlap: float = 0.5
  stuff_area: float = 4096 / (500 * 375)


def fuse(
  detections: Detections,
  stuff: np.ndarray,
  stuff_score: np.ndarray,
  *,
  num_things: int,
  settings: FusionSettings = FusionSettings(),
) -> PanopticMap:
  """Merges instances and stuff into one map.

  Args:
    detections: best first.
    stuff: [H, W] int32 stuff class (T .. K-1) of each pixel, -1 for none.
    stuff_score: [H, W] float32 its score.
    num_things: T.
    settings: see there.

  Returns:
    The panoptic map; what nobody claims is void.
  """
  ids = np.full(stuff.shape, VOID, np.int32)
  segments = []
  for category, score, rle in zip(
    detections.category, detections.score, detections.rles, strict=True
  ):
    if score < settings.instance_score:
      continue
    mask = decode_mask(rle, detections.size)
    free = mask & (ids == VOID)
    area = int(free.sum())
    if area == 0 or area < (1 - settings.instance_overlap) * mask.sum():
      continue
    ids[free] = len(segments) + 1
    segments.append(
      Segment(len(segments) + 1, int(category), True, float(score), area)
    )
  smallest = settings.stuff_area * stuff.size
  for category in np.unique(stuff[stuff >= num_things]):
    mask = (stuff == category) & (ids == VOID)
    area = int(mask.sum())
    if area == 0 or area < smallest:
      continue
    ids[mask] = len(segments) + 1
    score = float(stuff_score[mask].mean())
    segments.append(
      Segment(len(segments) + 1, int(category), False, score, area)
    )
  return PanopticMap(ids, tuple(segments))
