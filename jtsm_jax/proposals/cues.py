"""Cues of an image: gradients, colour words and texture words.

The cues follow "gradients of soft label histograms", the idea of Pb boundary
detectors (Martin et al., 2004; Arbelaez et al., 2011) without their learning.
Constants of this file come from a prototype study on VOC 2007 and COCO
photographs or are plain round numbers; none was fitted to masks.
"""

from __future__ import annotations

import dataclasses

import cv2
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

  g1, g2, g4 = (relative(_gradient(blur(lab, s))) for s in (1, 2, 4))
  colours = _words(blur(lab, 1))
  textons = _words(_texture_responses(lab[..., 0]))
  colour3 = _word_gradient(colours, sigma=3, shrink=2)
  colour7 = _word_gradient(colours, sigma=7, shrink=4)
  texture = _word_gradient(textons, sigma=6, shrink=4)
  return Cues(
    lab=lab,
    colours=colours,
    textons=textons,
    fine=relative(g1 + g2 + 0.7 * colour3),
    coarse=relative(
      g1 + 1.5 * g2 + 0.5 * g4 + 1.4 * colour3 + 0.7 * colour7 + 0.7 * texture
    ),
  )


def region_means(
  labels: np.ndarray, values: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
  """Mean of `values` [N, C] in each of the regions `labels` [N]: [S, C]."""
  sums = [np.bincount(labels, v, len(sizes)) for v in values.T]
  return np.stack(sums, 1) / sizes[:, None]


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
  """Gaussian blur of [H, W] or [H, W, C]."""
  return cv2.GaussianBlur(
    values, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE
  )


def relative(values: np.ndarray) -> np.ndarray:
  """Values >= 0 over their mean; zeros where there is none."""
  mean = values.mean() if values.size else 0.0
  return values / mean if mean > 1e-9 else np.zeros_like(values)


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
    smooth = blur(light, sigma)
    scale = sigma  # scale-normalised derivatives
    for dx, dy in ((1, 0), (0, 1)):
      responses.append(
        cv2.Sobel(smooth, -1, dx, dy, borderType=cv2.BORDER_REPLICATE)
        * (scale / 8)
      )
    responses.append(
      cv2.Laplacian(smooth, -1, borderType=cv2.BORDER_REPLICATE) * scale**2
    )
  responses.append(blur(light, 3) - blur(light, 6))
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
        blur(np.ascontiguousarray(mix[..., c : c + 4]), sigma / shrink)
      )
      for c in range(0, mix.shape[-1], 4)
    ],
    -1,
  )
  strength = _gradient(np.sqrt(np.maximum(mix, 0)))
  strength = cv2.resize(
    strength, (width, height), interpolation=cv2.INTER_LINEAR
  )
  return relative(strength)
