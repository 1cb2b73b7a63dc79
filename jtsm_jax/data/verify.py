"""Reads a prepared data set again, all of it, and names what is wrong."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from jtsm_jax.console import progress
from jtsm_jax.data.files import PathOrUrl
from jtsm_jax.data.prepared import PreparedData, RecordSource, open_prepared
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import VOID, InputError
from jtsm_jax.workers import available_cores


def verify(directory: PathOrUrl) -> list[str]:
  """Checks every record: hash, size, tags, masks, ids, areas, classes.

  Args:
    directory: that `prepare` has written.

  Returns:
    One line for each bad record, "SPLIT/IMAGE_ID: what is wrong"; empty for a
    sound data set.

  Raises:
    InputError: there is no prepared data set, or an index is damaged.
  """
  data = open_prepared(directory)
  total = sum(map(len, data.splits.values()))
  with (
    progress(None, "verify", total=total, unit="image") as bar,
    concurrent.futures.ThreadPoolExecutor(available_cores()) as pool,
  ):
    found = []
    for name, split in data.splits.items():
      check = functools.partial(_faults, data, split)
      for i, faults in enumerate(pool.map(check, range(len(split)))):
        bar.update()
        found += [f"{name}/{split.image_ids[i]}: {fault}" for fault in faults]
  return found


def _faults(data: PreparedData, split: RecordSource, i: int) -> list[str]:
  try:
    return [*_image_faults(split, i), *_target_faults(data, split, i)]
  except InputError as error:
    return [str(error)]
  except Exception as error:  # ArrayRecord and TFDS raise many kinds.
    return [f"cannot be read ({type(error).__name__}: {error})"]


def _image_faults(split: RecordSource, i: int) -> Iterator[str]:
  record = split[i]
  if hashlib.sha256(record.image).hexdigest() != split.digests[i]:
    yield "the image is not the one that was prepared (its hash differs)"
  size = decode_image(record.image, name=record.image_id).shape[:2]
  if size != (record.height, record.width):
    yield f"the image is {size}, the index says {record.height, record.width}"
  tags = tuple(np.flatnonzero(split.tags[i]).tolist())
  if record.tags != tags:
    yield f"the tags are {record.tags}, the index says {tags}"


def _target_faults(
  data: PreparedData, split: RecordSource, i: int
) -> Iterator[str]:
  size = tuple(split.sizes[i].tolist())
  target = split.target(i)
  if target is not None:
    if target.ids.shape != size:
      yield f"the masks are {target.ids.shape}, the image is {size}"
    ids, areas = np.unique(target.ids, return_counts=True)
    counted = dict(zip(ids.tolist(), areas.tolist(), strict=True))
    counted.pop(VOID, None)
    listed = {s.id: s.area for s in target.segments}
    if listed != counted:
      yield f"segments have the areas {counted}, {listed} are listed"
    for segment in target.segments:
      if not 0 <= segment.category < len(data.categories):
        yield f"segment {segment.id} has the unknown class {segment.category}"
  instances = split.instances(i)
  if instances is not None:
    count = len(instances.category)
    lengths = {
      len(v) for v in (instances.boxes, instances.area, instances.is_crowd)
    }
    if lengths != {count} or len(instances.rles) not in (0, count):
      yield f"{count} instances have other numbers of boxes or masks"
    low, high = instances.boxes[:, :2], instances.boxes[:, 2:]
    # COCO's boxes are rounded and may end a hundredth outside.
    if (low < -1).any() or (high > np.add(size, 1)).any() or (high < low).any():
      yield f"boxes leave the image of {size}: {instances.boxes.tolist()}"
