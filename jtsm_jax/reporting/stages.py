"""Pictures of the stages that an image passes through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jtsm_jax.reporting.visualize import (
  class_colours,
  contact_sheet,
  draw_mask,
  draw_proposals,
  draw_superpixels,
  overlay_panoptic,
)
from jtsm_jax.types import Categories, PanopticMap, Proposals

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
    overlay_panoptic(image, prediction, categories),
  ]
  titles = ["image", "superpixels", "proposals", "prediction"]
  if target is not None:
    tiles.append(overlay_panoptic(image, target, categories))
    titles.append("ground truth")
  return contact_sheet([tiles], titles)


def mining_sheet(
  image: np.ndarray,
  tags: Sequence[int],
  segments: Sequence[np.ndarray],
  masks: Sequence[np.ndarray],
  categories: Categories,
) -> np.ndarray:
  """For each tag of a training image the mined segment and its pseudo mask.

  Args:
    image: [H, W, 3] uint8 RGB.
    tags: class of each mined segment.
    segments: [H, W] bool each, as mined.
    masks: [H, W] bool each, as re-estimated.
    categories: the classes.

  Returns:
    One picture, uint8 RGB: a row for each segment.
  """
  colours = class_colours(categories)
  rows = [
    [
      image,
      draw_mask(image, segment, colours[tag], categories.names[tag]),
      draw_mask(image, mask, colours[tag], categories.names[tag]),
    ]
    for tag, segment, mask in zip(tags, segments, masks, strict=True)
  ]
  return contact_sheet(rows, ["image", "mined segment", "pseudo mask"])
