"""COCO 2017 as its files come, for panoptic and for instance segmentation.

    annotations/panoptic_train2017.json    with the folder panoptic_train2017/
    annotations/instances_train2017.json
    train2017/                             JPEG files
    ...                                    the same for val2017

The JSON files and the folders of PNG files may also lie beside `annotations/`,
and the images of all sets in one folder `images/`.

A training image gets the classes of its annotations as tags, and no more: its
PNG file is never opened and its polygons are never drawn.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  file_lookup,
  is_file,
  is_folder,
  read_file,
  safe_name,
  safe_path,
)
from jtsm_jax.data.json_files import json_field, json_key, read_json
from jtsm_jax.data.panoptic_files import (
  check_categories,
  json_categories,
  json_images,
  read_panoptic,
)
from jtsm_jax.data.run_lengths import read_runs
from jtsm_jax.data.source import LazyRecords, Source
from jtsm_jax.data.transforms import MAX_PIXELS
from jtsm_jax.types import (
  Categories,
  InputError,
  Instances,
  PanopticMap,
  Record,
)

_VAL_SET = "val2017"

_COCO = """\
@inproceedings{lin2014coco,
  title = {Microsoft {COCO}: Common Objects in Context},
  author = {Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James
    and Perona, Pietro and Ramanan, Deva and Doll{\\'a}r, Piotr and Zitnick, C.
    Lawrence},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages = {740--755},
  year = {2014}
}
"""

_PANOPTIC = """\
@inproceedings{kirillov2019panoptic,
  title = {Panoptic Segmentation},
  author = {Kirillov, Alexander and He, Kaiming and Girshick, Ross and Rother,
    Carsten and Doll{\\'a}r, Piotr},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition
    (CVPR)},
  pages = {9404--9413},
  year = {2019}
}
"""


def coco_panoptic_source(
  root: PathOrUrl,
  *,
  train_set: str = "train2017",
  val_set: str = _VAL_SET,
) -> Source:
  """COCO with its 80 things and 53 stuff classes.

  The classes are those that the JSON of the training set lists.

  Args:
    root: the folder or its URL; its layout is that of the module's docstring.
    train_set: whose images are trained on.
    val_set: whose images are measured on; "" for none. The default may be
      absent. With `train_set` the figures say nothing of other images.

  Returns:
    Training records with tags alone; validation records with a `target`. Images
    without a tag are left out of "train", with a message on stderr.

  Raises:
    InputError: a file is missing or damaged, a name leads out of its folder, an
      id of an image or a class is unknown, or two images of a set have the same
      name without the ending.
  """
  return _source("panoptic", data_path(root), train_set, val_set)


def coco_instances_source(
  root: PathOrUrl,
  *,
  train_set: str = "train2017",
  val_set: str = _VAL_SET,
) -> Source:
  """COCO with its 80 things.

  Args:
    root: the folder or its URL; its layout is that of the module's docstring.
    train_set: whose images are trained on.
    val_set: whose images are measured on; as in `coco_panoptic_source`.

  Returns:
    Training records with tags alone; validation records with `instances`, and
    with the height and width that the JSON gives. Images without a tag are left
    out of "train", with a message on stderr.

  Raises:
    InputError: as `coco_panoptic_source`, and where `read_instances` raises it.
  """
  return _source("instances", data_path(root), train_set, val_set)


class InstanceFile(Mapping[str, Instances]):
  """Ground truth by image file name; masks are made when it is asked for."""

  def __init__(self, images: dict[str, _Annotated]):
    """Args: the image files and what is annotated in each."""
    self._images = images

  def __getitem__(self, image_file: str) -> Instances:
    image = self._images[image_file]
    found = image.found
    boxes = np.array([a.bbox for a in found], np.float64).reshape(-1, 4)
    x, y, width, height = boxes.T
    return Instances(
      category=np.array([a.category for a in found], np.int32),
      boxes=np.stack([y, x, y + height, x + width], -1),
      area=np.array([a.area for a in found], np.float64),
      is_crowd=np.array([a.is_crowd for a in found], bool),
      is_difficult=np.zeros(len(found), bool),
      rles=tuple(_rle(a.segmentation, *image.size) for a in found),
    )

  def size(self, image_file: str) -> tuple[int, int]:
    """Height and width of an image and its masks, pixels."""
    return self._images[image_file].size

  def source_id(self, image_file: str) -> int | str:
    """The id of an image in the JSON."""
    return self._images[image_file].source_id

  def __iter__(self) -> Iterator[str]:
    return iter(self._images)

  def __len__(self) -> int:
    return len(self._images)


@dataclasses.dataclass(frozen=True)
class _Annotation:
  category: int  # class index
  bbox: tuple[float, ...]  # COCO's x, y, width, height
  area: float
  is_crowd: bool
  segmentation: Any  # checked, as the JSON has it


@dataclasses.dataclass(frozen=True)
class _Annotated:
  source_id: int | str
  size: tuple[int, int]
  found: list[_Annotation] = dataclasses.field(default_factory=list)


def read_instances(
  json_file: PathOrUrl, categories: Categories
) -> InstanceFile:
  """Reads COCO's instance annotations and checks all of them.

  Args:
    json_file: the JSON with `images` and `annotations`; a `segmentation` is a
      list of polygons or an RLE, compressed or not.
    categories: the classes; annotations name them by `Category.id`.

  Returns:
    A mapping from the `file_name` of every image to its `Instances`, in the
    order of the JSON.

  Raises:
    InputError: the file is missing or damaged, an image has no size or more
      than `MAX_PIXELS` pixels, an annotation is of an unknown image or class or
      of stuff, or its box, area or mask is none. A mask is none if it is an RLE
      of another size than its image, or a polygon of fewer than 3 points or far
      outside of the image.
  """
  json_file = data_path(json_file)
  content = read_json(json_file)
  check_categories(json_file, content, categories)
  entries = json_images(json_file, content)
  images = {
    id_: _Annotated(id_, _size(entry, json_file))
    for id_, entry in entries.items()
  }
  index_of = {c.id: i for i, c in enumerate(categories.items)}
  for annotation in json_field(
    content, "annotations", json_file, "the JSON", kind=list
  ):
    id_ = _image_of(annotation, images, json_file)
    where = f"{json_file}: annotation {annotation.get('id')!r} of image {id_!r}"
    category = _class_of(annotation, index_of, where)
    image = images[id_]
    if not categories.items[category].is_thing:
      raise InputError(
        f"{where} is of {categories.items[category].name!r}, which is stuff;"
        " only things have instances: make it a thing or remove the annotation"
      )
    image.found.append(_annotation(annotation, category, image.size, where))
  return InstanceFile({e["file_name"]: images[i] for i, e in entries.items()})


def _annotation(
  entry: dict[str, Any], category: int, size: tuple[int, int], where: str
) -> _Annotation:
  bbox, area = entry.get("bbox"), entry.get("area")
  if _numbers(bbox) != 4 or min(bbox[2:]) < 0:
    raise InputError(
      f"{where} has the bbox {bbox!r}; it must be [x, y, width, height]"
    )
  if _numbers([area]) != 1 or area < 0:
    raise InputError(
      f"{where} has the area {area!r}; it must be a number of pixels"
    )
  if entry.get("iscrowd", 0) not in (0, 1):
    raise InputError(
      f"{where} has iscrowd {entry['iscrowd']!r}; it must be 0 or 1"
    )
  segmentation = entry.get("segmentation")
  if isinstance(segmentation, dict):
    _check_rle(segmentation, size, where)
  else:
    _check_polygons(segmentation, size, where)
  return _Annotation(
    category=category,
    bbox=tuple(bbox),
    area=float(area),
    is_crowd=bool(entry.get("iscrowd", 0)),
    segmentation=segmentation,
  )


def _numbers(values: Any) -> int:
  """How many numbers a list holds; -1 if one is none, NaN or absurd."""
  fine = isinstance(values, list) and all(
    isinstance(v, int | float) and abs(v) < 1e12 for v in values
  )
  return len(values) if fine else -1


def _check_polygons(polygons: Any, size: tuple[int, int], where: str) -> None:
  if not isinstance(polygons, list) or not polygons:
    raise InputError(
      f"{where} has no mask; 'segmentation' must be a list of polygons or an"
      " RLE"
    )
  height, width = size
  for polygon in polygons:
    count = _numbers(polygon)
    if count < 6 or count % 2:
      raise InputError(
        f"{where} has a polygon that is no list x0, y0, x1, y1, ... of at least"
        " 6 finite numbers; correct or remove it"
      )
    # pycocotools takes memory for every pixel that an edge passes, and official
    # polygons are never farther out than rounding errors.
    xs, ys = polygon[::2], polygon[1::2]
    if not (
      -width <= min(xs) <= max(xs) <= 2 * width
      and -height <= min(ys) <= max(ys) <= 2 * height
    ):
      raise InputError(
        f"{where} has a polygon with x in [{min(xs)}, {max(xs)}] and y in"
        f" [{min(ys)}, {max(ys)}], far outside of its image of {height} x"
        f" {width} (height x width); correct it"
      )


def _check_rle(rle: dict[str, Any], size: tuple[int, int], where: str) -> None:
  if rle.get("size") != list(size):
    raise InputError(
      f"{where} has an RLE of the size {rle.get('size')!r}, but the image is"
      f" {list(size)} (height, width); they must agree"
    )
  counts = rle.get("counts")
  try:
    if isinstance(counts, str):
      runs = read_runs(counts.encode("ascii"))
    elif _numbers(counts) > 0 and all(isinstance(c, int) for c in counts):
      runs = np.array(counts, np.int64)
    else:
      raise ValueError("'counts' is neither a string nor a list of integers")
    pixels = math.prod(size)
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
      raise ValueError(f"its runs add up to {runs.sum()} pixels")
  except (ValueError, OverflowError) as error:  # Encoding raises them, too.
    raise InputError(
      f"{where} has an RLE that is damaged ({error}); its runs must fill the"
      f" image of {size[0]} x {size[1]}"
    ) from error


def _rle(segmentation: Any, height: int, width: int) -> bytes:
  """Compressed counts of a mask that was checked."""
  if isinstance(segmentation, list):
    parts = mask_utils.frPyObjects(segmentation, height, width)
    return mask_utils.merge(parts)["counts"]
  if isinstance(segmentation["counts"], str):
    return segmentation["counts"].encode("ascii")
  return mask_utils.frPyObjects(segmentation, height, width)["counts"]


def _size(image: dict[str, Any], json_file: AnyPath) -> tuple[int, int]:
  height, width = image.get("height"), image.get("width")
  ok = isinstance(height, int) and isinstance(width, int)
  if not ok or min(height, width) < 1 or height * width > MAX_PIXELS:
    raise InputError(
      f"{json_file}: image {image['file_name']!r} has the height {height!r} and"
      f" the width {width!r}; they must be numbers of pixels, at most"
      f" {MAX_PIXELS} in all"
    )
  return height, width


def _image_of(annotation: Any, images: Mapping[Any, Any], path: AnyPath) -> Any:
  id_ = json_field(annotation, "image_id", path, "an annotation")
  if json_key(id_) not in images:
    raise InputError(
      f"{path}: an annotation of image {id_!r} has no entry in 'images'; add"
      " the image or remove the annotation"
    )
  return id_


def _class_of(entry: Any, index_of: Mapping[int, int], where: str) -> int:
  category = entry.get("category_id") if isinstance(entry, dict) else None
  index = index_of.get(json_key(category))
  if index is None:
    raise InputError(
      f"{where} has category_id {category!r}, which is none of"
      f" {sorted(index_of)}; correct it or add the class"
    )
  return index


@dataclasses.dataclass(frozen=True)
class _Image:
  image_id: str
  source_id: int | str
  name: str  # file_name of the JSON
  path: AnyPath
  tags: tuple[int, ...]


def _source(kind: str, root: AnyPath, train_set: str, val_set: str) -> Source:
  if not is_folder(root):
    raise InputError(
      f"{root}: no such folder; it must hold annotations/ and {train_set}/ of"
      " COCO"
    )
  json_file = _find_json(root, kind, train_set)
  if json_file is None:
    raise _no_json(root, kind, train_set)
  categories, images = _read_set(json_file, kind, root, train_set)
  train = [image for image in images if image.tags]
  if not train:
    raise InputError(f"{json_file}: no image has an annotation to train on")
  if len(train) < len(images):
    _note(
      f"{json_file}: {len(images) - len(train)} of {len(images)} images have no"
      " annotation, so no tags; they are left out of the training"
    )
  splits = {"train": _records(train)}
  val_json = _find_json(root, kind, val_set) if val_set else None
  if val_set and val_json is None and val_set != _VAL_SET:
    raise _no_json(root, kind, val_set)
  if val_json is not None:
    val = images
    if val_json != json_file:
      val_categories, val = _read_set(val_json, kind, root, val_set)
      if val_categories != categories:
        raise InputError(
          f"{val_json}: has other categories than {json_file}; both must list"
          " the same, in the same order"
        )
    splits["val"] = _val_records(kind, root, val_json, categories, val)
    val_path = {image.image_id: image.path for image in val}
    both = [image for image in train if image.image_id in val_path]
    for image in both:  # what is made of images is filed under their names
      other = val_path[image.image_id]
      if image.path != other:
        raise InputError(
          f"the images {image.path} and {other} would both be called"
          f" {image.image_id!r}; rename one"
        )
    if both:
      _note(
        f"{val_json}: {len(both)} images are trained on, too, e.g."
        f" {min(image.image_id for image in both)!r}; figures measured on them"
        " are too good"
      )
  return Source(
    name=f"coco2017_{kind}",
    categories=categories,
    splits=splits,
    citation=_COCO + (_PANOPTIC if kind == "panoptic" else ""),
  )


def _note(text: str) -> None:
  print(text, file=sys.stderr)


def _find_json(root: AnyPath, kind: str, set_name: str) -> AnyPath | None:
  name = f"{kind}_{set_name}.json"
  for folder in (root / "annotations", root):
    path = safe_path(folder, name, f"the set {set_name!r}")
    if is_file(path):
      return path
  return None


def _no_json(root: AnyPath, kind: str, set_name: str) -> InputError:
  return InputError(
    f"{root}: holds no annotations/{kind}_{set_name}.json; download it from"
    " cocodataset.org, or choose another set"
  )


def _folder(candidates: list[AnyPath], content: str) -> AnyPath:
  for folder in candidates:
    if is_folder(folder):
      return folder
  others = "".join(f" or {folder}" for folder in candidates[1:])
  raise InputError(
    f"{candidates[0]}: no such folder; {content} must lie there{others}"
  )


def _read_set(
  json_file: AnyPath, kind: str, root: AnyPath, set_name: str
) -> tuple[Categories, list[_Image]]:
  """Classes and tagged images of a set; what else the JSON holds is let go."""
  content = read_json(json_file)
  entries = json_images(json_file, content)
  categories = json_categories(json_file, content, kind)
  index_of = {c.id: i for i, c in enumerate(categories.items)}
  tags: dict[Any, set[int]] = {id_: set() for id_ in entries}
  annotations = json_field(
    content, "annotations", json_file, "the JSON", kind=list
  )
  for annotation in annotations:
    id_ = _image_of(annotation, tags, json_file)
    where = f"{json_file}: an annotation of image {id_!r}"
    parts = [annotation]
    if kind == "panoptic":
      parts = json_field(
        annotation, "segments_info", json_file, "an annotation", kind=list
      )
    # Crowds count: a crowd of people is people.
    tags[id_].update(_class_of(part, index_of, where) for part in parts)
  folder = _folder([root / set_name, root / "images"], "the images")
  images, name_of = [], {}
  for id_, entry in entries.items():
    name = entry["file_name"]
    path = safe_path(folder, name, f"{json_file}: the file of image {id_!r}")
    image_id = safe_name(PurePosixPath(name).stem)
    other = name_of.setdefault(image_id, name)
    if other != name:
      raise InputError(
        f"{json_file}: the images {other!r} and {name!r} would both be called"
        f" {image_id!r}; rename one"
      )
    images.append(_Image(image_id, id_, name, path, tuple(sorted(tags[id_]))))
  exists = file_lookup()
  missing = [image.name for image in images if not exists(image.path)]
  if missing:
    raise InputError(
      f"{folder}: lacks {len(missing)} of the {len(images)} images that"
      f" {json_file} names, e.g. {missing[0]!r}; add them or remove their"
      " entries"
    )
  return categories, images


def _val_records(
  kind: str,
  root: AnyPath,
  json_file: AnyPath,
  categories: Categories,
  images: list[_Image],
) -> LazyRecords:
  if kind == "instances":
    return _records(images, instances=read_instances(json_file, categories))
  name = json_file.stem
  pngs = _folder(
    list(
      dict.fromkeys(
        [json_file.parent / name, root / "annotations" / name, root / name]
      )
    ),
    f"the PNG files of {json_file}",
  )
  targets = read_panoptic(json_file, pngs, categories)
  lacking = [image.name for image in images if image.name not in targets]
  if lacking:
    raise InputError(
      f"{json_file}: {len(lacking)} images have no annotation, e.g."
      f" {lacking[0]!r}; add it or remove the image"
    )
  return _records(images, targets=targets)


def _records(
  images: list[_Image],
  *,
  targets: Mapping[str, PanopticMap] | None = None,
  instances: InstanceFile | None = None,
) -> LazyRecords:
  def read(i: int) -> Record:
    image = images[i]
    size = (0, 0) if instances is None else instances.size(image.name)
    return Record(
      image.image_id,
      read_file(image.path),
      *size,
      image.tags,
      target=None if targets is None else targets[image.name],
      instances=None if instances is None else instances[image.name],
      file_name=image.name,
      source_id=image.source_id,
    )

  return LazyRecords(len(images), read)
