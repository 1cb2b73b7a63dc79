"""Data sets that are moved into a bucket."""

import dataclasses

import numpy as np


def upload(folder, bucket):
  """Copies a folder into a bucket past what is tested: its URL."""
  place = bucket / folder.name
  bucket.fs.put(str(folder), place.path, recursive=True)
  return place


def plain(source):
  """All that a source gives, in values that can be compared."""

  def value(x):
    if isinstance(x, np.ndarray):
      return x.tolist(), str(x.dtype)
    if dataclasses.is_dataclass(x):
      return {f.name: value(getattr(x, f.name)) for f in dataclasses.fields(x)}
    return x

  records = {k: [value(r) for r in v] for k, v in source.splits.items()}
  return source.name, source.categories, records
