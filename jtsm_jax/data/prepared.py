"""Prepared data sets: TFDS builders in ArrayRecord, without TensorFlow.

A prepared directory holds

    prepared.json            name, classes, number of images of each split
    <split>_index.npz        ids, sizes and tags of a split's images, and a hash
    images/                  a TFDS data set: the images and tags
    val_targets/             a TFDS data set: the masks of "val", nothing else
    quarantine.txt           the images that could not be decoded, and why

Nothing of the "train" split has masks, by construction: the writer refuses
them. The masks of "val" lie in files of their own, which are opened only when
`RecordSource.target` is called, so a training run opens none of them.
Both parts can be read by TFDS itself: `tfds.builder_from_directory`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jtsm_jax.console import progress
from jtsm_jax.data.panoptic_files import decode_ids, encode_ids, read_json
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import (
  Categories,
  InputError,
  PanopticMap,
  Record,
  Segment,
)

VERSION = "1.1.0"
"""Of the layout above; another version is prepared anew."""

_INFO = "prepared.json"
_QUARANTINE = "quarantine.txt"
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set as it comes from its own files, to be prepared.

  Attributes:
    name: of the data set.
    categories: the classes.
    train: records without targets; `height` and `width` may be 0, since
      `prepare` takes them from the decoded image.
    val: records with or without targets, or None for no such split.
    num_train: how many records `train` yields, for the progress bar; or None.
    num_val: the same of `val`.
  """

  name: str
  categories: Categories
  train: Iterable[Record]
  val: Iterable[Record] | None = None
  num_train: int | None = None
  num_val: int | None = None


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A prepared data set.

  Attributes:
    name: of the data set.
    categories: the classes.
    splits: "train", and "val" where the data set has it.
  """

  name: str
  categories: Categories
  splits: Mapping[str, RecordSource]

  @property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that change with any image of any split."""
    parts = "\n".join(split.fingerprint for split in self.splits.values())
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


class RecordSource:
  """Random access to the records of one split.

  Attributes:
    image_ids: N unique strings.
    sizes: [N, 2] int32, height and width after EXIF rotation, pixels.
    tags: [N, K] float32, 1 for the classes that an image is tagged with.
    fingerprint: 16 hexadecimal digits that change with any id or image. What is
      computed from the images is filed under it.

  These come from a small index; only `[i]` reads an image, and only
  `target` reads masks.
  """

  def __init__(self, directory: Path, split: str):
    self._directory = directory
    self._split = split
    path = directory / f"{split}_index.npz"
    try:
      with np.load(path, allow_pickle=False) as index:
        self.image_ids: tuple[str, ...] = tuple(index["image_ids"].tolist())
        self.sizes: np.ndarray = index["sizes"]
        self.tags: np.ndarray = index["tags"]
        self.fingerprint: str = str(index["fingerprint"])
        self._target_rows: np.ndarray = index["target_rows"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
      raise InputError(
        f"{path}: cannot be read ({e}); prepare the data set again"
      ) from e

  def __len__(self) -> int:
    return len(self.image_ids)

  def __getitem__(self, i: int) -> Record:
    """Record i without its target; IndexError outside 0 .. N - 1."""
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of a split of {len(self)}")
    example = self._images[i]
    image_id = example["image_id"].decode()
    if image_id != self.image_ids[i]:
      raise InputError(
        f"{self._directory}: record {i} of {self._split!r} is {image_id!r}, its"
        f" index says {self.image_ids[i]!r}; prepare the data set again"
      )
    height, width = (int(n) for n in self.sizes[i])
    tags = tuple(np.flatnonzero(self.tags[i]).tolist())
    return Record(image_id, example["image"], height, width, tags)

  @property
  def has_targets(self) -> bool:
    """Whether every record has a ground truth."""
    return bool((self._target_rows >= 0).all())

  def target(self, i: int) -> PanopticMap | None:
    """The ground truth of record i; None if it has none ("train": always).

    Raises:
      IndexError: i lies outside 0 .. N - 1.
      InputError: the files of the masks are gone or damaged.
    """
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of a split of {len(self)}")
    row = int(self._target_rows[i])
    if row < 0:
      return None
    example = self._targets[row]
    with Image.open(io.BytesIO(example["ids"])) as image:
      ids = decode_ids(np.asarray(image))
    names = [field.name for field in dataclasses.fields(Segment)]
    columns = [np.asarray(example["segments"][n]).tolist() for n in names]
    return PanopticMap(
      ids, tuple(Segment(*row) for row in zip(*columns, strict=True))
    )

  @functools.cached_property
  def _images(self):
    return _open_tfds(self._directory / "images", self._split, "image")

  @functools.cached_property
  def _targets(self):
    return _open_tfds(self._directory / "val_targets", self._split, "ids")


def prepare(
  source: Source,
  directory: str | os.PathLike,
  *,
  max_bad_fraction: float = 0.01,
  overwrite: bool = False,
) -> None:
  """Writes a data set into a directory that `open_prepared` reads.

  Every image is decoded once. Those that cannot be are left out, reported on
  stderr and in `quarantine.txt`. The directory appears by a rename when it is
  complete; until then the files lie beside it.

  Args:
    source: the data set.
    directory: to be made.
    max_bad_fraction: the greatest fraction of images that may be left out; one
      image always may.
    overwrite: replace a prepared data set that is already there.

  Raises:
    InputError: the directory exists, too many images are bad, an image id is
      repeated or unsafe as a file name, no training image is left, or a target
      has another size than its image.
    ValueError: a training record has a target, or tags are no class indices in
      ascending order.
  """
  directory = Path(directory)
  _check_directory(directory, overwrite)
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = directory.with_name(f".{directory.name}.incomplete-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    _write(source, partial, max_bad_fraction)
    replaced = None
    if directory.exists():
      replaced = directory.with_name(f".{directory.name}.old-{os.getpid()}")
      directory.rename(replaced)
    partial.rename(directory)
    if replaced is not None:
      shutil.rmtree(replaced)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def is_prepared(directory: str | os.PathLike) -> bool:
  """Whether `open_prepared` would find a data set of this version there."""
  try:
    return read_json(Path(directory) / _INFO).get("version") == VERSION
  except (InputError, AttributeError):
    return False


def open_prepared(directory: str | os.PathLike) -> PreparedData:
  """Opens a directory that `prepare` has written.

  Args:
    directory: that holds `prepared.json`.

  Returns:
    The classes and the splits; no image is read yet.

  Raises:
    InputError: there is no prepared data set, it has another version, or a file
      of it is damaged.
  """
  directory = Path(directory)
  if not (directory / _INFO).is_file():
    raise InputError(
      f"{directory}: holds no prepared data set ({_INFO} is missing); run the"
      " preparation with this directory first"
    )
  info = read_json(directory / _INFO)
  version = info.get("version") if isinstance(info, dict) else None
  if version != VERSION:
    raise InputError(
      f"{directory / _INFO}: version {version!r}, this program reads"
      f" {VERSION!r}; prepare the data set again"
    )
  return PreparedData(
    name=info["name"],
    categories=Categories.from_list(info["categories"]),
    splits={name: RecordSource(directory, name) for name in info["splits"]},
  )


def _check_directory(directory: Path, overwrite: bool) -> None:
  if not directory.exists():
    return
  if directory.is_dir() and not any(directory.iterdir()):
    directory.rmdir()  # An empty one is as good as none.
    return
  ours = (directory / _INFO).is_file()
  if not (overwrite and ours):
    remedy = (
      "pass overwrite=True or delete it" if ours else "choose another directory"
    )
    raise InputError(f"{directory}: exists and is not empty; {remedy}")


def _write(source: Source, directory: Path, max_bad_fraction: float) -> None:
  """Writes all files of a data set into an existing, empty directory."""
  indices = {"train": _Index()}
  bad: list[str] = []
  train = _examples(source, "train", indices["train"], bad, max_bad_fraction)
  splits = {"train": train}
  if source.val is not None:
    indices["val"] = _Index()
    splits["val"] = _examples(
      source, "val", indices["val"], bad, max_bad_fraction
    )
  names = list(source.categories.names)
  image_features = {
    "image_id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(None, None, 3)),
    "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
    "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
  }
  _write_tfds(directory / "images", source.name, image_features, splits)
  _check_bad(
    bad,
    sum(len(x.image_ids) for x in indices.values()) + len(bad),
    max_bad_fraction,
  )
  targets = indices["val"].targets if "val" in indices else []
  if targets:
    target_features = {
      "image_id": tfds.features.Text(),
      "ids": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
      "segments": tfds.features.Sequence(
        {
          "id": np.int64,
          "category": tfds.features.ClassLabel(names=names),
          "is_thing": np.bool_,
          "score": np.float32,
          "area": np.int64,
          "is_crowd": np.bool_,
        }
      ),
    }
    _write_tfds(
      directory / "val_targets",
      source.name,
      target_features,
      {"val": enumerate(targets)},
    )
  for split, index in indices.items():
    index.write(directory / f"{split}_index.npz", len(source.categories))
  if bad:
    text = "".join(f"{line}\n" for line in bad)
    (directory / _QUARANTINE).write_text(text, encoding="utf-8")
  info = {
    "name": source.name,
    "version": VERSION,
    "categories": source.categories.to_list(),
    "splits": {
      split: {"images": len(index.image_ids), "targets": len(index.targets)}
      for split, index in indices.items()
    },
    "quarantined": len(bad),
  }
  (directory / _INFO).write_text(json.dumps(info, indent=2), encoding="utf-8")


class _Index:
  """What is known of a split without reading its images."""

  def __init__(self):
    self.image_ids: list[str] = []
    self.sizes: list[tuple[int, int]] = []
    self.tags: list[tuple[int, ...]] = []
    self.target_rows: list[int] = []
    self.targets: list[dict] = []  # Encoded, so a few KB each.
    self.digest = hashlib.sha256()

  def write(self, path: Path, num_classes: int) -> None:
    tags = np.zeros((len(self.tags), num_classes), np.float32)
    for row, present in zip(tags, self.tags, strict=True):
      row[list(present)] = 1
    np.savez_compressed(
      path,
      image_ids=np.array(self.image_ids, dtype=np.str_),
      sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
      tags=tags,
      target_rows=np.array(self.target_rows, np.int32),
      fingerprint=self.digest.hexdigest()[:16],
    )


def _examples(
  source: Source,
  split: str,
  index: _Index,
  bad: list[str],
  max_bad_fraction: float,
) -> Iterator[tuple[int, dict]]:
  """Yields TFDS examples; fills the index and the list of bad images."""
  records, total = (
    (source.train, source.num_train)
    if split == "train"
    else (source.val, source.num_val)
  )
  seen: set[str] = set()
  everything = (source.num_train or 0) + (source.num_val or 0)
  bar = progress(records, f"prepare {split}", total=total, unit="image")
  for record in bar:
    image_id = record.image_id
    _check_record(record, split, seen, len(source.categories))
    seen.add(image_id)
    try:
      height, width = decode_image(record.image, name=image_id).shape[:2]
    except InputError as error:
      reason = str(error).removeprefix(f"{image_id}: ").replace("\n", " ")
      bad.append(f"{image_id}: {reason}")
      bar.write(f"left out of {split}: {bad[-1]}", file=sys.stderr)
      if total is not None:
        _check_bad(bad, everything, max_bad_fraction)
      continue
    row = -1
    if record.target is not None:
      shape = record.target.ids.shape
      if shape != (height, width):
        raise InputError(
          f"the masks of {image_id!r} are {shape[0]} x {shape[1]} (height x"
          f" width), its image is {height} x {width} after EXIF rotation; they"
          " must agree"
        )
      row = len(index.targets)
      index.targets.append(_encode_target(image_id, record.target))
    index.image_ids.append(image_id)
    index.sizes.append((height, width))
    index.tags.append(record.tags)
    index.target_rows.append(row)
    index.digest.update(hashlib.sha256(record.image).digest())
    index.digest.update(f"{image_id}\n".encode())
    yield (
      len(index.image_ids),
      {
        "image_id": image_id,
        "image": io.BytesIO(record.image),
        "size": np.array([height, width], np.int32),
        "tags": list(record.tags),
      },
    )
  if not index.image_ids:
    _check_bad(bad, max(everything, len(bad)), max_bad_fraction)
    raise InputError(
      f"the split {split!r} of {source.name!r} has no image that can be"
      " decoded; there must be at least one"
    )


def _check_record(
  record: Record, split: str, seen: set[str], num_classes: int
) -> None:
  if split == "train" and record.target is not None:
    raise ValueError(
      f"training record {record.image_id!r} has a target; training splits hold"
      " image tags only, so give it target=None"
    )
  if not _SAFE_ID.fullmatch(record.image_id):
    raise InputError(
      f"image id {record.image_id!r} is no safe file name; use at most 200"
      " letters, digits, '.', '_' and '-', the first no '.' or '-'"
    )
  if record.image_id in seen:
    raise InputError(
      f"image id {record.image_id!r} occurs twice in {split!r}; ids must be"
      " unique"
    )
  tags = list(record.tags)
  if tags != sorted(set(tags)) or any(not 0 <= t < num_classes for t in tags):
    raise ValueError(
      f"tags of {record.image_id!r} are {tags}; they must be ascending class"
      f" indices in 0 .. {num_classes - 1}"
    )


def _check_bad(bad: list[str], total: int, max_bad_fraction: float) -> None:
  if len(bad) > max(1, max_bad_fraction * total):
    listed = "".join(f"\n  {line}" for line in bad[:10])
    raise InputError(
      f"{len(bad)} of {total} images cannot be decoded, more than the fraction"
      f" max_bad_fraction={max_bad_fraction} that may be left out; mend or"
      f" remove them:{listed}" + ("\n  ..." if len(bad) > 10 else "")
    )


def _encode_target(image_id: str, target: PanopticMap) -> dict:
  png = io.BytesIO()
  Image.fromarray(encode_ids(target.ids)).save(png, format="PNG")
  segments = [dataclasses.asdict(s) for s in target.segments]
  return {
    "image_id": image_id,
    "ids": io.BytesIO(png.getvalue()),
    "segments": {
      field.name: [s[field.name] for s in segments]
      for field in dataclasses.fields(Segment)
    },
  }


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS builder of given examples."""

  VERSION = tfds.core.Version(VERSION)
  code_path = None  # There are no checksum files beside the code to look for.

  def __init__(self, *, name: str, features: dict, splits: dict, data_dir):
    self.name = name
    self._features = features
    self._splits = splits
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self._features),
      disable_shuffling=True,  # The order is that of the index.
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return self._splits

  def _generate_examples(self):
    raise NotImplementedError  # The splits are iterators already.


def _write_tfds(
  directory: Path, name: str, features: dict, splits: dict
) -> None:
  """Writes one TFDS data set and lays its files into `directory`."""
  scratch = directory.with_name(directory.name + ".tfds")
  name = "data_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
  with _quiet_tfds():
    builder = _Builder(
      name=name, features=features, splits=splits, data_dir=scratch
    )
    builder.download_and_prepare()
  Path(builder.data_dir).rename(directory)
  shutil.rmtree(scratch)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Hides TFDS's talk of downloads and of directories that will be renamed."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()


def _open_tfds(directory: Path, split: str, image_feature: str):
  """Opens a split for random access; images stay encoded."""
  try:
    return tfds.builder_from_directory(directory).as_data_source(
      split, decoders={image_feature: tfds.decode.SkipDecoding()}
    )
  except Exception as error:  # TFDS and ArrayRecord raise many kinds.
    raise InputError(
      f"{directory}: cannot be opened ({error}); prepare the data set again"
    ) from error
