"""Segment proposals of one image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from jtsm_jax.proposals import diversity, ranking
from jtsm_jax.proposals.candidates import Candidates, make_candidates
from jtsm_jax.proposals.cues import compute_cues
from jtsm_jax.proposals.deep_features import deep_features
from jtsm_jax.proposals.hierarchies import build_hierarchies
from jtsm_jax.proposals.region_graph import (
  RegionGraph,
  build_region_graph,
  superpixel_boxes,
)
from jtsm_jax.proposals.superpixels import make_superpixels
from jtsm_jax.types import InputError, Proposals, pack_members

VERSION = "3"
"""Part of a store's key: raise it when a change alters what is proposed."""

CHOOSE_FROM = 6
"""Candidates that are looked at for each proposal. With more, the many unlikely
ones together outweigh the likely ones: of 400 proposals on MSRC, J_i falls."""

MIN_SUPERPIXELS = 600
"""A small image gets so many, where it has them."""


LIMITS = {
  "max_proposals": (1, 4000),
  "max_side": (16, 4096),
  "num_superpixels": (1, 65535),  # the store's superpixel maps are uint16
  "pixels_per_superpixel": (1, 1_000_000),
  "pair_merges": (0, 65535),
  "large_share": (0.0, 1.0),
}
"""The least and the greatest value of settings."""


@dataclasses.dataclass(frozen=True)
class ProposalSettings:
  """Everything that the proposals of an image depend on, besides `VERSION`.

  Attributes:
    max_proposals: at most so many per image.
    max_side: a longer image is computed at this longest side, in pixels.
    num_superpixels: at most so many per image.
    pixels_per_superpixel: on average, but at least `MIN_SUPERPIXELS` are made.
    network: use the features of an ImageNet classifier.
    pair_merges: pairs of regions come from so many last merges of each tree.
    ranker: see `ranking.score`.
    choose_among: proposals are chosen among the best so many candidates, but
      not more than `CHOOSE_FROM` for each.
    large_share: a superpixel with this share of the image or more is always a
      proposal by itself: a plain sky, a wall.
  """

  max_proposals: int = 2000
  max_side: int = 640
  num_superpixels: int = 1600
  pixels_per_superpixel: int = 200
  network: bool = True
  pair_merges: int = 200
  ranker: str = "quality"
  choose_among: int = 12_000
  large_share: float = 0.05

  def __post_init__(self):
    among = {"choose_among": (self.max_proposals, 1_000_000)}
    for name, (low, high) in (LIMITS | among).items():
      value = getattr(self, name)
      if not low <= value <= high:
        raise InputError(
          f"ProposalSettings.{name} is {value}; set it to {low} .. {high}."
        )
    rankers = (*ranking.FITTED, ranking.UNFITTED)
    if self.ranker not in rankers:
      raise InputError(
        f"ProposalSettings.ranker is {self.ranker!r}; wanted one of {rankers}."
      )
    if self.ranker == "quality" and not self.network:
      raise InputError(
        'ProposalSettings.ranker "quality" needs network=True; set ranker to'
        ' "fast".'
      )


PRESETS = {
  "quality": ProposalSettings(),
  "fast": ProposalSettings(
    max_side=500,
    choose_among=8000,
    pixels_per_superpixel=300,
    network=False,
    pair_merges=150,
    ranker="fast",
  ),
  "unfitted": ProposalSettings(ranker="unfitted"),
}
"""No constant of "unfitted" was fitted to masks; see `ranking`."""


def preset_settings(preset: str, **changes: Any) -> ProposalSettings:
  """The settings of a preset, with some of them changed.

  Raises:
    InputError: there is no such preset, or a value is out of its range.
  """
  if preset not in PRESETS:
    raise InputError(
      f"proposal preset {preset!r} is unknown; wanted one of {[*PRESETS]}."
    )
  return dataclasses.replace(PRESETS[preset], **changes)


def settings_key(settings: ProposalSettings) -> str:
  """A short name for `settings` and `VERSION`, fit for a folder."""
  text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
  return f"v{VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def generate_proposals(
  image: np.ndarray,
  *,
  preset: str = "quality",
  max_proposals: int = 2000,
) -> Proposals:
  """Proposes segments for things and stuff.

  Args:
    image: [H, W, 3] uint8 RGB, at least one pixel.
    preset: "quality"; "fast", without a network and in a third of the time; or
      "unfitted", as "quality" but with a ranking that no mask has taught.
    max_proposals: 1 .. 4,000.

  Returns:
    Proposals, all distinct and connected (they may have holes):
    1 <= P <= max_proposals. The whole image is always among them, and so are
    large superpixels (as far as P allows). The same image and options give the
    same result.

  Raises:
    ValueError: `image` has another shape or dtype.
    InputError: an option is unknown or out of its range.
  """
  return propose(image, preset_settings(preset, max_proposals=max_proposals))


def propose(image: np.ndarray, settings: ProposalSettings) -> Proposals:
  """As `generate_proposals`, with any settings."""
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(
      f"image is {image.dtype} {image.shape}; wanted uint8 [H, W, 3]."
    )
  if image.size == 0:
    raise ValueError(f"image is empty: {image.shape}.")
  superpixels, graph, candidates = find_candidates(image, settings)
  scores = ranking.score(candidates, graph.shape, ranker=settings.ranker)
  membership = choose(candidates, graph, scores, settings)
  return in_full_size(superpixels, membership, image.shape[:2])


def find_candidates(
  image: np.ndarray,
  settings: ProposalSettings,
  *,
  lap: Callable[[str], None] = lambda stage: None,
) -> tuple[np.ndarray, RegionGraph, Candidates]:
  """The superpixels of an image, their graph, and all that is chosen from.

  Args:
    image: [H, W, 3] uint8 RGB; it is shrunk to `settings.max_side`.
    settings: see `ProposalSettings`.
    lap: called with the name of each stage at its end.
  """
  image = _shrink(image, settings.max_side)
  cues = compute_cues(image)
  lap("cues")
  pixels = image.shape[0] * image.shape[1]
  wanted = max(MIN_SUPERPIXELS, pixels // settings.pixels_per_superpixel)
  superpixels = make_superpixels(cues, min(settings.num_superpixels, wanted))
  lap("superpixels")
  deep = deep_features(image, superpixels) if settings.network else None
  lap("network")
  graph = build_region_graph(superpixels, cues, deep)
  trees = build_hierarchies(graph)
  lap("trees")
  candidates = make_candidates(graph, trees, pair_merges=settings.pair_merges)
  lap("candidates")
  return superpixels, graph, candidates


def choose(
  candidates: Candidates,
  graph: RegionGraph,
  scores: np.ndarray,
  settings: ProposalSettings,
) -> np.ndarray:
  """The best and diverse of the candidates, best first: [P, S] bool."""
  best = np.argsort(-scores, kind="stable")
  best = best[: CHOOSE_FROM * settings.max_proposals][: settings.choose_among]
  membership = candidates.membership(best)
  chosen = diversity.select(
    scores[best],
    diversity.find_overlaps(membership, graph.sizes),
    max_proposals=settings.max_proposals,
  )
  return _with_required(membership[chosen], graph.sizes, settings)


def in_full_size(
  superpixels: np.ndarray, membership: np.ndarray, shape: tuple[int, int]
) -> Proposals:
  """Proposals of an image of `shape` whose superpixels may be smaller."""
  boxes = tight_boxes(superpixels, membership)
  return Proposals(
    superpixels=stretch(superpixels, shape),
    member_bits=pack_members(membership),
    boxes=_stretch_boxes(boxes, superpixels.shape, shape),
    scores=np.linspace(1, 0, len(membership), endpoint=False, dtype=np.float32),
  )


def tight_boxes(superpixels: np.ndarray, membership: np.ndarray) -> np.ndarray:
  """Boxes around unions of superpixels.

  Args:
    superpixels: [H, W] int32, each of the ids 0 .. S-1 occurs.
    membership: [P, S] bool, no row empty.

  Returns:
    [P, 4] int32 (y0, x0, y1, x1), half-open.
  """
  corners = superpixel_boxes(superpixels)
  y0, x0 = (
    np.where(membership, low, np.iinfo(np.int32).max).min(1)
    for low in corners[:, :2].T
  )
  y1, x1 = (np.where(membership, high, 0).max(1) for high in corners[:, 2:].T)
  return np.stack([y0, x0, y1, x1], 1).astype(np.int32)


def _shrink(image: np.ndarray, max_side: int) -> np.ndarray:
  height, width = image.shape[:2]
  scale = max_side / max(height, width)
  if scale >= 1:
    return image
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def stretch(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Nearest-neighbour change of size; in an enlargement every label stays."""
  rows, columns = (
    np.arange(full) * small // full
    for full, small in zip(shape, labels.shape, strict=True)
  )
  return labels[np.ix_(rows, columns)]


def _stretch_boxes(
  boxes: np.ndarray, small: tuple[int, int], full: tuple[int, int]
) -> np.ndarray:
  """Tight boxes after `stretch`: row r begins at ceil(r * full / small)."""
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
