"""How well proposals cover the true segments. Never used in training.

Of each true segment the best IoU among the first n proposals is taken. Means of
it over segments are J_i, means over classes of the means of each class J_c
(Pont-Tuset et al., 2017); recall is the share of segments of at least some IoU,
AR its mean over the thresholds 0.5, 0.55 .. 0.95 (COCO).

Void pixels of the ground truth belong to nobody: as in panoptic quality
(Kirillov et al., 2019), they are left out of both sides of an IoU. Instances
alone leave nothing void.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jtsm_jax.data.run_lengths import (
  decode_mask,
  encode_segments,
  mask_area,
)
from jtsm_jax.types import VOID, Instances, PanopticMap, Proposals

COUNTS = (100, 500, 1000, 2000, 4000)
RECALL_AT = (0.5, 0.7, 0.85)
AVERAGE_RECALL_AT = np.arange(0.5, 0.96, 0.05)
SIZES = (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, None))
"""COCO's classes of size, in pixels of the segment."""


@dataclasses.dataclass(frozen=True)
class TrueSegments:
  """G true segments of an image, which may overlap and are no crowds.

  Attributes:
    rles: G masks as COCO's compressed run lengths (`counts`): as arrays those
      of a photograph would fill the memory.
    known: [H, W] bool, pixels that are not void.
    category: [G] int64, class index.
    is_thing: [G] bool.
  """

  rles: tuple[bytes, ...]
  known: np.ndarray
  category: np.ndarray
  is_thing: np.ndarray

  def mask(self, index: int) -> np.ndarray:
    """[H, W] bool: the pixels of one segment."""
    return decode_mask(self.rles[index], self.known.shape)

  def masks(self) -> Iterator[np.ndarray]:
    """All of them, one at a time."""
    return map(self.mask, range(len(self.rles)))

  @property
  def area(self) -> np.ndarray:
    """[G] int64, pixels."""
    return np.array([mask_area(counts) for counts in self.rles], np.int64)


def segments_of_map(target: PanopticMap) -> TrueSegments:
  """Those of a panoptic map."""
  segments = [s for s in target.segments if not s.is_crowd]
  _, rles = encode_segments(target.ids, [s.id for s in segments])
  return TrueSegments(
    rles=rles,
    known=target.ids != VOID,
    category=np.array([s.category for s in segments], np.int64),
    is_thing=np.array([s.is_thing for s in segments], bool),
  )


def segments_of_instances(
  instances: Instances, size: tuple[int, int]
) -> TrueSegments:
  """Those of the masks of instances, but empty ones.

  Args:
    instances: with masks.
    size: (H, W) of the image.
  """
  area = np.array([mask_area(counts) for counts in instances.rles], np.int64)
  kept = np.flatnonzero((area > 0) & ~instances.is_crowd)
  return TrueSegments(
    rles=tuple(instances.rles[n] for n in kept),
    known=np.ones(size, bool),
    category=instances.category[kept].astype(np.int64),
    is_thing=np.ones(len(kept), bool),
  )


@dataclasses.dataclass(frozen=True)
class BestIou:
  """How well the proposals cover G true segments, of one image or of many.

  Attributes:
    iou: [G, len(COUNTS)] float64 in [0, 1], best among the first so many.
    category: [G] int64, class index.
    is_thing: [G] bool.
    area: [G] int64, pixels.
  """

  iou: np.ndarray
  category: np.ndarray
  is_thing: np.ndarray
  area: np.ndarray


def best_iou(proposals: Proposals, truth: TrueSegments) -> BestIou:
  """Best IoU of each true segment with the proposals of its image.

  Raises:
    ValueError: the two are of different size.
  """
  iou = mask_iou(
    proposals.superpixels, proposals.membership, truth.masks(), truth.known
  )
  return BestIou(
    iou=np.stack([iou[:n].max(0, initial=0.0) for n in COUNTS], 1),
    category=truth.category,
    is_thing=truth.is_thing,
    area=truth.area,
  )


def mask_iou(
  superpixels: np.ndarray,
  membership: np.ndarray,
  masks: Iterable[np.ndarray],
  known: np.ndarray,
) -> np.ndarray:
  """IoU of sets of superpixels with masks; unknown pixels count nowhere.

  Args:
    superpixels: [H, W] int32, ids 0 .. S-1.
    membership: [P, S] bool.
    masks: G of [H, W] bool, of which one at a time is read.
    known: [H, W] bool.

  Returns:
    [P, G] float64.

  Raises:
    ValueError: masks and superpixels are of different size.
  """
  if superpixels.shape != known.shape:
    raise ValueError(
      f"superpixels are {superpixels.shape}, the target is {known.shape}; "
      "wanted the same size."
    )
  count = membership.shape[1]

  def pixels(chosen):  # of each superpixel; exact in float32 up to 16 million
    return np.bincount(superpixels[chosen], minlength=count).astype(np.float32)

  counts = [pixels(mask & known) for mask in masks]
  counts = np.stack(counts, 1) if counts else np.zeros((count, 0), np.float32)
  member = membership.astype(np.float32)
  inter = (member @ counts).astype(np.float64)
  area = (member @ pixels(known)).astype(np.float64)
  union = area[:, None] + counts.sum(0) - inter
  return inter / np.maximum(union, 1)


def concatenate(results: Sequence[BestIou]) -> BestIou:
  """The segments of many images."""
  return BestIou(
    *(
      np.concatenate([getattr(r, field.name) for r in results])
      for field in dataclasses.fields(BestIou)
    )
  )


def counts_up_to(most: int) -> list[int]:
  """The `COUNTS` below `most`, and `most` itself if it is below the last."""
  below = [n for n in COUNTS if n < most]
  return below + [min(most, COUNTS[-1])] * (len(below) < len(COUNTS))


def summary(
  found: BestIou, *, most: int = COUNTS[-1]
) -> dict[str, dict[str, Any]]:
  """Measures of groups of segments.

  Args:
    found: of all images.
    most: no image has more proposals.

  Returns:
    For "things", "stuff", "all" and, of things, "small", "medium" and "large":
    the number of `segments`, and lists over `counts_up_to(most)` of "J_i",
    "J_c", "AR" and "R@0.5", "R@0.7", "R@0.85". Groups without segments are
    left out.
  """
  columns = len(counts_up_to(most))
  found = dataclasses.replace(found, iou=found.iou[:, :columns])
  groups = {
    "things": found.is_thing,
    "stuff": ~found.is_thing,
    "all": np.ones(len(found.area), bool),
  }
  for name, low, high in SIZES:
    inside = (found.area >= low) & (found.area < (high or np.inf))
    groups[name] = found.is_thing & inside
  return {k: _measures(found, v) for k, v in groups.items() if v.any()}


def _measures(found: BestIou, chosen: np.ndarray) -> dict[str, Any]:
  iou, category = found.iou[chosen], found.category[chosen]
  classes = [iou[category == c].mean(0) for c in np.unique(category)]
  recall = {f"R@{t}": (iou >= t).mean(0).tolist() for t in RECALL_AT}
  average = [(iou >= t - 1e-9).mean(0) for t in AVERAGE_RECALL_AT]
  return dict(
    segments=int(chosen.sum()),
    J_i=iou.mean(0).tolist(),
    J_c=np.mean(classes, 0).tolist(),
    AR=np.mean(average, 0).tolist(),
    **recall,
  )
