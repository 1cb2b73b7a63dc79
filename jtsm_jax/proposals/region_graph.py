"""The graph of touching superpixels, with what is known of both."""

from __future__ import annotations

import dataclasses

import numpy as np

from jtsm_jax.proposals.cues import NUM_WORDS, Cues, region_means, relative
from jtsm_jax.proposals.deep_features import DeepFeatures
from jtsm_jax.proposals.superpixels import neighbour_pairs


@dataclasses.dataclass(frozen=True)
class RegionGraph:
  """S superpixels of an image and the E pairs of them that touch.

  Attributes:
    shape: (H, W) of the image.
    sizes: [S] float64, pixels.
    boxes: [S, 4] int32, (y0, x0, y1, x1), half-open.
    lab: [S, 3] float64, mean colour.
    colour_mix: [S, 20] float64, square roots of the colour word histogram.
    texton_mix: [S, 20] float64, square roots of the texton histogram.
    deep: features of an ImageNet classifier, or None.
    pairs: [E, 2] int64, i < j, sorted.
    length: [E] float64, pixel pairs along the common boundary.
    fine: [E] float64 >= 0, mean strength of the fine edges along it.
    strength: [E] float64 >= 0, edges and differences of colour and texture
      combined; mean 1, or all 0.
  """

  shape: tuple[int, int]
  sizes: np.ndarray
  boxes: np.ndarray
  lab: np.ndarray
  colour_mix: np.ndarray
  texton_mix: np.ndarray
  deep: DeepFeatures | None
  pairs: np.ndarray
  length: np.ndarray
  fine: np.ndarray
  strength: np.ndarray


def build_region_graph(
  superpixels: np.ndarray, cues: Cues, deep: DeepFeatures | None = None
) -> RegionGraph:
  """Collects the statistics of `superpixels`, [H, W] int32 ids 0 .. S-1."""
  labels = superpixels.ravel()
  sizes = np.bincount(labels).astype(np.float64)
  pairs, index, first, second = neighbour_pairs(superpixels)
  length = np.bincount(index, minlength=len(pairs)).astype(np.float64)

  def along_boundary(edges: np.ndarray) -> np.ndarray:
    flat = edges.ravel()
    crossing = (flat[first] + flat[second]) / 2
    return np.bincount(index, crossing, len(pairs)) / np.maximum(length, 1)

  def word_mix(words: np.ndarray) -> np.ndarray:
    code = labels.astype(np.int64) * NUM_WORDS + words.ravel()
    counts = np.bincount(code, minlength=len(sizes) * NUM_WORDS)
    return np.sqrt(counts.reshape(-1, NUM_WORDS) / sizes[:, None])

  lab = region_means(labels, cues.lab.reshape(-1, 3), sizes)
  colour_mix, texton_mix = word_mix(cues.colours), word_mix(cues.textons)
  strength = relative(
    relative(along_boundary(cues.coarse))
    + 0.25 * relative(distance(colour_mix, pairs))
    + 0.15 * relative(distance(texton_mix, pairs))
    + 0.15 * relative(distance(lab, pairs))
  )
  return RegionGraph(
    shape=superpixels.shape,
    sizes=sizes,
    boxes=superpixel_boxes(superpixels),
    lab=lab,
    colour_mix=colour_mix,
    texton_mix=texton_mix,
    deep=deep,
    pairs=pairs,
    length=length,
    fine=along_boundary(cues.fine),
    strength=strength,
  )


def superpixel_boxes(superpixels: np.ndarray) -> np.ndarray:
  """Tight boxes of the superpixels.

  Args:
    superpixels: [H, W] int32, each of the ids 0 .. S-1 occurs.

  Returns:
    [S, 4] int32 (y0, x0, y1, x1), half-open.
  """
  labels = superpixels.ravel()
  order = np.argsort(labels, kind="stable")
  start = np.searchsorted(labels[order], np.arange(labels.max() + 1))
  y, x = np.divmod(order, superpixels.shape[1])
  bounds = [np.minimum.reduceat(v, start) for v in (y, x)]
  bounds += [np.maximum.reduceat(v, start) + 1 for v in (y, x)]
  return np.stack(bounds, 1).astype(np.int32)


def distance(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Euclidean distance of the features [S, C] of each pair, [E]."""
  return np.linalg.norm(features[pairs[:, 0]] - features[pairs[:, 1]], axis=1)
