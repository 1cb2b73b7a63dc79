"""Proposals on disk: written once, safely, and read at random.

A store is a folder:

    settings.json                        what made it
    proposals-0000-00000.array_record    up to 64 images each; the first number
                                         is that of the writer, see `fill_store`
    quarantine-0000.txt                  images that got none in the last run

A file is renamed, or uploaded into a bucket, when it is complete, so every file
with the final name is whole. Its records are images in the form of
`record_format`; the last one lists their ids.
"""

from __future__ import annotations

import collections
import fnmatch
import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

from array_record.python import array_record_module

from jtsm_jax.data.array_records import record_writer
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  fetch_all,
  is_file,
  names_in,
  read_file,
  write_file,
)
from jtsm_jax.proposals import record_format
from jtsm_jax.types import InputError, Proposals

FORMAT = "3"  # of the folder and its records
MAX_OPEN_SHARDS = 64  # well below the usual limit of 1024 open files
REMEDY = "delete the folder and propose again"


class ProposalStore:
  """Random access to the proposals of a store. May be shared by threads.

  Can be pickled (data loaders send it to their processes): a copy opens the
  files anew. Files in a bucket are copied to this machine at the beginning.
  """

  def __init__(self, path: PathOrUrl):
    self.path = data_path(path)
    self._places = image_places(fetch_all(shard_paths(self.path)))
    self._readers: collections.OrderedDict = collections.OrderedDict()
    self._lock = threading.Lock()

  @property
  def ids(self) -> tuple[str, ...]:
    """Image ids in the order of the files."""
    return tuple(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def __contains__(self, image_id: str) -> bool:
    return image_id in self._places

  def get(self, image_id: str) -> Proposals:
    """The proposals of an image.

    Raises:
      InputError: the store has none, or its record is damaged.
    """
    if image_id not in self._places:
      raise InputError(
        f"proposal store {self.path}: no proposals for image {image_id!r}"
        " (quarantine-*.txt there tells of images without any); propose again."
      )
    shard, index = self._places[image_id]
    try:
      record = self._reader(shard).read([index])[0]
      found, proposals = record_format.decode_proposals(record)
      if found != image_id:
        raise ValueError(f"the record belongs to image {found!r}")
    except (ValueError, IndexError, RuntimeError, OSError) as error:
      raise InputError(
        f"proposal store {shard}: the record of image {image_id!r} is damaged:"
        f" {error}; {REMEDY}."
      ) from error
    return proposals

  def close(self) -> None:
    """Closes the files; `get` opens them again."""
    with self._lock:
      self._readers.clear()

  def __enter__(self) -> ProposalStore:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __getstate__(self) -> dict:
    return {"path": self.path, "_places": self._places}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    self._readers = collections.OrderedDict()
    self._lock = threading.Lock()

  def _reader(self, shard: pathlib.Path):
    with self._lock:
      if shard not in self._readers:
        self._readers[shard] = _open_shard(shard)
        if len(self._readers) > MAX_OPEN_SHARDS:
          self._readers.popitem(last=False)
      self._readers.move_to_end(shard)
      return self._readers[shard]


def open_store(path: PathOrUrl) -> ProposalStore:
  """Opens a store for reading.

  Raises:
    InputError: there is no store, it is empty, a file is damaged, or another
      version of the program made it.
  """
  path = data_path(path)
  if not is_file(path / "settings.json"):
    raise InputError(
      f"proposal store {path}: no settings.json there; run the propose mode"
      " first, or correct the path."
    )
  found = _read_settings(path).get("format")
  if found != FORMAT:
    raise InputError(
      f"proposal store {path}: its format is {found!r}, this program's"
      f" {FORMAT!r}; {REMEDY}."
    )
  store = ProposalStore(path)
  if not len(store):
    raise InputError(f"proposal store {path}: it is empty; propose again.")
  return store


def write_shard(path: AnyPath, images: list[tuple[str, bytes]]) -> None:
  """Writes encoded images and their ids as one file, whole or not at all.

  Args:
    path: the final name.
    images: (image id, `encode_proposals`) of each.

  Raises:
    InputError: the disk is full, or fails otherwise.
  """
  with record_writer(path) as write:
    for _, encoded in images:
      write(encoded)
    write(json.dumps([image_id for image_id, _ in images]).encode())


def claim_store(path: AnyPath, made_with: dict[str, Any]) -> None:
  """Makes the folder, and says in it what it is made with.

  Raises:
    InputError: it was made with something else.
  """
  wanted = {"format": FORMAT, "made_with": made_with}
  file = path / "settings.json"
  if is_file(file):
    found = _read_settings(path)
    if found != wanted:
      raise InputError(
        f"proposal store {path}: made with {found}, wanted {wanted}; {REMEDY},"
        " or choose another folder."
      )
    return
  write_file(file, json.dumps(wanted, indent=2) + "\n")


def _read_settings(path: AnyPath) -> dict:
  try:
    return dict(json.loads(read_file(path / "settings.json")))
  except (TypeError, ValueError) as error:
    raise InputError(
      f"proposal store {path}: settings.json is damaged: {error}; {REMEDY}."
    ) from error


def shard_paths(path: AnyPath) -> list[AnyPath]:
  """The complete files of a store, in order."""
  pattern = "proposals-[0-9]*[0-9].array_record"
  return [path / name for name in fnmatch.filter(names_in(path), pattern)]


def image_places(
  shards: Sequence[pathlib.Path],
) -> dict[str, tuple[pathlib.Path, int]]:
  """File and position of every image.

  Raises:
    InputError: a file is damaged.
  """
  places = {}
  for shard in shards:
    reader = _open_shard(shard)
    try:
      if not reader.num_records():
        raise ValueError("it holds no record; it is cut off or of another kind")
      ids = json.loads(reader.read([reader.num_records() - 1])[0])
      if len(ids) != reader.num_records() - 1:
        raise ValueError("its index does not fit its records")
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
      raise InputError(
        f"proposal store {shard}: the file is damaged: {error}; {REMEDY}."
      ) from error
    places |= {image_id: (shard, n) for n, image_id in enumerate(ids)}
  return places


def _open_shard(shard: pathlib.Path):
  try:
    return array_record_module.ArrayRecordReader(
      os.fspath(shard), "readahead_buffer_size:0,max_parallelism:0"
    )
  except (RuntimeError, ValueError, OSError) as error:
    raise InputError(
      f"proposal store {shard}: the file cannot be read: {error}; {REMEDY}."
    ) from error
