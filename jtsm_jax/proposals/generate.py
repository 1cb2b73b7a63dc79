"""Segment proposals of one image."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import cv2
import numpy as np

from jtsm_jax.proposals import candidates as candidates_lib
from jtsm_jax.proposals import hierarchy, ranking
from jtsm_jax.proposals import superpixels as superpixels_lib
from jtsm_jax.types import InputError, Proposals

VERSION = "1"
"""Part of a store's key: raise it when a change alters what is proposed."""


@dataclasses.dataclass(frozen=True)
class ProposalSettings:
  """Everything that the proposals of an image depend on, besides `VERSION`.

  Attributes:
    num_superpixels: at most so many per image.
    max_proposals: at most so many per image.
    max_side: a longer image is computed at this longest side, in pixels.
    pair_merges: pairs of regions come from so many last merges of each tree.
    large_share: a superpixel with this share of the image or more is always a
      proposal by itself: a plain sky, a wall.
  """

  num_superpixels: int = 300
  max_proposals: int = 400
  max_side: int = 500
  pair_merges: int = candidates_lib.PAIR_MERGES
  large_share: float = 0.05

  def __post_init__(self):
    limits = dict(
      num_superpixels=(1, 65535),  # the store's superpixel maps are uint16
      max_proposals=(1, 100_000),
      max_side=(16, 4096),
      pair_merges=(0, 65535),
      large_share=(0.0, 1.0),
    )
    for name, (low, high) in limits.items():
      value = getattr(self, name)
      if not low <= value <= high:
        raise InputError(
          f"ProposalSettings.{name} is {value}; set it to {low} .. {high}."
        )


def settings_key(settings: ProposalSettings) -> str:
  """A short name for `settings` and `VERSION`, fit for a folder."""
  text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
  return f"v{VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def generate_proposals(
  image: np.ndarray, *, settings: ProposalSettings | None = None
) -> Proposals:
  """Proposes segments for things and stuff, without any learning.

  Args:
    image: [H, W, 3] uint8 RGB, at least one pixel.
    settings: `ProposalSettings()` when None.

  Returns:
    Proposals, all distinct: 1 <= P <= max_proposals. The whole image is always
    among them, and so are large superpixels (as far as P allows). The same
    image and settings give the same result.

  Raises:
    ValueError: `image` has another shape or dtype.
  """
  settings = settings or ProposalSettings()
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(
      f"image is {image.dtype} {image.shape}; wanted uint8 [H, W, 3]."
    )
  if image.size == 0:
    raise ValueError(f"image is empty: {image.shape}.")
  small = _shrink(image, settings.max_side)
  cues = superpixels_lib.compute_cues(small)
  superpixels = superpixels_lib.make_superpixels(cues, settings.num_superpixels)
  graph = hierarchy.build_region_graph(superpixels, cues)
  candidates = candidates_lib.make_candidates(
    graph,
    hierarchy.build_hierarchies(graph),
    pair_merges=settings.pair_merges,
  )
  chosen = ranking.select(
    candidates.membership,
    graph.sizes,
    ranking.score(candidates),
    max_proposals=settings.max_proposals,
  )
  membership = _with_required(
    candidates.membership[chosen], graph.sizes, settings
  )
  shape = image.shape[:2]
  boxes = tight_boxes(superpixels, membership)
  count = len(membership)
  return Proposals(
    superpixels=_stretch(superpixels, shape),
    membership=membership,
    boxes=_stretch_boxes(boxes, superpixels.shape, shape),
    scores=np.linspace(1, 0, count, endpoint=False, dtype=np.float32),
  )


def tight_boxes(superpixels: np.ndarray, membership: np.ndarray) -> np.ndarray:
  """Boxes around unions of superpixels.

  Args:
    superpixels: [H, W] int32, each of the ids 0 .. S-1 occurs.
    membership: [P, S] bool, no row empty.

  Returns:
    [P, 4] int32 (y0, x0, y1, x1), half-open.
  """
  count = membership.shape[1]
  height, width = superpixels.shape
  low = np.full((2, count), max(height, width))
  high = np.zeros((2, count), np.int64)
  for axis, size in enumerate((height, width)):
    position = np.expand_dims(np.arange(size), 1 - axis)
    position = np.broadcast_to(position, superpixels.shape).ravel()
    np.minimum.at(low[axis], superpixels.ravel(), position)
    np.maximum.at(high[axis], superpixels.ravel(), position + 1)
  bounds = [
    np.where(membership, low[axis], max(height, width)).min(1)
    for axis in (0, 1)
  ] + [np.where(membership, high[axis], 0).max(1) for axis in (0, 1)]
  return np.stack(bounds, 1).astype(np.int32)


def _shrink(image: np.ndarray, max_side: int) -> np.ndarray:
  height, width = image.shape[:2]
  scale = max_side / max(height, width)
  if scale >= 1:
    return image
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _stretch(superpixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Nearest-neighbour enlargement: every superpixel survives."""
  rows, columns = (
    np.arange(full) * small // full
    for full, small in zip(shape, superpixels.shape, strict=True)
  )
  return superpixels[np.ix_(rows, columns)]


def _stretch_boxes(
  boxes: np.ndarray, small: tuple[int, int], full: tuple[int, int]
) -> np.ndarray:
  """Tight boxes after `_stretch`: row r begins at ceil(r * full / small)."""
  return -(-boxes * np.tile(full, 2) // np.tile(small, 2)).astype(np.int32)


def _with_required(
  membership: np.ndarray, sizes: np.ndarray, settings: ProposalSettings
) -> np.ndarray:
  """Puts the whole image and large superpixels last where they are missing."""
  large = np.flatnonzero(sizes >= settings.large_share * sizes.sum())
  large = large[np.argsort(-sizes[large], kind="stable")]
  whole = np.ones((1, len(sizes)), bool)
  required = np.concatenate([np.eye(len(sizes), dtype=bool)[large], whole])
  if len(required) > settings.max_proposals:
    required = whole
  present = {row.tobytes() for row in membership}
  missing = np.array([r.tobytes() not in present for r in required])
  required = required[missing]
  keep = settings.max_proposals - len(required)
  return np.concatenate([membership[:keep], required])
