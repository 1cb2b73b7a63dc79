"""What a prepared data set holds, read from its files and not from promises.

The proof that training cannot cheat: every record of the training split is
parsed, whatever the descriptions beside it say, and every file is accounted
for.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  fetch,
  file_names,
  read_file,
)
from jtsm_jax.data.prepared import (
  IMAGES,
  INDEX_FIELDS,
  INFO,
  INSTANCES,
  PANOPTIC,
  PARTS,
  QUARANTINE,
  TRAIN,
  PreparedData,
  open_prepared,
)
from jtsm_jax.types import InputError

TRAINING_FIELDS = frozenset({"image_id", "image", "tags"})
"""All that a training record may hold."""

_RECORDS = re.compile(r"data-([a-z0-9_]+)\.array_record-\d{5}-of-\d{5}")
_DESCRIPTIONS = re.compile(r"(features|dataset_info)\.json|.*\.labels\.txt")
_BATCH = 64  # records that are read at once


@dataclasses.dataclass(frozen=True)
class Audit:
  """What was found.

  Attributes:
    fields: (split, part) -> the fields that its records hold, and in how many
      records each occurs.
    records: (split, part) -> number of records.
    faults: what must not be, as sentences; empty for an honest data set.
  """

  fields: dict[tuple[str, str], dict[str, int]]
  records: dict[tuple[str, str], int]
  faults: list[str]


def audit(directory: PathOrUrl) -> Audit:
  """Reads all records of a prepared data set; decodes nothing.

  Raises:
    InputError: there is no prepared data set in `directory`.
  """
  directory = data_path(directory)
  splits = tuple(open_prepared(directory).splits)
  fields: dict = collections.defaultdict(collections.Counter)
  records: dict = collections.Counter()
  faults = []
  for name in file_names(directory):
    part, _, file = name.rpartition("/")
    found = _RECORDS.fullmatch(file)
    if part in PARTS and found:
      try:
        for record in _parsed(fetch(directory / part / file)):
          records[found[1], part] += 1
          fields[found[1], part].update(record)
      except InputError:
        raise
      except Exception as error:  # ArrayRecord raises many kinds.
        # Nobody can say what the rest of it holds.
        faults.append(f"{directory / name} is damaged ({error})")
    if not _belongs(part, file, splits):
      # Nobody can say what it holds.
      faults.append(
        f"{directory / name} does not belong to a prepared data set"
      )
  for (split, part), names in fields.items():
    if split == TRAIN and part != IMAGES:
      faults.append(
        f"{directory / part} has {records[split, part]} records of training"
        " images"
      )
    elif split == TRAIN and set(names) - TRAINING_FIELDS:
      extra = sorted(set(names) - TRAINING_FIELDS)
      faults.append(
        f"training records hold {', '.join(extra)} besides image, id and tags"
      )
  faults += _index_faults(directory, splits)
  return Audit(
    fields={k: dict(v) for k, v in fields.items()},
    records=dict(records),
    faults=faults,
  )


def audit_table(result: Audit) -> str:
  """An audit as lines of text: what each split holds, then the faults."""
  lines = [f"{'split':<10}{'part':<12}{'records':>8}  fields"]
  for split, part in sorted(result.records, key=lambda k: (k[0] != TRAIN, k)):
    fields = ", ".join(sorted(result.fields[split, part]))
    count = result.records[split, part]
    lines.append(f"{split:<10}{part:<12}{count:>8}  {fields}")
  if result.faults:
    lines += [f"FAULT: {fault}" for fault in result.faults]
  else:
    lines.append("training records hold image, id and tags, and nothing else")
  return "\n".join(lines)


def class_table(data: PreparedData) -> str:
  """Lines of text: images of each class, and how many tags images have."""
  width = max(len(name) for name in data.categories.names)
  columns = "".join(f"{split:>10}" for split in data.splits)
  lines = [f"{'images with':<{width}}{columns}"]
  for k, name in enumerate(data.categories.names):
    counts = [int(s.tags[:, k].sum()) for s in data.splits.values()]
    lines.append(f"{name:<{width}}" + "".join(f"{n:>10}" for n in counts))
  for split, source in data.splits.items():
    numbers, counts = np.unique(
      source.tags.sum(1).astype(int), return_counts=True
    )
    text = ", ".join(
      f"{n}: {count}" for n, count in zip(numbers, counts, strict=True)
    )
    lines.append(f"images of {split!r} by number of tags: {text}")
  return "\n".join(lines)


def _parsed(path: pathlib.Path) -> Iterator[list[str]]:
  """The names of the fields that each record of a file holds."""
  reader = array_record_module.ArrayRecordReader(os.fspath(path))
  try:
    for start in range(0, reader.num_records(), _BATCH):
      stop = min(start + _BATCH, reader.num_records())
      for data in reader.read(list(range(start, stop))):
        example = tf_example_pb2.Example.FromString(data)
        names = list(example.features.feature)
        example.DiscardUnknownFields()
        if len(example.SerializeToString()) != len(data):
          names.append("unknown bytes")
        yield names
  finally:
    reader.close()


def _belongs(part: str, file: str, splits: tuple[str, ...]) -> bool:
  """Whether a file in the folder `part`, or "" for none, may be there."""
  if part:
    records = _RECORDS.fullmatch(file)
    known = records and records[1] in splits
    return part in PARTS and bool(known or _DESCRIPTIONS.fullmatch(file))
  return file in {INFO, QUARANTINE, *(f"{s}_index.npz" for s in splits)}


def _index_faults(directory: AnyPath, splits: tuple[str, ...]) -> Iterator[str]:
  for split in splits:
    path = directory / f"{split}_index.npz"
    data = io.BytesIO(read_file(path))
    with np.load(data, allow_pickle=False) as index:
      extra = sorted(set(index.files) - INDEX_FIELDS)
      rows = [index[f"{part}_rows"] for part in (PANOPTIC, INSTANCES)]
    if extra:
      yield f"{path} holds {', '.join(extra)}, which no index has"
    if split == TRAIN and any((r >= 0).any() for r in rows):
      yield f"{path} names ground truth of training images"
