"""Prepared data sets: TFDS builders in ArrayRecord, without TensorFlow.

A prepared directory holds

    prepared.json       name, classes, citation, images of each split
    SPLIT_index.npz     ids, names, sizes, tags and hashes of a split's images
    images/             a TFDS data set: id, image and tags of every image
    panoptic/           a TFDS data set: the panoptic masks of evaluation splits
    instances/          a TFDS data set: their instances
    quarantine.txt      the images that could not be decoded, and why

and is one if and only if it holds `prepared.json`, which is written last. It
may be in a bucket; each of its files is then copied to this machine when a
record of it is read for the first time.

Nothing of the "train" split has ground truth, by construction: the writer
refuses it. The ground truth of the other splits lies in files of its own, which
are opened only when `RecordSource.target` or `instances` is called, so a
training run opens none of them. All three can be read by TFDS itself:
`tfds.builder_from_directory`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  fetch,
  is_file,
  is_local,
  names_in,
  read_bytes,
)
from jtsm_jax.data.json_files import read_json
from jtsm_jax.data.panoptic_files import decode_ids
from jtsm_jax.types import (
  Categories,
  InputError,
  Instances,
  PanopticMap,
  Record,
  Segment,
)

VERSION = "2.1.0"
"""Of the layout above; another version is prepared anew."""

INFO = "prepared.json"
QUARANTINE = "quarantine.txt"
TRAIN = "train"
PARTS = IMAGES, PANOPTIC, INSTANCES = "images", "panoptic", "instances"
INDEX_FIELDS = frozenset(
  {
    "image_ids",
    "file_names",
    "source_ids",
    "sizes",
    "tags",
    "digests",
    "fingerprint",
    "panoptic_rows",
    "instances_rows",
  }
)
INSTANCE_ARRAYS = {
  "category": np.int32,
  "boxes": np.float64,
  "area": np.float64,
  "is_crowd": np.bool_,
  "is_difficult": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A prepared data set.

  Attributes:
    name: of the data set.
    categories: the classes.
    splits: "train", and those for evaluation, as "val".
    citation: whom to cite, BibTeX, or "".
    state, settings: of what it was prepared from, see `Source`.
  """

  name: str
  categories: Categories
  splits: Mapping[str, RecordSource]
  citation: str = ""
  state: str = ""
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that change with any image of any split."""
    parts = "\n".join(split.fingerprint for split in self.splits.values())
    return hashlib.sha256(parts.encode()).hexdigest()[:16]

  @property
  def training_key(self) -> str:
    """16 hexadecimal digits that change with a training image or its tags."""
    train = self.splits[TRAIN]
    digest = hashlib.sha256(train.fingerprint.encode())
    digest.update(train.tags.tobytes())
    return digest.hexdigest()[:16]


class RecordSource:
  """Random access to the records of one split.

  Attributes:
    image_ids: N unique strings.
    file_names: N strings, as the data set names the images.
    source_ids: their ids in the data set's JSON, each a number or a string, or
      None where it has none.
    sizes: [N, 2] int32, height and width after EXIF rotation, pixels.
    tags: [N, K] float32, 1 for the classes that an image is tagged with.
    digests: [N] strings, SHA-256 of the image files.
    fingerprint: 16 hexadecimal digits that change with any id or image. What is
      computed from the images is filed under it.

  These come from a small index; only `[i]` reads an image, and only `target`
  and `instances` read ground truth.
  """

  def __init__(self, directory: AnyPath, split: str):
    self._directory = directory
    self._split = split
    path = directory / f"{split}_index.npz"
    try:
      data = io.BytesIO(read_bytes(path))
      with np.load(data, allow_pickle=False) as index:
        self.image_ids: tuple[str, ...] = tuple(index["image_ids"].tolist())
        self.file_names: tuple[str, ...] = tuple(index["file_names"].tolist())
        self.source_ids: tuple[int | str | None, ...] = tuple(
          map(json.loads, index["source_ids"].tolist())
        )
        self.sizes: np.ndarray = index["sizes"]
        self.tags: np.ndarray = index["tags"]
        self.digests: np.ndarray = index["digests"]
        self.fingerprint: str = str(index["fingerprint"])
        self._panoptic_rows: np.ndarray = index["panoptic_rows"]
        self._instances_rows: np.ndarray = index["instances_rows"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
      raise InputError(
        f"{path}: cannot be read ({e}); prepare the data set again"
      ) from e

  def __reduce__(self):
    """Another process opens the files anew."""
    return RecordSource, (self._directory, self._split)

  def __len__(self) -> int:
    return len(self.image_ids)

  def __getitem__(self, i: int) -> Record:
    """Record i without ground truth.

    Raises:
      IndexError: i lies outside 0 .. N - 1.
      InputError: the files are gone or damaged. Those that were open when they
        were removed can still be read.
    """
    self._check_index(i)
    example = self._read(IMAGES, i)
    image_id = example["image_id"].decode()
    if image_id != self.image_ids[i]:
      raise InputError(
        f"{self._directory}: record {i} of {self._split!r} is {image_id!r}, its"
        f" index says {self.image_ids[i]!r}; prepare the data set again"
      )
    height, width = (int(n) for n in self.sizes[i])
    tags = tuple(np.asarray(example["tags"]).tolist())
    return Record(
      image_id,
      example["image"],
      height,
      width,
      tags,
      file_name=self.file_names[i],
      source_id=self.source_ids[i],
    )

  @property
  def has_targets(self) -> bool:
    """Whether every record has a panoptic ground truth."""
    return bool((self._panoptic_rows >= 0).all())

  @property
  def has_instances(self) -> bool:
    """Whether every record has a ground truth of instances."""
    return bool((self._instances_rows >= 0).all())

  def target(self, i: int) -> PanopticMap | None:
    """The panoptic ground truth of record i, or None ("train": always).

    Raises:
      IndexError: i lies outside 0 .. N - 1.
      InputError: the files of the masks are gone or damaged.
    """
    self._check_index(i)
    row = int(self._panoptic_rows[i])
    if row < 0:
      return None
    example = self._read(PANOPTIC, row)
    with Image.open(io.BytesIO(example["ids"])) as image:
      ids = decode_ids(np.asarray(image))
    names = [field.name for field in dataclasses.fields(Segment)]
    columns = [np.asarray(example["segments"][n]).tolist() for n in names]
    return PanopticMap(
      ids, tuple(Segment(*row) for row in zip(*columns, strict=True))
    )

  def instances(self, i: int) -> Instances | None:
    """The instances of record i; as `target`."""
    self._check_index(i)
    row = int(self._instances_rows[i])
    if row < 0:
      return None
    example = self._read(INSTANCES, row)
    values = {  # TFDS reads what is empty as float64
      name: np.asarray(example[name], dtype)
      for name, dtype in INSTANCE_ARRAYS.items()
    }
    return Instances(**values, rles=tuple(example["rles"]))

  def _check_index(self, i: int) -> None:
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of a split of {len(self)}")

  def _read(self, part: str, row: int) -> dict[str, Any]:
    try:
      return getattr(self, f"_{part}")[row]
    except InputError:
      raise
    except Exception as error:  # ArrayRecord raises many kinds.
      raise InputError(
        f"{self._directory / part}: record {row} of {self._split!r} cannot be"
        f" read ({error}); check the folder, or prepare the data set again"
      ) from error

  @functools.cached_property
  def _images(self):
    return _open_tfds(self._directory / IMAGES, self._split, "image")

  @functools.cached_property
  def _panoptic(self):
    return _open_tfds(self._directory / PANOPTIC, self._split, "ids")

  @functools.cached_property
  def _instances(self):
    return _open_tfds(self._directory / INSTANCES, self._split)


def features(part: str, categories: Categories) -> tfds.features.FeaturesDict:
  """What a record of the TFDS data set `part` holds.

  Args:
    part: `IMAGES`, `PANOPTIC` or `INSTANCES`.
    categories: the classes.
  """
  label = tfds.features.ClassLabel(names=list(categories.names))
  fields = {"image_id": tfds.features.Text()}
  if part == IMAGES:
    fields |= {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "tags": tfds.features.Sequence(label),
    }
  elif part == PANOPTIC:
    fields |= {
      "ids": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
      "segments": tfds.features.Sequence(
        {
          "id": np.int64,
          "category": label,
          "is_thing": np.bool_,
          "score": np.float32,
          "area": np.int64,
          "is_crowd": np.bool_,
        }
      ),
    }
  else:
    fields |= {
      "category": tfds.features.Sequence(label),
      "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float64),
      "area": tfds.features.Sequence(np.float64),
      "is_crowd": tfds.features.Sequence(np.bool_),
      "is_difficult": tfds.features.Sequence(np.bool_),
      "rles": tfds.features.Sequence(tfds.features.Text()),
    }
  return tfds.features.FeaturesDict(fields)


def is_prepared(directory: PathOrUrl) -> bool:
  """Whether `open_prepared` would find a data set of this version there.

  Raises:
    InputError: that cannot be found out.
  """
  path = data_path(directory) / INFO
  try:
    return json.loads(read_bytes(path)).get("version") == VERSION
  except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
    return False
  except OSError as error:
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); check the path or URL, the"
      " rights and the network"
    ) from error


def open_prepared(directory: PathOrUrl) -> PreparedData:
  """Opens a directory that `prepare` has written.

  Args:
    directory: that holds `prepared.json`, or its URL.

  Returns:
    The classes and the splits; no image is read yet.

  Raises:
    InputError: there is no prepared data set, it has another version, or a file
      of it is damaged.
  """
  directory = data_path(directory)
  if not is_file(directory / INFO):
    raise InputError(
      f"{directory}: holds no prepared data set ({INFO} is missing); run the"
      " preparation with this directory first"
    )
  remedy = f"remove {directory} and prepare the data set again"
  try:
    info = read_json(directory / INFO)
  except InputError as error:
    raise InputError(f"{error}; {remedy}") from error
  version = info.get("version") if isinstance(info, dict) else None
  if version != VERSION:
    raise InputError(
      f"{directory / INFO}: version {version!r}, this program reads"
      f" {VERSION!r}; {remedy}"
    )
  return PreparedData(
    name=info["name"],
    categories=Categories.from_list(info["categories"]),
    splits={name: RecordSource(directory, name) for name in info["splits"]},
    citation=info["citation"],
    state=info.get("state", ""),
    settings=info.get("settings", {}),
  )


def _open_tfds(
  directory: AnyPath, split: str, image_feature: str | None = None
):
  """Opens a split for random access; images stay encoded."""
  decoders = {image_feature: tfds.decode.SkipDecoding()}
  try:
    options = {"decoders": decoders if image_feature else None}
    if not is_local(directory):
      return _FetchedRecords(directory, split, options)
    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, **options)
  except InputError:
    raise
  except Exception as error:  # TFDS and ArrayRecord raise many kinds.
    raise InputError(
      f"{directory}: cannot be opened ({error}); prepare the data set again"
    ) from error


class _FetchedRecords:
  """The records of a split in a bucket; each file is fetched when needed."""

  def __init__(self, directory: AnyPath, split: str, options: dict[str, Any]):
    """Args: those of `_open_tfds`, and what TFDS opens the split with."""
    self._directory, self._split, self._options = directory, split, options
    names = [n for n in names_in(directory) if not n.startswith("data-")]
    if not names:
      raise FileNotFoundError("there are no files")
    copies = [fetch(directory / name) for name in names]
    self._builder = tfds.builder_from_directory(copies[0].parent)
    info = self._builder.info.splits[split]
    self._names = sorted(info.filenames)
    self._stops = np.cumsum(info.shard_lengths).tolist()
    self._opened: dict[int, Any] = {}

  def __getitem__(self, row: int):
    n = bisect.bisect_right(self._stops, row)
    start = self._stops[n - 1] if n else 0
    if n not in self._opened:
      fetch(self._directory / self._names[n])
      rows = tfds.core.ReadInstruction(
        self._split, from_=start, to=self._stops[n], unit="abs"
      )
      source = self._builder.as_data_source(rows, **self._options)
      self._opened[n] = source
    return self._opened[n][row - start]
