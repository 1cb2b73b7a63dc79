"""COCO's panoptic format: PNG files of ids, and one JSON of their segments.

The id of a pixel is R + 256 G + 65536 B, and 0 is void. Only this module knows
the format; everything else works on `PanopticMap`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  is_folder,
  read_bytes,
  safe_path,
)
from jtsm_jax.data.json_files import json_field, json_key, read_json, short
from jtsm_jax.data.transforms import MAX_PIXELS
from jtsm_jax.types import (
  VOID,
  Categories,
  InputError,
  PanopticMap,
  Segment,
)


def encode_ids(ids: np.ndarray) -> np.ndarray:
  """Writes segment ids as colours.

  Args:
    ids: [H, W] int32 in [0, 2**24).

  Returns:
    [H, W, 3] uint8 RGB.

  Raises:
    ValueError: an id lies outside that range.
  """
  ids = np.asarray(ids)
  if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
    raise ValueError(
      f"ids lie in [{ids.min()}, {ids.max()}]; a PNG holds 0 .. 2**24 - 1"
    )
  return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)


def decode_ids(colours: np.ndarray) -> np.ndarray:
  """The inverse of `encode_ids`: [H, W, 3] uint8 to [H, W] int32."""
  ids = colours[..., 2].astype(np.int32)  # in place: a third of the time of @
  for channel in (1, 0):
    ids <<= 8
    ids |= colours[..., channel]
  return ids


@dataclasses.dataclass(frozen=True)
class _Entry:
  """What a JSON says of one map, and where its PNG is."""

  source_id: str | int  # of the image
  path: AnyPath
  segments: list[Segment]  # without areas
  size: tuple[int | None, int | None]  # height, width
  json_file: AnyPath


class PanopticFiles(Mapping[str | int, PanopticMap]):
  """Maps by image file name or image id; each map is read when asked for."""

  def __init__(self, entries: dict[str | int, _Entry]):
    """Args: what is known of the map of each image."""
    self._entries = entries

  def part(self, images: Iterable[str | int]) -> PanopticFiles:
    """The maps of some of the images alone."""
    return PanopticFiles({image: self._entries[image] for image in images})

  def source_id(self, image: str | int) -> str | int:
    """The id of an image in the JSON."""
    return self._entries[image].source_id

  def __getitem__(self, image: str | int) -> PanopticMap:
    return _read_map(self._entries[image])

  def __contains__(self, image: object) -> bool:
    return image in self._entries  # Mapping's own would read the map

  def __iter__(self) -> Iterator[str | int]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)


def read_panoptic(
  json_file: PathOrUrl,
  folder: PathOrUrl,
  categories: Categories,
) -> PanopticFiles:
  """Reads COCO panoptic ground truth; the PNG files lazily, one per look-up.

  Args:
    json_file: the JSON with `images` and `annotations`.
    folder: where the PNG files lie.
    categories: the classes; segments name them by `Category.id`.

  Returns:
    A mapping from the `file_name` of an image to its `PanopticMap`, whose areas
    are counted in the PNG.

  Raises:
    InputError: a file is missing or damaged, a category is unknown, a PNG lies
      outside `folder`, or (at look-up) PNG and JSON disagree on ids or size.
  """
  json_file, folder = data_path(json_file), data_path(folder)
  _check_folder(json_file, folder)
  data = read_json(json_file)
  check_categories(json_file, data, categories)
  images = json_images(json_file, data)
  entries = {}
  for image_id, annotation in _annotations(json_file, data):
    image = images.get(json_key(image_id))
    if image is None:
      raise InputError(
        f"{json_file}: the annotation of image {image_id!r} has no entry in"
        " 'images'; add the image or remove the annotation"
      )
    image_file = image["file_name"]
    if image_file in entries:
      raise InputError(
        f"{json_file}: image {image_file!r} is annotated twice; keep one"
      )
    size = (image.get("height"), image.get("width"))
    entries[image_file] = _entry(
      annotation, json_file, folder, categories, size=size
    )
  return PanopticFiles(entries)


def read_panoptic_results(
  json_file: PathOrUrl,
  folder: PathOrUrl,
  categories: Categories,
) -> PanopticFiles:
  """As `read_panoptic`, by image id and without the JSON's `images`.

  COCO's format of results has `annotations` alone.
  """
  json_file, folder = data_path(json_file), data_path(folder)
  _check_folder(json_file, folder)
  data = read_json(json_file)
  check_categories(json_file, data, categories)
  entries = {}
  for image_id, annotation in _annotations(json_file, data):
    if json_key(image_id) is None or image_id in entries:
      raise InputError(
        f"{json_file}: the image_id {image_id!r} of an annotation is no number"
        " or string, or occurs twice; keep one annotation of each image"
      )
    entries[image_id] = _entry(
      annotation, json_file, folder, categories, size=(None, None)
    )
  return PanopticFiles(entries)


def _check_folder(json_file: AnyPath, folder: AnyPath) -> None:
  if not is_folder(folder):
    raise InputError(
      f"{folder}: no such folder; it must hold the PNG files that {json_file}"
      " names"
    )


def _annotations(json_file: AnyPath, data: Any) -> Iterator[tuple[Any, Any]]:
  """Image id and annotation, one after the other."""
  for annotation in json_field(
    data, "annotations", json_file, "the JSON", kind=list
  ):
    image_id = json_field(annotation, "image_id", json_file, "an annotation")
    yield image_id, annotation


def _entry(
  annotation: dict[str, Any],
  json_file: AnyPath,
  folder: AnyPath,
  categories: Categories,
  *,
  size: tuple[int | None, int | None],
) -> _Entry:
  where = f"the annotation of image {annotation['image_id']!r}"
  index_of = {c.id: i for i, c in enumerate(categories.items)}
  png = json_field(annotation, "file_name", json_file, where)
  infos = json_field(annotation, "segments_info", json_file, where, kind=list)
  segments = []
  for info in infos:
    what = f"a segment in {where}"
    category = json_field(info, "category_id", json_file, what)
    index = index_of.get(json_key(category))
    if index is None:
      raise InputError(
        f"{json_file}: {where} has category_id {category}, which is none of"
        f" the data set's {sorted(index_of)}; correct it or add the class"
      )
    segments.append(
      Segment(
        id=json_field(info, "id", json_file, what, kind=int),
        category=index,
        is_thing=categories.items[index].is_thing,
        score=float(info.get("score", 1.0)),
        area=0,
        is_crowd=bool(info.get("iscrowd", 0)),
      )
    )
  return _Entry(
    source_id=annotation["image_id"],
    path=safe_path(folder, png, f"{json_file}: {where}"),
    segments=segments,
    size=size,
    json_file=json_file,
  )


def json_images(path: AnyPath, content: Any) -> dict[Any, dict[str, Any]]:
  """The entries of COCO's list of images by their `id`.

  Args:
    path: of the JSON file, for messages.
    content: of the file.

  Returns:
    Every entry has a `file_name`, which is a string and unique.

  Raises:
    InputError: that is not so, or an id occurs twice.
  """
  if not isinstance(content, dict):
    raise InputError(
      f"{path}: holds a {type(content).__name__}, not COCO's object with"
      " 'images' and 'annotations'"
    )
  images, names = {}, set()
  for entry in json_field(content, "images", path, "the JSON", kind=list):
    id_ = json_field(entry, "id", path, "an image")
    name = json_field(entry, "file_name", path, f"image {id_!r}", kind=str)
    if json_key(id_) is None:
      raise InputError(
        f"{path}: the id of image {name!r} is {short(id_)}; it must be a"
        " number or a string"
      )
    if id_ in images or name in names:
      raise InputError(
        f"{path}: image {id_!r}, {name!r}, has the id or the file_name of"
        " another entry of 'images'; keep one"
      )
    images[id_] = entry
    names.add(name)
  return images


def json_categories(json_file: AnyPath, content: Any, kind: str) -> Categories:
  """The classes that a COCO JSON lists.

  Args:
    json_file: for messages.
    content: of the file.
    kind: "panoptic", or "instances", where all are things.

  Raises:
    InputError: there are none, a field is missing, or an id or a name occurs
      twice.
  """
  entries = json_field(content, "categories", json_file, "the JSON", kind=list)
  seen: set[int | str] = set()
  for entry in entries:
    id_ = json_field(entry, "id", json_file, "a category", kind=int)
    what = f"category {id_}"
    name = json_field(entry, "name", json_file, what, kind=str)
    if kind == "panoptic":
      json_field(entry, "isthing", json_file, what, kind=int)
    if id_ in seen or name in seen:
      raise InputError(
        f"{json_file}: the id or the name of {what}, {name!r}, occurs twice in"
        " 'categories'; each needs its own"
      )
    seen |= {id_, name}
  if not entries:
    raise InputError(f"{json_file}: 'categories' is empty; list the classes")
  if kind == "instances":
    entries = [entry | {"isthing": 1} for entry in entries]
  return Categories.from_list(entries)


def check_categories(
  path: AnyPath, content: Any, categories: Categories
) -> None:
  """Checks that a COCO JSON means the same classes by the same ids.

  Args:
    path: of the JSON file, for messages.
    content: of the file; its list of categories is optional.
    categories: the data set's classes.

  Raises:
    InputError: the JSON gives another name to an id.
  """
  names = {c.id: c.name for c in categories.items}
  found = content.get("categories", []) if isinstance(content, dict) else []
  for entry in found:
    id_ = json_key(json_field(entry, "id", path, "a category"))
    name = entry.get("name")
    if id_ in names and name is not None and name != names[id_]:
      raise InputError(
        f"{path}: category {id_} is {name!r} here but {names[id_]!r} among the"
        " data set's classes; use the same ids in both"
      )


def _read_map(entry: _Entry) -> PanopticMap:
  ids = _read_ids(entry.path, entry.size, entry.json_file)
  values, areas = np.unique(ids, return_counts=True)
  area_of = dict(zip(values.tolist(), areas.tolist(), strict=True))
  area_of.pop(VOID, None)
  listed = [s.id for s in entry.segments]
  if sorted(listed) != sorted(area_of):
    only_png = sorted(set(area_of) - set(listed))
    only_json = sorted(set(listed) - set(area_of))
    repeated = sorted({i for i in listed if listed.count(i) > 1})
    raise InputError(
      f"{entry.path}: its ids and those of {entry.json_file} differ: only in"
      f" the PNG {only_png}, only in the JSON {only_json}, repeated in the JSON"
      f" {repeated}; every id must occur once in both"
    )
  return PanopticMap(
    ids,
    tuple(
      Segment(s.id, s.category, s.is_thing, s.score, area_of[s.id], s.is_crowd)
      for s in entry.segments
    ),
  )


def _read_ids(
  path: AnyPath, size: tuple[int | None, int | None], json_file: AnyPath
) -> np.ndarray:
  """Decodes a PNG once its header agrees with the JSON."""
  try:
    image = Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",))
    width, height = image.size
    if image.mode != "RGB":
      raise InputError(
        f"{path}: is a PNG of mode {image.mode!r}; ids are stored as 8-bit RGB"
      )
    if None not in size and (height, width) != size:
      raise InputError(
        f"{path}: is {height} x {width} (height x width), but {json_file} gives"
        f" {size[0]} x {size[1]}"
      )
    if height * width > MAX_PIXELS:
      raise InputError(
        f"{path}: {height} x {width} pixels are more than the limit of"
        f" {MAX_PIXELS}; scale the image and its masks down"
      )
    return decode_ids(np.asarray(image))
  except InputError:
    raise
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file, but {json_file} names it"
    ) from None
  except Exception as error:  # Pillow raises whatever it meets.
    raise InputError(f"{path}: cannot be decoded ({error})") from error


def write_panoptic_png(path: str | os.PathLike, ids: np.ndarray) -> None:
  """Writes [H, W] int32 segment ids as a PNG; ValueError as `encode_ids`."""
  Image.fromarray(encode_ids(ids)).save(path, format="PNG")


def panoptic_annotation(
  image_id: str | int,
  file_name: str,
  panoptic: PanopticMap,
  categories: Categories,
) -> dict[str, Any]:
  """The JSON entry of one panoptic map.

  Args:
    image_id: the id of the image in the JSON's `images`.
    file_name: of the PNG.
    panoptic: the map.
    categories: class index -> the data set's id.

  Returns:
    COCO's annotation; `bbox` is [x, y, width, height], `area` is in pixels, and
    each segment also has `isthing` and `score`.

  Raises:
    ValueError: the segments are not the ids of the map.
  """
  found = set(np.unique(panoptic.ids).tolist()) - {VOID}
  listed = [s.id for s in panoptic.segments]
  if sorted(listed) != sorted(found):
    raise ValueError(
      f"panoptic of image {image_id!r} lists the segments {sorted(listed)},"
      f" but its ids are {sorted(found)}; they must be the same"
    )
  infos = []
  for segment in panoptic.segments:
    mask = panoptic.ids == segment.id
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, x0 = int(rows[0]), int(columns[0])
    infos.append(
      {
        "id": int(segment.id),
        "category_id": categories.items[segment.category].id,
        "isthing": int(segment.is_thing),
        "area": int(mask.sum()),
        "bbox": [x0, y0, int(columns[-1]) + 1 - x0, int(rows[-1]) + 1 - y0],
        "iscrowd": int(segment.is_crowd),
        "score": float(segment.score),
      }
    )
  return {
    "image_id": image_id,
    "file_name": file_name,
    "segments_info": infos,
  }


def write_panoptic(
  json_file: str | os.PathLike,
  folder: str | os.PathLike,
  maps: Iterable[tuple[str | int, str, PanopticMap]],
  categories: Categories,
) -> None:
  """Writes panoptic maps as PNG files and one JSON.

  Args:
    json_file: written last and atomically, so that it names complete files.
    folder: of the PNG files; made if it is absent.
    maps: (image id, image file name, map); the PNG gets the image's file name
      with the ending `.png`.
    categories: the classes.

  Raises:
    ValueError: two images would share a PNG, or a map is inconsistent.
  """
  json_file, folder = Path(json_file), Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  images, annotations, written = [], [], set()
  for image_id, image_file, panoptic in maps:
    png = Path(image_file).with_suffix(".png").as_posix()
    if png in written:
      raise ValueError(
        f"two images would be written to {png!r}; their file names must differ"
        " in more than the ending"
      )
    written.add(png)
    (folder / png).parent.mkdir(parents=True, exist_ok=True)
    annotations.append(panoptic_annotation(image_id, png, panoptic, categories))
    write_panoptic_png(folder / png, panoptic.ids)
    height, width = panoptic.ids.shape
    images.append(
      {
        "id": image_id,
        "file_name": image_file,
        "height": height,
        "width": width,
      }
    )
  content = {
    "images": images,
    "annotations": annotations,
    "categories": categories.to_list(),
  }
  json_file.parent.mkdir(parents=True, exist_ok=True)
  partial = json_file.with_name(json_file.name + ".partial")
  partial.write_text(json.dumps(content), encoding="utf-8")
  partial.replace(json_file)
