"""Writes a data set into a directory of the form that `prepared` describes.

Records are written in pieces of some hundred. A piece is whole or absent, and a
small JSON file beside it says what is in it. So a preparation that was killed
goes on where it was, and machines that share a disk can each do a part. When
all pieces are there, their indices are joined and the directory gets its name.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from jtsm_jax.console import progress
from jtsm_jax.data.panoptic_files import encode_ids, read_json
from jtsm_jax.data.prepared import (
  IMAGES,
  INFO,
  INSTANCE_ARRAYS,
  INSTANCES,
  PANOPTIC,
  PARTS,
  QUARANTINE,
  TRAIN,
  VERSION,
  features,
)
from jtsm_jax.data.source import Source
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import InputError, PanopticMap, Record, Segment
from jtsm_jax.workers import JOBS_AHEAD, available_cores, map_ahead

PIECE = 500  # records at most

_PLAN = "plan.json"
# What is noted of each record of a piece.
_SUMMARY = (
  "image_ids",
  "sizes",
  "tags",
  "digests",
  *(f"has_{part}" for part in PARTS),
)
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def prepare(
  source: Source,
  directory: str | os.PathLike,
  *,
  max_bad_fraction: float = 0.01,
  overwrite: bool = False,
  shard: int = 0,
  num_shards: int = 1,
) -> bool:
  """Writes a data set into a directory that `open_prepared` reads.

  Every image is decoded once, to see that it can be; its bytes are written as
  they are. Images that cannot be decoded are left out, reported on stderr and
  in `quarantine.txt`. The directory appears by a rename when it is complete;
  until then the files lie beside it, and the same call goes on with them.

  Args:
    source: the data set.
    directory: to be made.
    max_bad_fraction: the greatest fraction of images that may be left out; one
      image always may.
    overwrite: replace a prepared data set that is already there.
    shard: which part of the pieces to write, 0 .. num_shards - 1.
    num_shards: into how many parts the pieces are divided. Whoever finds all
      pieces written completes the directory.

  Returns:
    Whether the directory is complete.

  Raises:
    InputError: the directory exists, too many images are bad, an image id is
      repeated or unsafe as a file name, a split has no image left, or an image
      has another size than its ground truth or its record says.
    ValueError: a training record has ground truth, tags are no class indices in
      ascending order, or there is no such shard.
  """
  if not 0 <= shard < num_shards:
    raise ValueError(f"shard is {shard}, must be in 0 .. {num_shards - 1}")
  directory = Path(directory)
  _check_directory(directory, overwrite)
  partial = directory.with_name(f".{directory.name}.incomplete")
  pieces = _plan(source, partial)
  mine = [p for n, p in enumerate(pieces) if n % num_shards == shard]
  _write_pieces(source, partial, mine, max_bad_fraction)
  if not all(p.summary_file(partial).exists() for p in pieces):
    return False
  _complete(source, partial, pieces, max_bad_fraction)
  replaced = None
  if directory.exists():
    replaced = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    directory.rename(replaced)
  partial.rename(directory)
  if replaced is not None:
    shutil.rmtree(replaced)
  return True


@dataclasses.dataclass(frozen=True)
class _Piece:
  """The records start .. stop - 1 of a split; the index-th of so many."""

  split: str
  index: int
  count: int
  start: int
  stop: int

  def record_file(self, directory: Path, part: str) -> Path:
    name = (
      f"data-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"
    )
    return directory / part / name

  def summary_file(self, directory: Path) -> Path:
    return directory / "pieces" / f"{self.split}-{self.index:05d}.json"


def _check_directory(directory: Path, overwrite: bool) -> None:
  if not directory.exists():
    return
  if directory.is_dir() and not any(directory.iterdir()):
    directory.rmdir()  # An empty one is as good as none.
    return
  ours = (directory / INFO).is_file()
  if not (overwrite and ours):
    remedy = (
      "pass overwrite=True or delete it" if ours else "choose another directory"
    )
    raise InputError(f"{directory}: exists and is not empty; {remedy}")


def _plan(source: Source, partial: Path) -> list[_Piece]:
  """Divides the records; what an earlier call wrote of them is kept."""
  wanted = {
    "name": source.name,
    "version": VERSION,
    "categories": source.categories.to_list(),
    "splits": {name: len(split) for name, split in source.splits.items()},
  }
  file = partial / _PLAN
  if partial.exists() and not (file.exists() and read_json(file) == wanted):
    print(f"{partial}: is of other data; starting anew", file=sys.stderr)
    shutil.rmtree(partial)
  (partial / "pieces").mkdir(parents=True, exist_ok=True)
  _write_text(file, json.dumps(wanted))
  pieces = []
  for name, split in source.splits.items():
    if not len(split):
      raise InputError(
        f"the split {name!r} of {source.name!r} has no image; there must be at"
        " least one"
      )
    count = math.ceil(len(split) / PIECE)
    bounds = np.linspace(0, len(split), count + 1).astype(int).tolist()
    pieces += [
      _Piece(name, n, count, bounds[n], bounds[n + 1]) for n in range(count)
    ]
  return pieces


def _write_pieces(
  source: Source, partial: Path, pieces: list[_Piece], max_bad_fraction: float
) -> None:
  """Writes those pieces that are not there yet."""
  total = sum(p.stop - p.start for p in pieces)
  bar = progress(None, "prepare", total=total, unit="image")
  bad = []
  with bar, concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
    for piece in pieces:
      if piece.summary_file(partial).exists():
        bar.update(piece.stop - piece.start)
        continue
      summary = _write_piece(source, partial, piece, pool, bar)
      bad += summary["bad"]
      _check_bad(source, bad, max_bad_fraction)
      _write_text(piece.summary_file(partial), json.dumps(summary))


def _write_piece(source, partial, piece, pool, bar) -> dict[str, list]:
  """Writes the records of a piece and returns what is in it."""
  parts = (IMAGES,) if piece.split == TRAIN else PARTS
  writers = {
    part: _Writer(
      piece.record_file(partial, part), features(part, source.categories)
    )
    for part in parts
  }
  summary: dict[str, list] = collections.defaultdict(list)
  records = source.splits[piece.split]

  def read(i: int):
    record = records[i]
    _check_record(record, piece.split, len(source.categories))
    try:
      image = decode_image(record.image, name=record.image_id)
    except InputError as error:
      reason = str(error).removeprefix(f"{record.image_id}: ")
      return record, reason.replace("\n", " "), None, {}
    size = image.shape[:2]
    if record.height:
      _check_size(record.image_id, (record.height, record.width), size)
    return record, None, size, _examples(record, size)

  rows = ((i,) for i in range(piece.start, piece.stop))
  ahead = JOBS_AHEAD * available_cores()
  try:
    for record, reason, size, examples in map_ahead(pool, read, rows, ahead):
      bar.update()
      if reason is not None:
        summary["bad"].append(f"{record.image_id}: {reason}")
        bar.write(
          f"left out of {piece.split}: {summary['bad'][-1]}", file=sys.stderr
        )
        continue
      summary["image_ids"].append(record.image_id)
      summary["sizes"].append(size)
      summary["tags"].append(record.tags)
      summary["digests"].append(hashlib.sha256(record.image).hexdigest())
      for part in PARTS:
        summary[f"has_{part}"].append(part in examples)
      for part, example in examples.items():
        writers[part].write(example)
  finally:
    for writer in writers.values():
      writer.close()
  for writer in writers.values():
    writer.publish()
  return {"bad": [], **summary}


class _Writer:
  """Writes one ArrayRecord file, which gets its name when it is whole."""

  def __init__(self, path: Path, record: tfds.features.FeaturesDict):
    path.parent.mkdir(exist_ok=True)
    self._path = path
    self._partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    self._features = record
    self._serializer = tfds.core.example_serializer.ExampleSerializer(
      record.get_serialized_info()
    )
    self._writer = array_record_module.ArrayRecordWriter(
      os.fspath(self._partial), "group_size:1"
    )

  def write(self, example: dict[str, Any]) -> None:
    encoded = self._features.encode_example(example)
    self._writer.write(self._serializer.serialize_example(encoded))

  def close(self) -> None:
    self._writer.close()

  def publish(self) -> None:
    with self._partial.open("rb") as file:
      os.fsync(file.fileno())
    self._partial.replace(self._path)


def _examples(
  record: Record, size: tuple[int, int]
) -> dict[str, dict[str, Any]]:
  """What is written of a record, by part."""
  examples: dict[str, dict[str, Any]] = {
    IMAGES: {
      "image_id": record.image_id,
      "image": io.BytesIO(record.image),
      "tags": list(record.tags),
    }
  }
  if record.target is not None:
    _check_size(record.image_id, record.target.ids.shape, size)
    examples[PANOPTIC] = _encode_panoptic(record.image_id, record.target)
  if record.instances is not None:
    examples[INSTANCES] = {
      "image_id": record.image_id,
      "rles": list(record.instances.rles),
      **{k: getattr(record.instances, k) for k in INSTANCE_ARRAYS},
    }
  return examples


def _encode_panoptic(image_id: str, target: PanopticMap) -> dict[str, Any]:
  # The least compression: the greatest takes ten times as long for a third.
  ok, png = cv2.imencode(
    ".png",
    encode_ids(target.ids)[..., ::-1],
    [cv2.IMWRITE_PNG_COMPRESSION, 1],
  )
  if not ok:
    raise RuntimeError(f"OpenCV could not encode the masks of {image_id!r}")
  return {
    "image_id": image_id,
    "ids": io.BytesIO(png.tobytes()),
    "segments": {
      field.name: [getattr(s, field.name) for s in target.segments]
      for field in dataclasses.fields(Segment)
    },
  }


def _check_size(image_id, found, wanted) -> None:
  if tuple(found) != tuple(wanted):
    raise InputError(
      f"the masks of {image_id!r} are for {found[0]} x {found[1]} (height x"
      f" width), its image is {wanted[0]} x {wanted[1]} after EXIF rotation;"
      " they must agree"
    )


def _check_record(record: Record, split: str, num_classes: int) -> None:
  if split == TRAIN and (record.target or record.instances):
    raise ValueError(
      f"training record {record.image_id!r} has ground truth; training splits"
      " hold image tags only, so give it target=None and instances=None"
    )
  if not _SAFE_ID.fullmatch(record.image_id):
    raise InputError(
      f"image id {record.image_id!r} is no safe file name; use at most 200"
      " letters, digits, '.', '_' and '-', the first no '.' or '-'"
    )
  tags = list(record.tags)
  if tags != sorted(set(tags)) or any(not 0 <= t < num_classes for t in tags):
    raise ValueError(
      f"tags of {record.image_id!r} are {tags}; they must be ascending class"
      f" indices in 0 .. {num_classes - 1}"
    )


def _check_bad(source: Source, bad: list[str], fraction: float) -> None:
  total = sum(map(len, source.splits.values()))
  if len(bad) <= max(1, fraction * total):
    return
  listed = "".join(f"\n  {line}" for line in bad[:10])
  raise InputError(
    f"{len(bad)} of {total} images cannot be decoded, more than the fraction"
    f" max_bad_fraction={fraction} that may be left out; mend or remove"
    f" them:{listed}" + ("\n  ..." if len(bad) > 10 else "")
  )


def _complete(
  source: Source,
  partial: Path,
  pieces: list[_Piece],
  max_bad_fraction: float,
) -> None:
  """Joins what is known of the pieces, and writes what names them."""
  info = {
    "name": source.name,
    "version": VERSION,
    "citation": source.citation,
    "categories": source.categories.to_list(),
    "splits": {},
  }
  bad, lengths = [], collections.defaultdict(dict)
  for split in source.splits:
    own = [p for p in pieces if p.split == split]
    found = [read_json(p.summary_file(partial)) for p in own]
    bad += [line for f in found for line in f["bad"]]
    index = {k: [x for f in found for x in f.get(k, [])] for k in _SUMMARY}
    _check_ids(split, source.name, index["image_ids"])
    _write_index(partial / f"{split}_index.npz", index, len(source.categories))
    info["splits"][split] = {part: sum(index[f"has_{part}"]) for part in PARTS}
    for part in PARTS:
      if info["splits"][split][part]:
        lengths[part][split] = [sum(f.get(f"has_{part}", [])) for f in found]
      else:
        for piece in own:
          piece.record_file(partial, part).unlink(missing_ok=True)
  try:
    _check_bad(source, bad, max_bad_fraction)
  except InputError:
    for piece in pieces:  # those images are to be tried again
      if read_json(piece.summary_file(partial))["bad"]:
        piece.summary_file(partial).unlink()
    raise
  for part in PARTS:
    if part in lengths:
      _write_metadata(partial / part, part, source, lengths[part])
    else:
      shutil.rmtree(partial / part, ignore_errors=True)
  if bad:
    _write_text(partial / QUARANTINE, "".join(f"{line}\n" for line in bad))
  info["quarantined"] = len(bad)
  _write_text(partial / INFO, json.dumps(info, indent=2))
  shutil.rmtree(partial / "pieces")
  (partial / _PLAN).unlink()


def _check_ids(split: str, name: str, image_ids: list[str]) -> None:
  if not image_ids:
    raise InputError(
      f"the split {split!r} of {name!r} has no image that can be decoded; there"
      " must be at least one"
    )
  for image_id, count in collections.Counter(image_ids).most_common(1):
    if count > 1:
      raise InputError(
        f"image id {image_id!r} occurs {count} times in {split!r}; ids must be"
        " unique"
      )


def _write_index(path: Path, index: dict[str, list], num_classes: int) -> None:
  tags = np.zeros((len(index["tags"]), num_classes), np.float32)
  for row, present in zip(tags, index["tags"], strict=True):
    row[present] = 1
  rows = {
    f"{part}_rows": np.where(has, np.cumsum(has) - 1, -1).astype(np.int32)
    for part in (PANOPTIC, INSTANCES)
    for has in [np.array(index[f"has_{part}"], bool)]
  }
  digest = hashlib.sha256()
  for image_id, image in zip(index["image_ids"], index["digests"], strict=True):
    digest.update(f"{image} {image_id}\n".encode())
  np.savez_compressed(
    path,
    image_ids=np.array(index["image_ids"], dtype=np.str_),
    sizes=np.array(index["sizes"], np.int32).reshape(-1, 2),
    tags=tags,
    digests=np.array(index["digests"], dtype=np.str_),
    fingerprint=digest.hexdigest()[:16],
    **rows,
  )


def _write_metadata(
  folder: Path, part: str, source: Source, lengths: dict[str, list[int]]
) -> None:
  """Writes what TFDS needs to read the files of a part."""
  splits = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=counts,
      num_bytes=sum(
        f.stat().st_size for f in folder.glob(f"data-{split}.array_record-*")
      ),
    )
    for split, counts in lengths.items()
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features(part, source.categories),
    split_infos=splits,
    version=VERSION,
    check_data=False,
    citation=source.citation,
    description=f"{part} of {source.name}",
  )


def _write_text(path: Path, text: str) -> None:
  """Writes a file, whole or not at all."""
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)
