"""Writes a data set into a directory of the form that `prepared` describes.

Records are written in pieces of some hundred. A piece is whole or absent, and a
small JSON file in the subfolder `incomplete` says what is in it. So a
preparation that was killed goes on where it was, and machines that share the
directory can each do a part. When all pieces are there, their indices are
joined; `prepared.json` is written last, and what is in `incomplete` removed.

Nothing is locked or renamed, which a bucket could not do: whoever comes twice
or at once writes the same files again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from jtsm_jax.console import progress
from jtsm_jax.data.array_records import record_writer
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  file_size,
  is_file,
  is_local,
  map_reads,
  names_in,
  remove,
  safe_name,
  write_file,
)
from jtsm_jax.data.json_files import read_json
from jtsm_jax.data.panoptic_files import encode_ids
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
  is_prepared,
  open_prepared,
)
from jtsm_jax.data.source import Source
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import InputError, PanopticMap, Record, Segment
from jtsm_jax.workers import JOBS_AHEAD, available_cores, map_ahead

PIECE = 500  # records at most
INCOMPLETE = "incomplete"

_PLAN = "plan.json"
# What is noted of each record of a piece.
_SUMMARY = (
  "image_ids",
  "file_names",
  "source_ids",
  "sizes",
  "tags",
  "digests",
  *(f"has_{part}" for part in PARTS),
)


def prepare(
  source: Source,
  directory: PathOrUrl,
  *,
  max_bad_fraction: float = 0.01,
  shard: int = 0,
  num_shards: int = 1,
) -> bool:
  """Writes a data set into a directory that `open_prepared` reads.

  Every image is decoded once, to see that it can be; its bytes are written as
  they are. Images that cannot be decoded are left out, reported on stderr and
  in `quarantine.txt`. The directory is a prepared data set when it holds
  `prepared.json`, which comes last; until then the same call goes on with what
  is there.

  Args:
    source: the data set.
    directory: to be made, or its URL.
    max_bad_fraction: the greatest fraction of images that may be left out; one
      image always may.
    shard: which part of the pieces to write, 0 .. num_shards - 1.
    num_shards: into how many parts the pieces are divided. Whoever finds all
      pieces written completes the directory.

  Returns:
    Whether the directory is complete.

  Raises:
    InputError: the directory holds a prepared data set or something else, too
      many images are bad, an image id is repeated or unsafe as a file name, a
      split has no image left, or an image has another size than its ground
      truth or its record says.
    ValueError: a training record has ground truth, tags are no class indices in
      ascending order, or there is no such shard.
  """
  directory = data_path(directory)
  if is_file(directory / INFO):
    open_prepared(directory)  # says what is wrong if it is damaged
    raise InputError(
      f"{directory}: holds a prepared data set already; remove it, or choose"
      " another directory"
    )
  options = {"max_bad_fraction": max_bad_fraction}
  write_shard(source, directory, shard=shard, num_shards=num_shards, **options)
  return complete(source, directory, **options)


def write_shard(
  source: Source,
  directory: PathOrUrl,
  *,
  max_bad_fraction: float,
  shard: int,
  num_shards: int,
) -> None:
  """Writes a part of the pieces, without completing the directory.

  Arguments and errors are those of `prepare`; it is no error that the directory
  is complete.
  """
  if not 0 <= shard < num_shards:
    raise ValueError(f"shard is {shard}, must be in 0 .. {num_shards - 1}")
  directory = data_path(directory)
  if is_prepared(directory):
    return
  with _unless_prepared(directory):
    pieces = _claim(source, directory)
    mine = [p for n, p in enumerate(pieces) if n % num_shards == shard]
    _write_pieces(source, directory, mine, max_bad_fraction)


def complete(
  source: Source, directory: PathOrUrl, *, max_bad_fraction: float
) -> bool:
  """Makes the pieces that `write_shard` wrote a prepared data set.

  Returns:
    False if pieces are missing.

  Raises:
    InputError: as `prepare`.
  """
  directory = data_path(directory)
  if not is_prepared(directory):
    with _unless_prepared(directory):
      pieces = _pieces(source)
      written = set(names_in(directory / INCOMPLETE))
      if not all(p.summary_name in written for p in pieces):
        return False
      _complete(source, directory, pieces, max_bad_fraction)
  remove_leftovers(directory)
  return True


def remove_leftovers(directory: PathOrUrl) -> None:
  """Removes what a complete directory was made of.

  That is left where the process was killed at the very end, or another one
  still wrote a piece.
  """
  directory = data_path(directory)
  if INCOMPLETE not in names_in(directory):
    return  # A training looks no further: not even into the folders of masks.
  for folder in (*(directory / part for part in PARTS), directory):
    for name in names_in(folder):
      if name == INCOMPLETE or ".partial-" in name:
        remove(folder / name)


@contextlib.contextmanager
def _unless_prepared(directory: AnyPath) -> Iterator[None]:
  """Lets an error pass when another process has completed the directory.

  It then has removed what this one was about to read or to rename.
  """
  try:
    yield
  except (InputError, OSError):
    if not is_prepared(directory):
      raise


@dataclasses.dataclass(frozen=True)
class _Piece:
  """The records start .. stop - 1 of a split; the index-th of so many."""

  split: str
  index: int
  count: int
  start: int
  stop: int

  def record_file(self, directory: AnyPath, part: str) -> AnyPath:
    return directory / part / _record_name(self.split, self.index, self.count)

  @property
  def summary_name(self) -> str:
    return f"{self.split}-{self.index:05d}.json"

  def summary_file(self, directory: AnyPath) -> AnyPath:
    return directory / INCOMPLETE / self.summary_name


def _record_name(split: str, index: int, count: int) -> str:
  return f"data-{split}.array_record-{index:05d}-of-{count:05d}"


def _claim(source: Source, directory: AnyPath) -> list[_Piece]:
  """Begins a directory, or goes on with it if it is of the same data."""
  if is_local(directory) and directory.exists() and not directory.is_dir():
    raise InputError(f"{directory}: is no folder; choose another directory")
  pieces = _pieces(source)
  wanted = {
    "name": source.name,
    "version": VERSION,
    "categories": source.categories.to_list(),
    "splits": {name: len(split) for name, split in source.splits.items()},
    "state": source.state,
    "settings": dict(source.settings),
    "piece": PIECE,
  }
  # In this order: another shard may have begun in between.
  strange = set(names_in(directory)) - {INCOMPLETE}
  plan = directory / INCOMPLETE / _PLAN
  found = read_json(plan) if is_file(plan) else None
  if INFO in strange:
    open_prepared(directory)  # as in `prepare`
  if found is None and strange:
    raise InputError(
      f"{directory}: exists and is not empty; choose another directory"
    )
  if found not in (None, wanted):
    print(f"{directory}: is of other data; starting anew", file=sys.stderr)
    indices = [f"{split}_index.npz" for split in found["splits"]]
    for name in (*PARTS, *indices, QUARANTINE, INCOMPLETE):
      remove(directory / name)
  if found != wanted:
    write_file(plan, json.dumps(wanted))
  return pieces


def _pieces(source: Source) -> list[_Piece]:
  """Divides the records."""
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
  source: Source,
  directory: AnyPath,
  pieces: list[_Piece],
  max_bad_fraction: float,
) -> None:
  """Writes those pieces that are not there yet."""
  total = sum(p.stop - p.start for p in pieces)
  bar = progress(None, "prepare", total=total, unit="image")
  written, bad = set(names_in(directory / INCOMPLETE)), []
  with bar, concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
    for piece in pieces:
      if piece.summary_name in written:
        bar.update(piece.stop - piece.start)
        continue
      summary = _write_piece(source, directory, piece, pool, bar)
      bad += summary["bad"]
      _check_bad(source, bad, max_bad_fraction)
      write_file(piece.summary_file(directory), json.dumps(summary))


def _write_piece(source, directory, piece, pool, bar) -> dict[str, Any]:
  """Writes the records of a piece and returns what is in it."""
  summary: dict[str, Any] = collections.defaultdict(list)
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
  write = {}
  with contextlib.ExitStack() as files:
    for record, reason, size, examples in map_ahead(pool, read, rows, ahead):
      bar.update()
      if reason is not None:
        summary["bad"].append(f"{record.image_id}: {reason}")
        bar.write(
          f"left out of {piece.split}: {summary['bad'][-1]}", file=sys.stderr
        )
        continue
      summary["image_ids"].append(record.image_id)
      summary["file_names"].append(record.file_name or record.image_id)
      summary["source_ids"].append(record.source_id)
      summary["sizes"].append(size)
      summary["tags"].append(record.tags)
      summary["digests"].append(hashlib.sha256(record.image).hexdigest())
      for part in PARTS:
        summary[f"has_{part}"].append(part in examples)
      for part, example in examples.items():
        if part not in write:
          file = _writer(
            piece.record_file(directory, part),
            features(part, source.categories),
          )
          write[part] = files.enter_context(file)
        write[part](example)
  sizes = {p: file_size(piece.record_file(directory, p)) for p in write}
  return {"bad": [], **summary, "num_bytes": sizes}


@contextlib.contextmanager
def _writer(
  path: AnyPath, record: tfds.features.FeaturesDict
) -> Iterator[Callable[[dict[str, Any]], None]]:
  """What writes an example into an ArrayRecord file, which is written whole."""
  serializer = tfds.core.example_serializer.ExampleSerializer(
    record.get_serialized_info()
  )
  with record_writer(path) as write_record:

    def write(example: dict[str, Any]) -> None:
      encoded = record.encode_example(example)
      write_record(serializer.serialize_example(encoded))

    yield write


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
  id_ = record.image_id
  if not id_ or safe_name(id_) != id_:
    raise InputError(
      f"image id {id_!r} is no safe file name; use letters (in Unicode's form"
      " NFC), digits, '.', '_' and '-', the first no '.' or '-', at most 200"
      " bytes"
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
    f" {fraction} that may be left out (one always may); mend or remove them,"
    f" or raise config.data.max_bad_fraction:{listed}"
    + ("\n  ..." if len(bad) > 10 else "")
  )


def _complete(
  source: Source,
  directory: AnyPath,
  pieces: list[_Piece],
  max_bad_fraction: float,
) -> None:
  """Joins what is known of the pieces, and writes what names them."""
  files = [p.summary_file(directory) for p in pieces]
  # All are read before anything is written: another shard may remove them.
  found = dict(zip(pieces, map_reads(read_json, files, directory), strict=True))
  bad = [line for f in found.values() for line in f["bad"]]
  try:
    _check_bad(source, bad, max_bad_fraction)
  except InputError:
    for piece, summary in found.items():
      if summary["bad"]:  # those images are to be tried again
        remove(piece.summary_file(directory))
    raise
  info = {
    "name": source.name,
    "version": VERSION,
    "citation": source.citation,
    "state": source.state,
    "settings": dict(source.settings),
    "categories": source.categories.to_list(),
    "splits": {},
    "quarantined": len(bad),
  }
  splits: dict[str, list] = collections.defaultdict(list)
  for split in source.splits:
    own = [f for piece, f in found.items() if piece.split == split]
    index = {k: [x for f in own for x in f.get(k, [])] for k in _SUMMARY}
    _check_ids(split, source.name, index["image_ids"])
    _write_index(directory, split, index, len(source.categories))
    info["splits"][split] = {part: sum(index[f"has_{part}"]) for part in PARTS}
    for part in PARTS:
      if info["splits"][split][part]:
        splits[part].append(_split_info(split, part, own))
  for part, infos in splits.items():
    _write_metadata(directory / part, part, source, infos)
  if bad:
    lines = "".join(f"{line}\n" for line in bad)
    write_file(directory / QUARANTINE, lines)
  write_file(directory / INFO, json.dumps(info, indent=2))


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


def _write_index(
  directory: AnyPath, split: str, index: dict[str, list], num_classes: int
) -> None:
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
  data = io.BytesIO()
  np.savez_compressed(
    data,
    image_ids=np.array(index["image_ids"], dtype=np.str_),
    file_names=np.array(index["file_names"], dtype=np.str_),
    source_ids=np.array([*map(json.dumps, index["source_ids"])], dtype=np.str_),
    sizes=np.array(index["sizes"], np.int32).reshape(-1, 2),
    tags=tags,
    digests=np.array(index["digests"], dtype=np.str_),
    fingerprint=digest.hexdigest()[:16],
    **rows,
  )
  write_file(directory / f"{split}_index.npz", data.getvalue())


def _split_info(
  split: str, part: str, found: list[dict[str, Any]]
) -> tfds.core.SplitInfo:
  """What TFDS has to know of the files of a part, from what is in each."""
  return tfds.core.SplitInfo(
    name=split,
    shard_lengths=[sum(f.get(f"has_{part}", [])) for f in found],
    num_bytes=sum(f["num_bytes"].get(part, 0) for f in found),
  )


def _write_metadata(
  folder: AnyPath, part: str, source: Source, splits: list[tfds.core.SplitInfo]
) -> None:
  """Writes what TFDS needs to read the files of a part."""
  with tempfile.TemporaryDirectory() as temporary:
    local = pathlib.Path(temporary)
    for split in splits:  # TFDS takes the names of the splits from files
      (local / _record_name(split.name, 0, len(split.shard_lengths))).touch()
    tfds.folder_dataset.write_metadata(
      data_dir=local,
      features=features(part, source.categories),
      split_infos=splits,
      version=VERSION,
      check_data=False,
      citation=source.citation,
      description=f"{part} of {source.name}",
    )
    for file in local.iterdir():
      if file.stat().st_size:
        write_file(folder / file.name, file.read_bytes())
