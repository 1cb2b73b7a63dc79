"""Features of a frozen backbone, computed once and kept on disk.

With all stages frozen, the features of an image on a canvas never change: the
training step starts at the pooling, and an epoch on a CPU costs seconds.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import numpy as np

from jtsm_jax.types import Batch

DTYPE = np.float16


class FeatureCache:
  """Feature maps by (canvas, image, flip), in one file per canvas.

  Safe to delete at any time between runs. A file that was interrupted holds
  whole rows only where its marks say so.

  Attributes:
    directory: the folder; its name carries the hash of the weights, so that
      other weights never meet these files.
  """

  def __init__(self, directory: pathlib.Path, *, num_images: int):
    """Opens the cache of `num_images` images, making `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    self.directory = directory
    self._num_images = num_images
    self._files: dict[str, tuple[np.memmap, np.memmap]] = {}

  def attach(
    self, batch: Batch, extract: Callable[[np.ndarray], jax.Array]
  ) -> Batch:
    """Replaces the images of a batch by their features.

    Args:
      batch: with images, on the host.
      extract: from uint8 images [B, H, W, 3] to features [B, Hf, Wf, C]; called
        only if one of the images is not in the cache.

    Returns:
      The batch with features and without images.
    """
    height, width = batch.images.shape[1:3]
    name = f"{height}x{width}"
    # Padding examples share the row of image 0 without being written.
    real = batch.image_index >= 0
    rows = 2 * np.where(real, batch.image_index, 0) + batch.flip
    if name not in self._files:
      shape = jax.eval_shape(extract, batch.images).shape[1:]
      self._files[name] = self._open(name, shape)
    maps, marks = self._files[name]
    if not marks[rows[real]].all():
      features = np.asarray(extract(batch.images)).astype(DTYPE)
      maps[rows[real]] = features[real]
      marks[rows[real]] = 1
    # Read back what was written: the first epoch sees what later ones see.
    features = np.where(
      real[:, None, None, None], maps[rows], np.zeros((), DTYPE)
    )
    return batch.replace(images=None, features=features)

  def _open(self, name, shape):
    def file(suffix, dtype, shape):
      path = self.directory / f"{name}{suffix}"
      rows = 2 * self._num_images
      size = rows * int(np.prod(shape)) * np.dtype(dtype).itemsize
      exists = path.exists() and path.stat().st_size == size
      mode = "r+" if exists else "w+"
      return np.memmap(path, dtype, mode, shape=(rows, *shape))

    return file(".f16", DTYPE, shape), file(".marks", np.uint8, ())


def cache_bytes(
  num_images: int,
  canvases: tuple[tuple[int, int], ...],
  stride: int,
  channels: int,
) -> int:
  """Size on disk of a full cache."""
  cells = sum((h // stride) * (w // stride) for h, w in canvases)
  return 2 * num_images * cells * channels * DTYPE().itemsize
