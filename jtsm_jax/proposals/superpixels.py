"""Image cues (gradients, colour and texture words) and superpixels.

The cues follow "gradients of soft label histograms", the idea of Pb boundary
detectors (Martin et al., 2004; Arbelaez et al., 2011) without their learning.
Constants of this file come from a prototype study on VOC 2007 and COCO
photographs or are plain round numbers; none was fitted to masks.
"""

from __future__ import annotations

import dataclasses

import cv2
import higra as hg
import numpy as np

NUM_WORDS = 20  # colour clusters and textons of one image
SAMPLE = 4096  # pixels that the clustering looks at
CLUSTER_ITERATIONS = 8
CHROMA_GAIN = 1.3  # a and b against L: hue edges matter more than shading
GRADIENT_FLOOR = 1e-4  # less is rounding: one grey level is 4e-3
CONTRAST_FLOOR = 1e-3  # a texture weaker than this is no texture


@dataclasses.dataclass(frozen=True)
class Cues:
  """What the later stages know of an image of [H, W] pixels.

  Attributes:
    lab: [H, W, 3] float32, CIE Lab: L / 100, a and b / 100 * 1.3.
    colours: [H, W] int32, colour word of each pixel, 0 .. 19.
    textons: [H, W] int32, texture word of each pixel, 0 .. 19.
    fine: [H, W] float32 >= 0, well located edges; mean 1, or all 0.
    coarse: [H, W] float32 >= 0, edges between larger patches of different
      colour or texture; mean 1, or all 0.
  """

  lab: np.ndarray
  colours: np.ndarray
  textons: np.ndarray
  fine: np.ndarray
  coarse: np.ndarray


def compute_cues(image: np.ndarray) -> Cues:
  """Computes gradients and words of `image`, [H, W, 3] uint8 RGB."""
  unit = image.astype(np.float32) / 255
  lab = cv2.cvtColor(unit, cv2.COLOR_RGB2Lab) / 100
  lab[..., 1:] *= CHROMA_GAIN

  g1, g2, g4 = (_relative(_gradient(_blur(lab, s))) for s in (1, 2, 4))
  colours = _words(_blur(lab, 1))
  textons = _words(_texture_responses(lab[..., 0]))
  colour3 = _word_gradient(colours, sigma=3, shrink=2)
  colour7 = _word_gradient(colours, sigma=7, shrink=4)
  texture = _word_gradient(textons, sigma=6, shrink=4)
  return Cues(
    lab=lab,
    colours=colours,
    textons=textons,
    fine=_relative(g1 + g2 + 0.7 * colour3),
    coarse=_relative(
      g1 + 1.5 * g2 + 0.5 * g4 + 1.4 * colour3 + 0.7 * colour7 + 0.7 * texture
    ),
  )


def make_superpixels(cues: Cues, num_superpixels: int) -> np.ndarray:
  """Cuts the image into connected superpixels.

  A watershed of the fine edges gives basins; Ward's linkage of their mean
  colours joins neighbours until `num_superpixels` are left (fewer where the
  image has fewer basins; one where it is constant).

  Args:
    cues: cues of an image of [H, W] pixels.
    num_superpixels: > 0.

  Returns:
    [H, W] int32, ids 0 .. S-1, S <= num_superpixels, each 4-connected.
  """
  shape = cues.fine.shape
  if shape[0] * shape[1] == 1:
    return np.zeros(shape, np.int32)
  grid = hg.get_4_adjacency_graph(shape)
  edges = _blur(cues.fine, 0.7).astype(np.float64)
  weights = hg.weight_graph(grid, edges, hg.WeightFunction.mean)
  basins = hg.labelisation_watershed(grid, weights).ravel()
  basins = np.unique(basins, return_inverse=True)[1]
  num_basins = int(basins.max()) + 1
  if num_basins > num_superpixels:
    sizes = np.bincount(basins)
    means = region_means(basins, cues.lab.reshape(-1, 3), sizes)
    pairs = neighbour_pairs(basins.reshape(shape))[0]
    graph = hg.UndirectedGraph(num_basins)
    graph.add_edges(pairs[:, 0], pairs[:, 1])
    tree, _ = hg.binary_partition_tree_ward_linkage(
      graph, means, sizes.astype(np.float64), "none"
    )
    basins = cut_tree(tree.parents(), num_superpixels)[basins]
  return basins.reshape(shape).astype(np.int32)


def cut_tree(parents: np.ndarray, num_regions: int) -> np.ndarray:
  """Labels the leaves of a binary merge tree when `num_regions` are left.

  Args:
    parents: [2n-1] int, parent of each node, the root its own; leaves first,
      then the merges in their order.
    num_regions: 1 .. n.

  Returns:
    [n] int, the region of each leaf, 0 .. num_regions-1.
  """
  num_nodes = len(parents)
  first_undone = num_nodes - (num_regions - 1)
  top = np.where(parents < first_undone, parents, np.arange(num_nodes))
  while True:  # pointer jumping: log2(depth) rounds
    higher = top[top]
    if np.array_equal(higher, top):
      break
    top = higher
  leaves = (num_nodes + 1) // 2
  return np.unique(top[:leaves], return_inverse=True)[1]


def neighbour_pairs(labels: np.ndarray) -> tuple[np.ndarray, ...]:
  """Pairs of 4-adjacent regions.

  Args:
    labels: [H, W] int, region ids 0 .. S-1.

  Returns:
    pairs: [E, 2] int64, i < j, sorted, each once.
    index: [N] int64, position in `pairs` of each pixel pair that crosses from
      one region to another.
    first, second: [N] int64, the flat indices of the two pixels of each.
  """
  flat = np.arange(labels.size).reshape(labels.shape)
  first = np.concatenate([flat[:, :-1].ravel(), flat[:-1].ravel()])
  second = np.concatenate([flat[:, 1:].ravel(), flat[1:].ravel()])
  a, b = labels.ravel()[first], labels.ravel()[second]
  crosses = a != b
  first, second, a, b = (v[crosses] for v in (first, second, a, b))
  count = int(labels.max()) + 1
  code = np.minimum(a, b).astype(np.int64) * count + np.maximum(a, b)
  code, index = np.unique(code, return_inverse=True)
  return np.stack([code // count, code % count], 1), index, first, second


def region_means(
  labels: np.ndarray, values: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
  """Mean of `values` [N, C] in each of the regions `labels` [N]: [S, C]."""
  sums = [np.bincount(labels, v, len(sizes)) for v in values.T]
  return np.stack(sums, 1) / sizes[:, None]


def _blur(values: np.ndarray, sigma: float) -> np.ndarray:
  return cv2.GaussianBlur(
    values, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE
  )


def _relative(strength: np.ndarray) -> np.ndarray:
  mean = float(strength.mean())
  return strength / mean if mean > 0 else strength


def _gradient(values: np.ndarray) -> np.ndarray:
  """Di Zenzo's gradient of [H, W, C]: the largest rate of change, [H, W]."""
  if values.ndim == 2:
    values = values[..., None]
  padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
  dy = padded[2:, 1:-1] - padded[:-2, 1:-1]
  dx = padded[1:-1, 2:] - padded[1:-1, :-2]
  yy, xx, xy = (
    np.einsum("ijk,ijk->ij", p, q) for p, q in ((dy, dy), (dx, dx), (dy, dx))
  )
  largest = 0.5 * (yy + xx + np.sqrt((yy - xx) ** 2 + 4 * xy**2))
  strength = np.sqrt(largest)
  return np.where(strength > GRADIENT_FLOOR, strength, 0)


def _texture_responses(light: np.ndarray) -> np.ndarray:
  """Seven filters on the lightness [H, W]: [H, W, 7] float32.

  First derivatives and Laplacian at two scales, and a broad centre-surround.
  """
  responses = []
  for sigma in (1.0, 2.0):
    smooth = _blur(light, sigma)
    scale = sigma  # scale-normalised derivatives
    for dx, dy in ((1, 0), (0, 1)):
      responses.append(
        cv2.Sobel(smooth, -1, dx, dy, borderType=cv2.BORDER_REPLICATE)
        * (scale / 8)
      )
    responses.append(
      cv2.Laplacian(smooth, -1, borderType=cv2.BORDER_REPLICATE) * scale**2
    )
  responses.append(_blur(light, 3) - _blur(light, 6))
  stack = np.stack(responses, -1)
  stack = stack / (stack.std((0, 1)) + CONTRAST_FLOOR)
  norm = np.linalg.norm(stack, axis=-1, keepdims=True)
  return stack * (
    np.log1p(norm) / np.maximum(norm, CONTRAST_FLOOR)
  )  # damp strong contrast


def _words(features: np.ndarray) -> np.ndarray:
  """Clusters [H, W, C] float32 within the image: [H, W] int32 word ids."""
  points = features.reshape(-1, features.shape[-1])
  step = max(1, len(points) // SAMPLE)
  sample = points[::step]
  centres = _spread_centres(sample)
  for _ in range(CLUSTER_ITERATIONS):
    nearest = _nearest(sample, centres)
    sizes = np.bincount(nearest, minlength=len(centres))
    means = region_means(nearest, sample, np.maximum(sizes, 1))
    centres = np.where(sizes[:, None] > 0, means, centres).astype(np.float32)
  return _nearest(points, centres).reshape(features.shape[:2]).astype(np.int32)


def _spread_centres(sample: np.ndarray) -> np.ndarray:
  """k-means++ seeding with a fixed seed: the result must be repeatable."""
  rng = np.random.default_rng(0)
  chosen = [sample[0]]
  distance = np.full(len(sample), np.inf)
  for _ in range(NUM_WORDS - 1):
    distance = np.minimum(distance, ((sample - chosen[-1]) ** 2).sum(1))
    distance[distance < GRADIENT_FLOOR**2] = 0  # rounding makes no new word
    cumulative = np.cumsum(distance)
    if cumulative[-1] <= 0:  # fewer distinct values than words
      break
    pick = np.searchsorted(cumulative, rng.random() * cumulative[-1])
    chosen.append(sample[min(pick, len(sample) - 1)])
  return np.stack(chosen)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
  return np.argmin((centres**2).sum(1) - 2 * points @ centres.T, axis=1)


def _word_gradient(
  words: np.ndarray, *, sigma: float, shrink: int
) -> np.ndarray:
  """Hellinger gradient: how fast the local mix of words changes, [H, W].

  Works on an image `shrink` times smaller; `sigma` is in full-size pixels.
  """
  height, width = words.shape
  small = (-(-width // shrink), -(-height // shrink))
  mix = np.stack(
    [
      cv2.resize(
        (words == word).astype(np.float32), small, interpolation=cv2.INTER_AREA
      )
      for word in range(int(words.max()) + 1)
    ],
    -1,
  )
  mix = np.concatenate(  # OpenCV blurs at most four channels at once fast
    [
      np.atleast_3d(
        _blur(np.ascontiguousarray(mix[..., c : c + 4]), sigma / shrink)
      )
      for c in range(0, mix.shape[-1], 4)
    ],
    -1,
  )
  strength = _gradient(np.sqrt(np.maximum(mix, 0)))
  strength = cv2.resize(
    strength, (width, height), interpolation=cv2.INTER_LINEAR
  )
  return _relative(strength)
