"""A data set of one's own: a folder of images and a table of their tags.

    classes.json         [{"id": 1, "name": "cow", "isthing": 1}, ...]
    images/              JPEG, PNG, ...; folders inside it are allowed
    train_tags.csv       image,tags     a.jpg,cow;grass
      or train_tags.json   {"a.jpg": ["cow", "grass"], ...}
    val_tags.csv         the same, optional, or val_tags.json

and, optionally, the ground truth of "val" in one of these forms:

    panoptic_val.json    COCO's panoptic format, with
    panoptic_val/        its PNG files
    instances_val.json   COCO's instance format
    labels_val/          a PNG file of class ids for each image

Training reads the first three only.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import io
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import cv2
import numpy as np
from PIL import Image

from jtsm_jax.data.coco import read_instances
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  check_names,
  composed,
  data_path,
  file_lookup,
  file_names,
  file_size,
  folder_name,
  is_file,
  is_folder,
  is_local,
  names_in,
  read_bytes,
  read_file,
  safe_name,
  safe_path,
)
from jtsm_jax.data.json_files import read_json
from jtsm_jax.data.panoptic_files import read_panoptic
from jtsm_jax.data.source import LazyRecords, Source
from jtsm_jax.data.transforms import MAX_PIXELS
from jtsm_jax.types import (
  VOID,
  Categories,
  InputError,
  PanopticMap,
  Record,
  Segment,
)

_LAYOUT = (
  "a data folder holds classes.json, images/ and train_tags.csv (or .json)"
)
_TABLE_SUFFIXES = (".csv", ".json")
_TRUTHS = ("panoptic_val.json", "instances_val.json", "labels_val")


@dataclasses.dataclass(frozen=True)
class FolderEntry:
  """One image of a table of tags.

  Attributes:
    image_id: made from `name`: without the ending, safe as a file name.
    name: the image as the table names it, relative to `images/`; in NFC.
    path: of the file.
    tags: class indices, ascending.
  """

  image_id: str
  name: str
  path: AnyPath
  tags: tuple[int, ...]


def read_folder(
  root: PathOrUrl,
) -> tuple[Categories, list[FolderEntry], list[FolderEntry]]:
  """Reads and checks the classes and the tables of tags; opens no image.

  Args:
    root: the folder or its URL; its layout is that of the module's docstring.

  Returns:
    (classes, training entries, validation entries), entries in the order of the
    tables. Without a table for them there are no validation entries.

  Raises:
    InputError: anything in the folder that is missing, unknown or inconsistent.
  """
  root = data_path(root)
  if not is_folder(root):
    raise InputError(f"{root}: no such folder; {_LAYOUT}")
  if not is_file(root / "classes.json"):
    raise InputError(f"{root / 'classes.json'}: no such file; {_LAYOUT}")
  train_table, val_table = _table(root, "train"), _table(root, "val")
  if train_table is None:
    raise InputError(f"{root / 'train_tags.csv'}: no such file; {_LAYOUT}")
  if not is_folder(root / "images"):
    raise InputError(f"{root / 'images'}: no such folder; {_LAYOUT}")
  categories = _read_classes(root / "classes.json")
  train = _read_tags(train_table, categories, need_tags=True)
  if not train:
    raise InputError(f"{train_table}: has no rows; list the training images")
  val = []
  if val_table is not None:
    val = _read_tags(val_table, categories, need_tags=False)
  _check_ids(train, val)
  return categories, train, val


def folder_source(root: PathOrUrl, *, name: str | None = None) -> Source:
  """The folder as a data set for `prepare`.

  Args:
    root: the folder or its URL.
    name: of the data set; the folder's name if None.

  Returns:
    Training records without ground truth. Validation records have a `target`
    where there is a `panoptic_val.json` or `labels_val/`, and `instances` where
    there is an `instances_val.json`.

  Raises:
    InputError: as `read_folder`, and where there is ground truth of more than
      one form, or it lacks a validation image or is damaged.
  """
  root = data_path(root)
  categories, train, val = read_folder(root)
  _report(root, categories, train, val)
  found = names_in(root)
  truths = [root / name for name in _TRUTHS if name in found]
  if len(truths) > 1:
    raise InputError(
      f"{root}: holds ground truth of {len(truths)} forms,"
      f" {' and '.join(path.name for path in truths)}; keep one"
    )
  if truths and not val:
    print(
      f"{truths[0]} is not used, since no val_tags.csv lists an image",
      file=sys.stderr,
    )
  splits = {"train": LazyRecords(len(train), lambda i: _record(train[i]))}
  if val:
    read = _truth_reader(truths[0], categories, val) if truths else _record
    splits["val"] = LazyRecords(len(val), lambda i: read(val[i]))
  return Source(
    name=name or folder_name(root.resolve()),
    categories=categories,
    splits=splits,
    state=_state(root, train, val),
  )


def folder_state(root: PathOrUrl) -> str:
  """16 hexadecimal digits that change with a table or the size of a file.

  Of `panoptic_val/` only the JSON that lists its files is looked at.

  Args:
    root: the folder or its URL; "" is returned for what is not on this machine.

  Raises:
    InputError: as `read_folder`.
  """
  root = data_path(root)
  _, train, val = read_folder(root)
  return _state(root, train, val)


def _state(root, train, val) -> str:
  if not is_local(root):
    return ""  # a request for every image would take long
  tables = [root / "classes.json", _table(root, "train"), _table(root, "val")]
  # A training calls this, which may not even list the folders of masks.
  files = [root / name for name in _TRUTHS]
  files = [path for path in files if is_file(path)]
  labels = (_label_file(root / "labels_val", entry, is_file) for entry in val)
  files += filter(None, labels)
  digest = hashlib.sha256()
  for path in filter(None, tables):
    digest.update(read_file(path))
  for path in [*(entry.path for entry in train + val), *files]:
    name = path.relative_to(root).as_posix()
    digest.update(f"\n{name} {file_size(path)}".encode())
  return digest.hexdigest()[:16]


def _record(
  entry: FolderEntry, *, height: int = 0, width: int = 0, **truth
) -> Record:
  image = read_file(entry.path)
  return Record(
    entry.image_id,
    image,
    height,
    width,
    entry.tags,
    file_name=entry.name,
    **truth,
  )


def _truth_reader(
  path: AnyPath, categories: Categories, entries: list[FolderEntry]
) -> Callable[[FolderEntry], Record]:
  """What reads a record with its ground truth, which all entries must have."""
  if path.name == "labels_val":
    if not is_folder(path):
      raise InputError(f"{path}: is no folder; it must hold PNG files")
    exists = file_lookup()
    files = {entry.name: _label_file(path, entry, exists) for entry in entries}
    _check_lacking(path, [name for name, file in files.items() if not file])
    return lambda entry: _record(
      entry, target=_read_labels(files[entry.name], categories)
    )
  if path.name == "instances_val.json":
    instances = read_instances(path, categories)
    spelt = {composed(name): name for name in instances}
    _check_lacking(path, [e.name for e in entries if e.name not in spelt])

    def read(entry: FolderEntry) -> Record:
      name = spelt[entry.name]
      height, width = instances.size(name)
      return _record(
        entry,
        height=height,
        width=width,
        instances=instances[name],
        source_id=instances.source_id(name),
      )

    return read
  targets = read_panoptic(path, path.with_suffix(""), categories)
  spelt = {composed(name): name for name in targets}
  _check_lacking(path, [e.name for e in entries if e.name not in spelt])

  def read_map(entry: FolderEntry) -> Record:
    name = spelt[entry.name]
    return _record(
      entry, target=targets[name], source_id=targets.source_id(name)
    )

  return read_map


def _check_lacking(path: AnyPath, names: list[str]) -> None:
  if names:
    raise InputError(
      f"{path}: {len(names)} images of the table of validation images have no"
      f" annotation, e.g. {names[0]!r}; add it or remove the row"
    )


def _label_file(
  folder: AnyPath, entry: FolderEntry, exists: Callable[[AnyPath], bool]
) -> AnyPath | None:
  name = PurePosixPath(entry.name).with_suffix(".png").as_posix()
  where = f"{folder}: the labels of {entry.name!r}"
  return _find(folder, name, where, exists)


def _find(
  folder: AnyPath, name: str, where: str, exists: Callable[[AnyPath], bool]
) -> AnyPath | None:
  """The file that a table names, in whichever form Unicode spells it."""
  spellings = (name, *(unicodedata.normalize(f, name) for f in ("NFC", "NFD")))
  files = (safe_path(folder, n, where) for n in dict.fromkeys(spellings))
  return next(filter(exists, files), None)


def _read_labels(path: AnyPath, categories: Categories) -> PanopticMap:
  """Reads a PNG file of class ids.

  Touching things of one class cannot be told apart: each connected region is
  one thing. All of a stuff class is one segment.
  """
  labels = _decode_labels(path)
  found = set(np.unique(labels).tolist())
  unknown = sorted(found - {c.id for c in categories.items} - {0, 255})
  if unknown:
    raise InputError(
      f"{path}: has pixels of the values {unknown[:10]}, which are no ids of"
      " classes.json; correct them, or write 0 or 255 where there is no class"
    )
  ids = np.full(labels.shape, VOID, np.int32)
  segments: list[Segment] = []
  for index, category in enumerate(categories.items):
    if category.id not in found:
      continue
    mask = labels == category.id
    regions = mask.astype(np.int32)
    if category.is_thing:
      _, regions = cv2.connectedComponents(
        mask.astype(np.uint8), connectivity=8
      )
    before = len(segments)
    ids[mask] = regions[mask] + before
    areas = np.bincount(regions[mask])[1:]
    segments += [
      Segment(before + n, index, category.is_thing, 1.0, int(area))
      for n, area in enumerate(areas, 1)
    ]
  return PanopticMap(ids, tuple(segments))


def _decode_labels(path: AnyPath) -> np.ndarray:
  """The values of a PNG file, [H, W] int32."""
  data = read_file(path)
  # Pillow stretches grey of fewer than 8 bits, so the file's own header counts.
  depth, colour = (*data[24:26], 0, 0)[:2]
  try:
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    width, height = image.size
    palette, grey = colour == 3, colour == 0 and depth in (8, 16)
    if not (palette or grey):
      raise InputError(
        f"{path}: is a PNG of {depth} bits and colour type {colour}; class ids"
        " are stored as a palette or as grey of 8 or 16 bits"
      )
    if height * width > MAX_PIXELS:
      raise InputError(
        f"{path}: {height} x {width} pixels are more than the limit of"
        f" {MAX_PIXELS}; scale the image and its labels down"
      )
    return np.asarray(image).astype(np.int32)
  except InputError:
    raise
  except Exception as error:  # Pillow raises whatever it meets.
    raise InputError(f"{path}: cannot be decoded ({error})") from error


def _report(
  root: AnyPath,
  categories: Categories,
  train: list[FolderEntry],
  val: list[FolderEntry],
) -> None:
  """Says on stderr which classes and files of the folder are not used."""
  tagged = {index for entry in train for index in entry.tags}
  never = [n for i, n in enumerate(categories.names) if i not in tagged]
  if never:
    print(
      f"{root}: no training image is tagged with {', '.join(never)}; nothing is"
      " learnt of what no image shows",
      file=sys.stderr,
    )
  listed = {PurePosixPath(entry.name).as_posix() for entry in train + val}
  names = map(composed, file_names(root / "images"))
  unused = sum(name not in listed for name in names)
  if unused:
    print(
      f"{root}: {unused} files in images/ are in no table of tags; they are"
      " not used",
      file=sys.stderr,
    )
  both = {entry.name for entry in train} & {entry.name for entry in val}
  if both:
    print(
      f"{root}: {len(both)} images are in both tables of tags, train and val,"
      f" e.g. {min(both)!r}; figures measured on them are too good",
      file=sys.stderr,
    )


def _read_classes(path: AnyPath) -> Categories:
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
  for field, values in {
    "id": [entry["id"] for entry in entries],
    "name": [composed(entry["name"]) for entry in entries],
  }.items():
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
      raise InputError(
        f"{path}: the {field} {repeated[0]!r} occurs twice; each class needs"
        " its own"
      )
  return Categories.from_list(entries)


def _table(root: AnyPath, split: str) -> AnyPath | None:
  """The table of a split, of either form."""
  csv_file, json_file = (root / f"{split}_tags{end}" for end in _TABLE_SUFFIXES)
  found = [path for path in (csv_file, json_file) if is_file(path)]
  if len(found) > 1:
    raise InputError(
      f"{root}: holds {csv_file.name} and {json_file.name}; keep one"
    )
  return found[0] if found else None


def _read_tags(
  path: AnyPath, categories: Categories, *, need_tags: bool
) -> list[FolderEntry]:
  images = path.parent / "images"
  index_of = {composed(name): i for i, name in enumerate(categories.names)}
  entries, place_of, exists = [], {}, file_lookup()
  rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
  for place, name, names in rows:
    where = f"{path}, {place}"
    file = _find(images, name, where, exists)
    if file is None:
      raise _no_image(images, name, where)
    if file in place_of:
      raise InputError(
        f"{where}: image {name!r} is also in {place_of[file]}; keep one row"
      )
    place_of[file] = place
    unknown = [tag for tag in names if composed(tag) not in index_of]
    if unknown:
      known = ", ".join(categories.names)
      raise InputError(
        f"{where}: tag {unknown[0]!r} is no class"
        f"{_tag_hint(unknown[0], path, categories)}; the classes are {known}"
      )
    if need_tags and not names:
      raise InputError(
        f"{where}: image {name!r} has no tags; a training image needs at least"
        " one: add it, remove the row, or, where it shows none of the classes,"
        " make a stuff class of what it shows, such as 'background'"
      )
    tags = tuple(sorted({index_of[composed(tag)] for tag in names}))
    name = composed(name)
    entries.append(FolderEntry(_image_id(name), name, file, tags))
  return entries


def _json_rows(path: AnyPath) -> Iterator[tuple[str, str, list[str]]]:
  """Yields (place in the file, image, tags) of a JSON file."""
  table = read_json(path, unique_keys=True)
  wanted = '{"a.jpg": ["cow", "grass"], ...}'
  if not isinstance(table, dict):
    raise InputError(f"{path}: holds a {type(table).__name__}; wanted {wanted}")
  for name, tags in table.items():
    if not isinstance(tags, list) or not all(isinstance(t, str) for t in tags):
      raise InputError(
        f"{path}, entry {name!r}: {tags!r} is no list of tags; wanted {wanted}"
      )
    yield f"entry {name!r}", name, tags


def _csv_rows(path: AnyPath) -> Iterator[tuple[str, str, list[str]]]:
  """Yields (place in the file, image, tags) of a CSV file."""
  try:
    text = read_bytes(path).decode("utf-8-sig")
    reader = csv.DictReader(
      io.StringIO(text, newline=""), skipinitialspace=True, strict=True
    )
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
      names = [tag.strip() for tag in tags.split(";") if tag.strip()]
      yield f"line {reader.line_num}", name.strip(), names
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(
      f"{path}: is no readable CSV in UTF-8 ({error}); save it as such"
    ) from error


def _no_image(images: AnyPath, name: str, where: str) -> InputError:
  hint = _hint(name, file_names(images))
  return InputError(
    f"{where}: image {name!r} is not in {images}{hint}; add it or remove the"
    " row"
  )


def _tag_hint(tag: str, path: AnyPath, categories: Categories) -> str:
  # Spreadsheets put such a cell into quotes, so it is one value.
  if path.suffix == ".csv" and "," in tag:
    return "; separate the tags of an image by ';', not by ','"
  return _hint(tag, list(categories.names))


def _hint(word: str, words: list[str]) -> str:
  """' (did you mean ...?)', ignoring case; '' if nothing is close."""
  folded = {w.lower(): w for w in words}
  close = difflib.get_close_matches(word.lower(), folded, n=1)
  return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def _image_id(name: str) -> str:
  stem = PurePosixPath(name).with_suffix("").as_posix()
  return safe_name(stem)


def _check_ids(train: list[FolderEntry], val: list[FolderEntry]) -> None:
  """Different files must have different ids, over both splits."""
  check_names({entry.name: entry.image_id for entry in train + val})
