"""Features of a frozen backbone, computed once and kept on disk.

With all stages frozen, the features of an image on a canvas never change: the
training step starts at the pooling, and an epoch on a CPU costs seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtsm_jax import locks
from jtsm_jax.backbones.pretrained import weights_hash
from jtsm_jax.data.pipeline import images_on_canvas
from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.data.sampling import BatchPlan
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.types import Batch, InputError

DTYPE = np.dtype(np.float16)


class FeatureCache:
  """Feature maps of one split by (canvas, image, flip), a file per canvas.

  Images are read only where their features are missing: batches need none.
  Safe to delete at any time between runs. The folder's name carries the hash of
  what the features depend on, so that other weights never meet these files. A
  file that was interrupted holds whole rows only where its marks say so; they
  reach the disk after the rows. All of its room is taken when it is opened:
  writing to a memory map on a full disk would kill the process.
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
      source: the split; rows of the files are its images.
      split: its name.

    Raises:
      InputError: `root` cannot be written.
    """
    # A copy: the training step gives the memory of its state back.
    used = {
      name: jax.tree.map(jnp.copy, {"extractor": tree["extractor"]})
      for name, tree in variables.items()
      if "extractor" in tree
    }
    weights = weights_hash(jax.device_get(used))
    settings = hashlib.sha256(repr(_settings(model.extractor)).encode())
    self._folder = root / (
      f"{weights[:16]}-{settings.hexdigest()[:8]}-{source.fingerprint}"
    )
    with _disk_faults(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
    self._split = split
    self._source = source
    self._files: dict[str, tuple[np.memmap, np.memmap]] = {}
    extract = jax.jit(
      lambda variables, images: model.apply(variables, images, method="extract")
    )
    self._extract: Callable[[np.ndarray], jax.Array] = lambda images: extract(
      used, images
    )

  def attach(self, batch: Batch) -> Batch:
    """Gives a host batch its features in place of images.

    Features that are not in the cache are computed and written to it.

    Raises:
      InputError: float16 is too narrow for a feature, or a file is at fault.
    """
    canvas = batch.superpixels.shape[1:]
    name = f"{self._split}-{canvas[0]}x{canvas[1]}"
    # Padding examples share the row of image 0 without being written.
    real = batch.image_index >= 0
    rows = 2 * np.where(real, batch.image_index, 0) + batch.flip
    if name not in self._files:
      image = jax.ShapeDtypeStruct((1, *canvas, 3), np.uint8)
      shape = jax.eval_shape(self._extract, image).shape[1:]
      self._files[name] = self._open(name, shape)
    maps, marks = self._files[name]
    missing = np.flatnonzero(real & (marks[rows] == 0))
    for i in missing:
      plan = BatchPlan(
        canvas, batch.image_index[[i]], batch.flip[[i]], batch.window[[i]]
      )
      image = images_on_canvas(plan, self._source)
      found = np.asarray(self._extract(image)[0])
      with np.errstate(over="ignore"):  # told here
        kept = found.astype(DTYPE)
      if not np.isfinite(kept).all():
        image_id = self._source.image_ids[batch.image_index[i]]
        raise InputError(
          f"{self._folder}: the largest feature of {image_id!r} is "
          f"{np.abs(found).max():g}, and the cache holds numbers up to "
          f"{np.finfo(DTYPE).max:.0f}; a new run can do without it "
          "(--config.backbone.cache=False)"
        )
      maps[rows[i]] = kept
    if len(missing):
      maps.flush()  # a mark must not outlive a crash that its row does not
      marks[rows[missing]] = 1
    # Read back what was written: the first epoch sees what later ones see.
    features = np.where(real[:, None, None, None], maps[rows], DTYPE.type(0))
    return batch.replace(images=None, features=features)

  def _open(self, name, shape):
    rows = 2 * len(self._source)
    files = (
      (self._folder / f"{name}.f16", DTYPE, (rows, *shape)),
      (self._folder / f"{name}.marks", np.dtype(np.uint8), (rows,)),
    )
    with (
      _disk_faults(self._folder),
      # Another run with the same folder may have mapped what is made here.
      locks.exclusive(self._folder / f"{name}.lock"),
    ):
      # Marks without their maps would vouch for zeros: both are whole, or new.
      whole = all(
        path.exists()
        and path.stat().st_size == int(np.prod(shape)) * dtype.itemsize
        for path, dtype, shape in files
      )
      try:
        for path, dtype, shape in files:
          _take_room(path, int(np.prod(shape)) * dtype.itemsize, keep=whole)
      except OSError:
        for path, *_ in files if not whole else ():
          path.unlink(missing_ok=True)
        raise
      return tuple(
        np.memmap(path, dtype, "r+", shape=shape)
        for path, dtype, shape in files
      )


def _settings(module: Any) -> Any:
  """What a module computes with besides its weights, with a stable repr."""
  if dataclasses.is_dataclass(module):
    fields = (f.name for f in dataclasses.fields(module))
    return type(module).__name__, *(
      (name, _settings(getattr(module, name)))
      for name in fields
      if name not in ("parent", "name")
    )
  return module.__qualname__ if callable(module) else module


def _take_room(path: pathlib.Path, size: int, *, keep: bool) -> None:
  """Makes a file of zeros, or keeps it, with all of its blocks on the disk."""
  with path.open("r+b" if keep else "wb") as file:
    file.truncate(size)
    try:
      os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:
      pass  # macOS
    except OSError as error:
      if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
        raise


@contextlib.contextmanager
def _disk_faults(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise InputError(
      f"{folder}: features cannot be kept ({error.strerror}). Free some space, "
      "or choose another folder with --config.backbone.cache_dir; a new run "
      "can do without (--config.backbone.cache=False)"
    ) from error


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
