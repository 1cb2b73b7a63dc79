"""Features of a frozen backbone, computed once and kept on disk.

With all stages frozen, the features of an image on a canvas never change: the
training step starts at the pooling, and an epoch on a CPU costs seconds.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.models.pretrained import weights_hash
from jtsm_jax.types import Batch

DTYPE = np.dtype(np.float16)


class FeatureCache:
  """Feature maps of one split by (canvas, image, flip), a file per canvas.

  Safe to delete at any time between runs. The folder's name carries the hash of
  what the features depend on, so that other weights never meet these files. A
  file that was interrupted holds whole rows only where its marks say so.
  """

  def __init__(
    self,
    root: pathlib.Path,
    *,
    model: JTSM,
    variables: Any,
    source: RecordSource,
    split: str,
  ):
    """Opens or makes the cache.

    Args:
      root: folder of all caches of a run.
      model: its extractor must be frozen.
      variables: what `model.apply` takes.
      source: the split; images are told apart by their position in it.
      split: its name.
    """
    # A copy: the training step gives the memory of its state back.
    used = {
      name: jax.tree.map(jnp.copy, {"extractor": tree["extractor"]})
      for name, tree in variables.items()
      if "extractor" in tree
    }
    weights = weights_hash(jax.device_get(used))
    self._folder = root / f"{weights[:16]}-{_fingerprint(source)}"
    self._folder.mkdir(parents=True, exist_ok=True)
    self._split = split
    self._num_images = len(source)
    self._files: dict[str, tuple[np.memmap, np.memmap]] = {}
    extract = jax.jit(
      lambda variables, images: model.apply(variables, images, method="extract")
    )
    self._extract: Callable[[np.ndarray], jax.Array] = lambda images: extract(
      used, images
    )

  def attach(self, batch: Batch) -> Batch:
    """Replaces the images of a host batch by their features.

    Features that are not in the cache are computed and written to it.
    """
    height, width = batch.images.shape[1:3]
    name = f"{self._split}-{height}x{width}"
    # Padding examples share the row of image 0 without being written.
    real = batch.image_index >= 0
    rows = 2 * np.where(real, batch.image_index, 0) + batch.flip
    if name not in self._files:
      shape = jax.eval_shape(self._extract, batch.images).shape[1:]
      self._files[name] = self._open(name, shape)
    maps, marks = self._files[name]
    for i in np.flatnonzero(real & (marks[rows] == 0)):
      maps[rows[i]] = np.asarray(self._extract(batch.images[i : i + 1])[0])
      marks[rows[i]] = 1
    # Read back what was written: the first epoch sees what later ones see.
    features = np.where(real[:, None, None, None], maps[rows], DTYPE.type(0))
    return batch.replace(images=None, features=features)

  def _open(self, name, shape):
    rows = 2 * self._num_images
    files = (
      (self._folder / f"{name}.f16", DTYPE, (rows, *shape)),
      (self._folder / f"{name}.marks", np.dtype(np.uint8), (rows,)),
    )
    # Marks without their maps would vouch for zeros: both are whole, or new.
    whole = all(
      path.exists()
      and path.stat().st_size == int(np.prod(shape)) * dtype.itemsize
      for path, dtype, shape in files
    )
    return tuple(
      np.memmap(path, dtype, "r+" if whole else "w+", shape=shape)
      for path, dtype, shape in files
    )


def _fingerprint(source: RecordSource) -> str:
  """Tells data sets apart that share a folder and have equal names."""
  digest = hashlib.sha256("\n".join(source.image_ids).encode())
  for index in (0, len(source) - 1):
    digest.update(source[index].image)
  return digest.hexdigest()[:8]


def cache_bytes(
  model: JTSM,
  variables: Any,
  *,
  canvases: tuple[tuple[int, int], ...],
  num_images: int,
) -> int:
  """Size on disk of a full cache."""
  total = 0
  for height, width in canvases:
    image = jax.ShapeDtypeStruct((1, height, width, 3), np.uint8)
    features = jax.eval_shape(
      lambda variables, image: model.apply(variables, image, method="extract"),
      variables,
      image,
    )
    total += 2 * num_images * features.size * DTYPE.itemsize
  return total
