"""Pictures of the stages that an image passes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jtsm_jax.proposals.quality import TrueSegments, mask_iou
from jtsm_jax.reporting.visualize import (
  class_colours,
  contact_sheet,
  draw_mask,
  draw_proposals,
  draw_superpixels,
  sketch_panoptic,
)
from jtsm_jax.types import Categories, PanopticMap, Proposals, Segment

PROPOSALS_SHOWN = 40


def prediction_sheet(
  image: np.ndarray,
  proposals: Proposals,
  prediction: PanopticMap,
  target: PanopticMap | None,
  categories: Categories,
) -> np.ndarray:
  """Photograph, superpixels, best proposals, prediction and ground truth.

  Args:
    image: [H, W, 3] uint8 RGB.
    proposals: of the image.
    prediction: what the model gave.
    target: the ground truth, or None where there is none.
    categories: the classes.

  Returns:
    One picture, uint8 RGB.
  """
  tiles = [
    image,
    draw_superpixels(image, proposals.superpixels),
    draw_proposals(image, proposals, PROPOSALS_SHOWN),
    sketch_panoptic(image, prediction, categories),
  ]
  titles = ["image", "superpixels", "proposals", "prediction"]
  if target is not None:
    tiles.append(sketch_panoptic(image, target, categories))
    titles.append("ground truth")
  return contact_sheet([tiles], titles)


def proposal_sheet(
  image: np.ndarray,
  proposals: Proposals,
  truth: TrueSegments,
  categories: Categories,
) -> np.ndarray:
  """Superpixels, the top of the ranking, and what covers the ground truth best.

  Args:
    image: [H, W, 3] uint8 RGB.
    proposals: of the image.
    truth: the ground truth.
    categories: the classes.

  Returns:
    One picture, uint8 RGB. The labels of the best proposals tell their IoU.
  """
  tiles = [
    draw_superpixels(image, proposals.superpixels),
    draw_proposals(image, proposals, PROPOSALS_SHOWN),
    sketch_panoptic(image, best_proposals(proposals, truth), categories),
    sketch_panoptic(image, _painted(truth, truth.mask), categories),
  ]
  count = len(proposals)
  titles = [
    f"{len(proposals.member_bits)} superpixels",
    f"first {min(PROPOSALS_SHOWN, count)} of {count} proposals",
    "best proposal of each segment",
    "ground truth",
  ]
  return contact_sheet([tiles], titles)


def best_proposals(proposals: Proposals, truth: TrueSegments) -> PanopticMap:
  """The best proposal of each true segment, small ones on top.

  Returns:
    A map of a segment with the id n + 1 for the n-th true one, whose score is
    the IoU; one that others hide has no pixel.
  """
  iou = mask_iou(
    proposals.superpixels, proposals.membership, truth.masks(), truth.known
  )
  best = iou.argmax(0)
  return _painted(truth, lambda n: proposals.mask(best[n]), iou.max(0))


def _painted(
  truth: TrueSegments,
  mask_of: Callable[[int], np.ndarray],
  scores: np.ndarray | None = None,
) -> PanopticMap:
  """A map of masks that stand for true segments, small ones on top."""
  order = np.argsort(-truth.area, kind="stable")
  ids = np.zeros(truth.known.shape, np.int32)
  for n in order:
    ids[mask_of(n)] = n + 1
  scores = np.ones(len(order)) if scores is None else scores
  segments = [
    Segment(
      id=int(n) + 1,
      category=int(truth.category[n]),
      is_thing=bool(truth.is_thing[n]),
      score=float(scores[n]),
      area=int((ids == n + 1).sum()),
    )
    for n in order
  ]
  return PanopticMap(ids, tuple(segments))


def mining_sheet(
  image: np.ndarray,
  mined: Sequence[tuple[int, np.ndarray, np.ndarray | None]],
  categories: Categories,
) -> np.ndarray:
  """The mined segments of a training image and their pseudo masks.

  Args:
    image: [H, W, 3] uint8 RGB.
    mined: (class, segment [H, W] bool, re-estimated mask [H, W] bool or None).
    categories: the classes.

  Returns:
    One picture, uint8 RGB: a row for each segment, or the image alone.
  """
  colours = class_colours(categories)
  rows = []
  for category, segment, mask in mined:
    style = colours[category], categories.names[category]
    row = [image, draw_mask(image, segment, *style)]
    row.append(None if mask is None else draw_mask(image, mask, *style))
    rows.append(row)
  return contact_sheet(
    rows or [[image, None, None]],
    ["image", "mined segment", "pseudo mask"],
    tile_size=320,
  )
