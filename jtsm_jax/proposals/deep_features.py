"""Features of an ImageNet classifier for the superpixels of an image.

EfficientNet-Lite0 has learned from image tags alone, so these features bring
no mask supervision. They know what colour and texture do not: that a face and
a shirt belong together. The network runs on the CPU wherever there is a choice,
so that proposals do not depend on the accelerator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import cv2
import jax
import numpy as np

from jtsm_jax.backbones import efficientnet_lite, pretrained
from jtsm_jax.types import InputError

CANVAS = 640  # pixels; the longest side of the image is brought to it
STAGES = dict(stage3=8, stage5=16, stage7=16)  # and their strides
SAMPLES = 6  # pixels of a superpixel whose features are averaged


@dataclasses.dataclass(frozen=True)
class DeepFeatures:
  """Features of S superpixels, each stage centred and of unit mean square.

  Attributes:
    part: [S, 40] float64, stage 3, of stride 8.
    object: [S, 112] float64, stage 5, of stride 16.
    scene: [S, 320] float64, stage 7, of stride 16 with large context.
    activity: [S] float64 >= 0, norm of stage 7, relative to the mean of the
      image: the classifier looks at objects.
  """

  part: np.ndarray
  object: np.ndarray
  scene: np.ndarray
  activity: np.ndarray

  @property
  def part_and_object(self) -> np.ndarray:
    """[S, 152] float64, both side by side."""
    return np.concatenate([self.part, self.object], axis=1)


def deep_features(image: np.ndarray, superpixels: np.ndarray) -> DeepFeatures:
  """Features of each superpixel.

  Args:
    image: [H, W, 3] uint8 RGB.
    superpixels: [H, W] int32, each of the ids 0 .. S-1 occurs.

  Raises:
    InputError: the weights are not installed, or jax may not use the CPU.
  """
  maps, scale = _run_network(image)
  pixels = _some_pixels(superpixels)
  part, objects, scene = (
    _sample(maps[name], pixels, scale / stride)
    for name, stride in STAGES.items()
  )
  activity = np.linalg.norm(scene, axis=1)
  return DeepFeatures(
    part=standardise(part),
    object=standardise(objects),
    scene=standardise(scene),
    activity=activity / max(activity.mean(), 1e-9),
  )


def standardise(features: np.ndarray) -> np.ndarray:
  """Centres [S, C] and brings its mean squared norm to 1 (or 0)."""
  centred = features.astype(np.float64) - features.mean(0)
  scale = np.sqrt((centred**2).sum(1).mean())
  return centred / max(scale, 1e-9)


def _run_network(image: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
  """Maps [h, w, C] of the canvas, and canvas pixels per image pixel."""
  height, width = image.shape[:2]
  scale = CANVAS / max(height, width)
  size = max(1, round(width * scale)), max(1, round(height * scale))
  method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
  small = cv2.resize(image, size, interpolation=method)
  canvas = np.zeros((1, CANVAS, CANVAS, 3), np.float32)
  canvas[0, : size[1], : size[0]] = efficientnet_lite.normalise(small)
  maps = jax.device_get(_network()(canvas))
  return {name: values[0] for name, values in maps.items()}, scale


@functools.cache
def _network() -> Callable[[np.ndarray], dict[str, jax.Array]]:
  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise InputError(
      f"proposals run an ImageNet network on the CPU, which jax may not use:"
      f' {error}. Add "cpu" to JAX_PLATFORMS (as in "cuda,cpu"), or choose the'
      ' preset "fast".'
    ) from error
  network = efficientnet_lite.EfficientNetLite0(output_stride=16)
  variables = jax.device_put(pretrained.load_efficientnet_lite0(), device)

  @jax.jit
  def run(variables, canvas):
    features = network.apply(variables, canvas)
    return {name: features[name] for name in STAGES}

  return lambda canvas: run(variables, jax.device_put(canvas, device))


def _some_pixels(superpixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows and columns of a few pixels of each superpixel, [S, SAMPLES] each."""
  flat = superpixels.ravel()
  order = np.argsort(flat, kind="stable")
  sizes = np.bincount(flat)
  start = np.cumsum(sizes) - sizes
  share = (np.arange(SAMPLES) + 0.5) / SAMPLES
  chosen = order[start[:, None] + (share * sizes[:, None]).astype(np.int64)]
  return np.divmod(chosen, superpixels.shape[1])


def _sample(
  features: np.ndarray, pixels: tuple[np.ndarray, np.ndarray], scale: float
) -> np.ndarray:
  """Mean over the pixels of each superpixel, bilinear: [S, C] float32.

  Args:
    features: [h, w, C].
    pixels: [S, N] rows and columns in the image.
    scale: cells of `features` per pixel of the image.
  """
  low, weight = [], []
  for pixel, size in zip(pixels, features.shape, strict=False):
    position = (pixel + 0.5) * scale - 0.5
    position = np.clip(position, 0, size - 1)
    cell = np.minimum(position.astype(np.int64), size - 2)
    low.append(cell)
    weight.append((position - cell).astype(np.float32)[..., None])
  (y, x), (v, u) = low, weight
  values = (features[y, x] * (1 - u) + features[y, x + 1] * u) * (1 - v)
  values += (features[y + 1, x] * (1 - u) + features[y + 1, x + 1] * u) * v
  return values.mean(1)
