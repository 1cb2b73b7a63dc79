"""COCO's panoptic format: PNG files of ids, and one JSON of their segments.

The id of a pixel is R + 256 G + 65536 B, and 0 is void. Only this module knows
the format; everything else works on `PanopticMap`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
  return colours.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


class PanopticFiles(Mapping[str, PanopticMap]):
  """Ground truth by image file name; each map is read when asked for."""

  def __init__(self, folder: Path, entries: dict[str, dict[str, Any]]):
    self._folder = folder
    self._entries = entries

  def __getitem__(self, image_file: str) -> PanopticMap:
    return _read_map(self._folder, **self._entries[image_file])

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)


def read_panoptic(
  json_file: str | os.PathLike,
  folder: str | os.PathLike,
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
    InputError: a file is missing or damaged, a category is unknown, or (at
      look-up) PNG and JSON disagree on ids or size.
  """
  json_file, folder = Path(json_file), Path(folder)
  if not folder.is_dir():
    raise InputError(
      f"{folder}: no such folder; it must hold the PNG files that {json_file}"
      " names"
    )
  data = read_json(json_file)
  if not isinstance(data, dict):
    raise InputError(
      f"{json_file}: holds a {type(data).__name__}, not COCO's object with"
      " 'images' and 'annotations'"
    )
  index_of = {c.id: i for i, c in enumerate(categories.items)}
  _check_categories(json_file, data.get("categories", []), categories)
  images = {
    _field(e, "id", json_file, "an image"): e
    for e in _field(data, "images", json_file, "the JSON")
  }
  entries = {}
  for annotation in _field(data, "annotations", json_file, "the JSON"):
    image_id = _field(annotation, "image_id", json_file, "an annotation")
    where = f"the annotation of image {image_id!r}"
    if image_id not in images:
      raise InputError(
        f"{json_file}: {where} has no entry in 'images'; add the image or"
        " remove the annotation"
      )
    image = images[image_id]
    image_file = _field(image, "file_name", json_file, f"image {image_id!r}")
    if image_file in entries:
      raise InputError(
        f"{json_file}: image {image_file!r} is annotated twice; keep one"
      )
    png = str(_field(annotation, "file_name", json_file, where))
    if Path(png).is_absolute() or ".." in Path(png).parts:
      raise InputError(
        f"{json_file}: {where} names the file {png!r}, which leaves {folder};"
        " give a path inside that folder"
      )
    infos = _field(annotation, "segments_info", json_file, where)
    segments = []
    for info in infos:
      category = _field(info, "category_id", json_file, f"a segment in {where}")
      if category not in index_of:
        raise InputError(
          f"{json_file}: {where} has category_id {category}, which is none of"
          f" the data set's {sorted(index_of)}; correct it or add the class"
        )
      index = index_of[category]
      segments.append(
        Segment(
          id=int(_field(info, "id", json_file, f"a segment in {where}")),
          category=index,
          is_thing=categories.items[index].is_thing,
          score=float(info.get("score", 1.0)),
          area=0,
          is_crowd=bool(info.get("iscrowd", 0)),
        )
      )
    size = (image.get("height"), image.get("width"))
    entries[image_file] = dict(
      png=png, segments=segments, size=size, json_file=json_file
    )
  return PanopticFiles(folder, entries)


def read_json(path: Path) -> Any:
  """Reads a JSON file; InputError if it is missing or damaged."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{path}: no such file; it is needed here") from None
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: is no readable JSON ({error})") from error


def _field(entry: dict[str, Any], name: str, path: Path, what: str) -> Any:
  if not isinstance(entry, dict) or name not in entry:
    found = sorted(entry) if isinstance(entry, dict) else repr(entry)
    raise InputError(f"{path}: {what} has no {name!r}; found {found}")
  return entry[name]


def _check_categories(
  path: Path, found: list[dict[str, Any]], categories: Categories
) -> None:
  """The names that the JSON gives to the ids must be those of the classes."""
  names = {c.id: c.name for c in categories.items}
  for entry in found:
    id_, name = _field(entry, "id", path, "a category"), entry.get("name")
    if id_ in names and name is not None and name != names[id_]:
      raise InputError(
        f"{path}: category {id_} is {name!r} here but {names[id_]!r} among the"
        " data set's classes; use the same ids in both"
      )


def _read_map(
  folder: Path,
  *,
  png: str,
  segments: list[Segment],
  size: tuple[int | None, int | None],
  json_file: Path,
) -> PanopticMap:
  path = folder / png
  try:
    with Image.open(path) as image:
      mode = image.mode
      ids = decode_ids(np.asarray(image)) if mode == "RGB" else None
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file, but {json_file} names it"
    ) from None
  except Exception as error:
    raise InputError(f"{path}: cannot be decoded ({error})") from error
  if ids is None:
    raise InputError(
      f"{path}: is a PNG of mode {mode!r}; ids are stored as 8-bit RGB"
    )
  if None not in size and ids.shape != size:
    raise InputError(
      f"{path}: is {ids.shape[0]} x {ids.shape[1]} (height x width), but"
      f" {json_file} gives {size[0]} x {size[1]}"
    )
  values, areas = np.unique(ids, return_counts=True)
  area_of = dict(zip(values.tolist(), areas.tolist(), strict=True))
  area_of.pop(VOID, None)
  listed = [s.id for s in segments]
  if sorted(listed) != sorted(area_of):
    only_png = sorted(set(area_of) - set(listed))
    only_json = sorted(set(listed) - set(area_of))
    repeated = sorted({i for i in listed if listed.count(i) > 1})
    raise InputError(
      f"{path}: its ids and those of {json_file} differ: only in the PNG"
      f" {only_png}, only in the JSON {only_json}, repeated in the JSON"
      f" {repeated}; every id must occur once in both"
    )
  return PanopticMap(
    ids,
    tuple(
      Segment(s.id, s.category, s.is_thing, s.score, area_of[s.id], s.is_crowd)
      for s in segments
    ),
  )


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
