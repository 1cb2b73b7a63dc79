"""A data set of one's own: a folder of images and a table of their tags.

    classes.json         [{"id": 1, "name": "cow", "isthing": 1}, ...]
    images/              JPEG, PNG, ...; folders inside it are allowed
    train_tags.csv       image,tags     a.jpg,cow;grass
    val_tags.csv         the same, optional
    panoptic_val.json    COCO panoptic ground truth of "val", optional
    panoptic_val/        its PNG files

Training reads the first three only.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from jtsm_jax.data.panoptic_files import read_json, read_panoptic
from jtsm_jax.data.prepared import Source
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import Categories, InputError, PanopticMap, Record

_LAYOUT = "a data folder holds classes.json, images/ and train_tags.csv"


@dataclasses.dataclass(frozen=True)
class FolderEntry:
  """One row of a table of tags.

  Attributes:
    image_id: made from `name`: without the ending, safe as a file name.
    name: the image as the table names it, relative to `images/`.
    path: of the file.
    tags: class indices, ascending.
  """

  image_id: str
  name: str
  path: Path
  tags: tuple[int, ...]


def read_folder(
  root: str | os.PathLike,
) -> tuple[Categories, list[FolderEntry], list[FolderEntry]]:
  """Reads and checks the classes and the tables of tags; opens no image.

  Args:
    root: the folder; its layout is that of the module's docstring.

  Returns:
    (classes, training entries, validation entries), entries in the order of the
    tables. Without a val_tags.csv there are no validation entries.

  Raises:
    InputError: anything in the folder that is missing, unknown or inconsistent.
  """
  root = Path(root)
  if not root.is_dir():
    raise InputError(f"{root}: no such folder; {_LAYOUT}")
  for name in ("classes.json", "train_tags.csv"):
    if not (root / name).is_file():
      raise InputError(f"{root / name}: no such file; {_LAYOUT}")
  if not (root / "images").is_dir():
    raise InputError(f"{root / 'images'}: no such folder; {_LAYOUT}")
  categories = _read_classes(root / "classes.json")
  train = _read_tags(root / "train_tags.csv", categories, need_tags=True)
  if not train:
    raise InputError(
      f"{root / 'train_tags.csv'}: has no rows; list the training images"
    )
  val = []
  if (root / "val_tags.csv").exists():
    val = _read_tags(root / "val_tags.csv", categories, need_tags=False)
  _check_ids(train, val)
  return categories, train, val


def folder_source(
  root: str | os.PathLike, *, name: str | None = None
) -> Source:
  """The folder as a data set for `prepare`.

  Args:
    root: the folder.
    name: of the data set; the folder's name if None.

  Returns:
    Training records without targets; validation records with them where
    `panoptic_val.json` exists.

  Raises:
    InputError: as `read_folder`, and where a validation image has no ground
      truth in a `panoptic_val.json` that exists.
  """
  root = Path(root)
  categories, train, val = read_folder(root)
  _report(root, train, val)
  targets = None
  annotations = root / "panoptic_val.json"
  if val and annotations.exists():
    targets = read_panoptic(annotations, root / "panoptic_val", categories)
    lacking = [entry.name for entry in val if entry.name not in targets]
    if lacking:
      raise InputError(
        f"{annotations}: {len(lacking)} images of val_tags.csv have no"
        f" annotation, e.g. {lacking[0]!r}; add it or remove the row"
      )
  return Source(
    name=name or root.resolve().name,
    categories=categories,
    train=_records(train, None),
    val=_records(val, targets) if val else None,
    num_train=len(train),
    num_val=len(val),
  )


def _records(
  entries: list[FolderEntry], targets: Mapping[str, PanopticMap] | None
) -> Iterator[Record]:
  for entry in entries:
    target = None if targets is None else targets[entry.name]
    try:
      data = entry.path.read_bytes()
    except OSError as error:
      raise InputError(
        f"{entry.path}: cannot be read ({error.strerror}); check the file"
      ) from error
    yield Record(entry.image_id, data, 0, 0, entry.tags, target)


def _report(
  root: Path, train: list[FolderEntry], val: list[FolderEntry]
) -> None:
  """Says on stderr what lies in the folder but is not used."""
  listed = {entry.path for entry in train + val}
  files = (p for p in (root / "images").rglob("*") if p.is_file())
  unused = sum(path not in listed for path in files)
  if unused:
    print(
      f"{root}: {unused} files in images/ are in no table of tags; they are"
      " not used",
      file=sys.stderr,
    )
  both = {entry.name for entry in train} & {entry.name for entry in val}
  if both:
    print(
      f"{root}: {len(both)} images are in train_tags.csv and in val_tags.csv,"
      f" e.g. {min(both)!r}; figures measured on them are too good",
      file=sys.stderr,
    )
  if (root / "panoptic_val.json").exists() and not val:
    print(
      f"{root}: panoptic_val.json is not used, since val_tags.csv lists no"
      " image",
      file=sys.stderr,
    )


def _read_classes(path: Path) -> Categories:
  entries = read_json(path)
  wanted = '[{"id": 1, "name": "cow", "isthing": 1}, ...]'
  if not isinstance(entries, list) or not entries:
    raise InputError(f"{path}: must be a list of classes, {wanted}")
  for entry in entries:
    ok = (
      isinstance(entry, dict)
      and {"id", "name", "isthing"} <= entry.keys()
      and isinstance(entry["id"], int)
      and isinstance(entry["name"], str)
      and entry["isthing"] in (0, 1)
    )
    if not ok:
      raise InputError(f"{path}: {entry!r} is no class; wanted {wanted}")
    name = entry["name"]
    if not name or name != name.strip() or ";" in name:
      raise InputError(
        f"{path}: the class name {name!r} cannot be a tag; it must not be"
        " empty, begin or end with a space, or contain ';'"
      )
  for field in ("id", "name"):
    values = [entry[field] for entry in entries]
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
      raise InputError(
        f"{path}: the {field} {repeated[0]!r} occurs twice; each class needs"
        " its own"
      )
  return Categories.from_list(entries)


def _read_tags(
  path: Path, categories: Categories, *, need_tags: bool
) -> list[FolderEntry]:
  images = path.parent / "images"
  index_of = {name: i for i, name in enumerate(categories.names)}
  entries, line_of = [], {}
  for line, name, text in _rows(path):
    where = f"{path}, line {line}"
    file = _image_file(images, name, where)
    if file in line_of:
      raise InputError(
        f"{where}: image {name!r} is also in line {line_of[file]}; keep one row"
      )
    line_of[file] = line
    names = [tag.strip() for tag in text.split(";") if tag.strip()]
    unknown = [tag for tag in names if tag not in index_of]
    if unknown:
      raise InputError(f"{where}: {_unknown_tag(unknown[0], categories)}")
    if need_tags and not names:
      raise InputError(
        f"{where}: image {name!r} has no tags; a training image needs at least"
        " one: add it or remove the row"
      )
    tags = tuple(sorted({index_of[tag] for tag in names}))
    entries.append(FolderEntry(_image_id(name), name, file, tags))
  return entries


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
  """Yields (line number, image, tags) of a CSV file."""
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      reader = csv.DictReader(file, skipinitialspace=True, strict=True)
      found = [str(column).strip() for column in reader.fieldnames or []]
      if not {"image", "tags"} <= set(found):
        raise InputError(
          f"{path}: the first line must name the columns image,tags; found"
          f" {','.join(found)!r}"
        )
      reader.fieldnames = found
      for row in reader:
        name, tags = row["image"], row["tags"]
        where = f"{path}, line {reader.line_num}"
        if None in row:
          raise InputError(
            f"{where}: more values than columns; separate the tags of an image"
            " by ';', not by ','"
          )
        if not name or not name.strip() or tags is None:
          raise InputError(
            f"{where}: a row must be image,tags; found"
            f" {','.join(v for v in row.values() if v)!r}"
          )
        yield reader.line_num, name.strip(), tags
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(
      f"{path}: is no readable CSV in UTF-8 ({error}); save it as such"
    ) from error


def _image_file(images: Path, name: str, where: str) -> Path:
  """The path of an image, which must exist inside `images`."""
  parts = PurePosixPath(name)
  if parts.is_absolute() or ".." in parts.parts:
    raise InputError(
      f"{where}: image {name!r} leaves the folder; give a path relative to"
      f" {images}, without '..'"
    )
  path = images / parts
  if not path.is_file():
    names = [p.relative_to(images).as_posix() for p in images.rglob("*")]
    raise InputError(
      f"{where}: image {name!r} is not in {images}{_hint(name, names)}; add it"
      " or remove the row"
    )
  if not path.resolve().is_relative_to(images.resolve()):
    raise InputError(
      f"{where}: image {name!r} is a link that leaves {images}; put the file"
      " itself there"
    )
  return path


def _unknown_tag(tag: str, categories: Categories) -> str:
  known = ", ".join(categories.names)
  hint = _hint(tag, list(categories.names))
  return f"tag {tag!r} is no class{hint}; the classes are {known}"


def _hint(word: str, words: list[str]) -> str:
  """' (did you mean ...?)', ignoring case; '' if nothing is close."""
  folded = {w.lower(): w for w in words}
  close = difflib.get_close_matches(word.lower(), folded, n=1)
  return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def _image_id(name: str) -> str:
  stem = PurePosixPath(name).with_suffix("").as_posix()
  safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)
  return safe if safe[0] not in ".-" else f"_{safe}"


def _check_ids(train: list[FolderEntry], val: list[FolderEntry]) -> None:
  """Different files must have different ids, over both splits."""
  name_of: dict[str, str] = {}
  for entry in train + val:
    other = name_of.setdefault(entry.image_id, entry.name)
    if other != entry.name:
      raise InputError(
        f"images {other!r} and {entry.name!r} would both be called"
        f" {entry.image_id!r}; rename one (the ending and characters other than"
        " letters, digits, '.', '_' and '-' do not count)"
      )


class ImageFolder:
  """The images of a folder without any labels, for prediction.

  Has what a `RecordSource` has. An image that cannot be decoded is left out,
  with a message.

  Attributes:
    image_ids: N unique strings, which change with the content of a file.
    names: N file names in the folder.
    stems: N unique names without the ending, safe as file names.
    sizes: [N, 2] int32, height and width after EXIF rotation, pixels.
    tags: [N, K] float32, all 0: nothing is known.
  """

  def __init__(self, folder: str | os.PathLike, *, num_classes: int):
    """Lists and decodes every image of `folder`, without its subfolders.

    Raises:
      InputError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
      raise InputError(f"{folder}: no such folder; --input wants one of images")
    kept, digests, self.sizes = [], [], []
    for path in sorted(folder.iterdir()):
      if path.suffix.lower() not in _IMAGE_SUFFIXES:
        continue
      try:
        data = path.read_bytes()
        image = decode_image(data, name=str(path))
      except (InputError, OSError) as error:
        print(f"left out: {error}", file=sys.stderr)
        continue
      kept.append(path)
      digests.append(hashlib.sha256(data).hexdigest()[:16])
      self.sizes.append(image.shape[:2])
    if not kept:
      raise InputError(
        f"{folder}: holds no readable image ({', '.join(_IMAGE_SUFFIXES)})"
      )
    self._paths = kept
    self.sizes = np.array(self.sizes, np.int32)
    self.names = tuple(path.name for path in kept)
    self.stems = tuple(_image_id(name) for name in self.names)
    # Proposals are filed under these, and a file may be replaced by another.
    self.image_ids = tuple(
      f"{stem}-{digest}"
      for stem, digest in zip(self.stems, digests, strict=True)
    )
    self.tags = np.zeros((len(kept), num_classes), np.float32)
    if len(set(self.stems)) < len(kept):
      raise InputError(
        f"{folder}: two images differ only in the ending of their names; "
        "rename one"
      )

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> Record:
    height, width = (int(n) for n in self.sizes[i])
    data = self._paths[i].read_bytes()
    return Record(self.image_ids[i], data, height, width, ())


_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
