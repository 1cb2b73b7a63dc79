"""PASCAL VOC and the Semantic Boundaries Dataset (SBD), in their own layouts.

    VOCdevkit/VOC2012/
      Annotations/ID.xml             the objects: tags and boxes
      ImageSets/Main/*.txt           lists of images, one ID a line
      ImageSets/Segmentation/*.txt   lists of the images that have masks
      JPEGImages/ID.jpg
      SegmentationClass/ID.png       palette PNG: 0 background, 1 .. 20, 255
      SegmentationObject/ID.png      the same with object ids; 255 is void

    benchmark_RELEASE/dataset/       SBD: more masks for images of VOC2012
      train.txt, val.txt
      cls/ID.mat, inst/ID.mat

Training reads the lists, the XML files and the images only.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  file_lookup,
  folder_name,
  is_file,
  is_folder,
  map_reads,
  names_in,
  read_bytes,
)
from jtsm_jax.data.mat_files import read_mat
from jtsm_jax.data.source import LazyRecords, Source
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import (
  VOID,
  Categories,
  Category,
  InputError,
  Instances,
  PanopticMap,
  Record,
  Segment,
)

VOC_NAMES = (
  "aeroplane",
  "bicycle",
  "bird",
  "boat",
  "bottle",
  "bus",
  "car",
  "cat",
  "chair",
  "cow",
  "diningtable",
  "dog",
  "horse",
  "motorbike",
  "person",
  "pottedplant",
  "sheep",
  "sofa",
  "train",
  "tvmonitor",
)
"""The things of VOC; the label of `VOC_NAMES[i]` in a mask is i + 1."""

_THINGS = tuple(
  Category(label, name, True) for label, name in enumerate(VOC_NAMES, 1)
)
_BACKGROUND = Category(21, "background", False)
_BACKGROUND_LABEL, _VOID_LABEL = 0, 255
_YEARS = ("2007", "2012")
_MAX_BYTES = (
  10_000_000  # of a list, an XML or a .mat; real ones are far smaller
)
_CITE_VOC = """\
@article{everingham2010pascal,
  title = {The {PASCAL} Visual Object Classes ({VOC}) Challenge},
  author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I.
    and Winn, John and Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  volume = {88},
  number = {2},
  pages = {303--338},
  year = {2010}
}
"""
_CITE_SBD = """\
@inproceedings{hariharan2011semantic,
  title = {Semantic Contours from Inverse Detectors},
  author = {Hariharan, Bharath and Arbel{\\'a}ez, Pablo and Bourdev, Lubomir
    and Maji, Subhransu and Malik, Jitendra},
  booktitle = {International Conference on Computer Vision},
  pages = {991--998},
  year = {2011}
}
"""


def voc_panoptic_source(
  root: PathOrUrl,
  *,
  year: str,
  train_set: str = "",
  val_set: str = "",
  sbd: PathOrUrl = "",
  annotation_source: str = "voc",
) -> Source:
  """VOC for panoptic segmentation: 20 things and the stuff "background".

  The tags of an image are the names of the objects in its XML file that are not
  difficult (of all of them where all are difficult), and "background": that
  every image shows some is prior knowledge, not read from a mask. For training
  images no mask is opened.

  Args:
    root: the folder VOCdevkit, or VOC{year} inside it, or its URL.
    year: "2007" or "2012".
    train_set: a list in ImageSets/Main or else ImageSets/Segmentation, by its
      name without the ending; or "train_aug", the segmentation lists "train" of
      VOC2012 and all of SBD without the segmentation list "val" (10,582
      images). "" is "train_aug" where `sbd` is given and "trainval" elsewhere.
      Images of the validation set are always taken out.
    val_set: a list in ImageSets/Segmentation or else ImageSets/Main. "" is
      "val" of ImageSets/Segmentation, or all its lists where there is no "val".
    sbd: the folder of SBD that holds cls/, inst/, train.txt and val.txt, or the
      one or two folders above it ("benchmark_RELEASE"); 2012 only.
    annotation_source: whence the masks of validation images come: "voc" takes
      VOC's PNG files and, for images without, SBD's; "sbd" takes SBD's for the
      images that SBD lists and VOC's for the others, as JTSM's authors do.

  Returns:
    "train", and "val" with a `target`: one segment for each object and one for
    all pixels of the background. Reading a validation image raises InputError
    where its masks are damaged or do not fit it.

  Raises:
    InputError: an unknown option, or a file that is missing or damaged.
  """
  voc = _voc_folder(root, year)
  if annotation_source not in ("voc", "sbd"):
    raise InputError(
      f"annotation_source is {annotation_source!r}; choose 'voc' or 'sbd'"
    )
  if sbd and year != "2012":
    raise InputError(
      f"sbd is {str(sbd)!r} but year is {year!r}; SBD has masks for images of"
      " 2012 only: leave it out"
    )
  if annotation_source == "sbd" and not sbd:
    raise InputError(
      "annotation_source is 'sbd' but no folder of SBD is given; set sbd"
    )
  sbd_folder = _sbd_folder(sbd) if sbd else None
  sbd_ids = []
  if sbd_folder is not None:
    sbd_ids = [
      image_id
      for name in ("train.txt", "val.txt")
      for image_id in _read_list(sbd_folder / name)
    ]
  val_ids = _panoptic_val_ids(voc, val_set)
  train_set = train_set or ("train_aug" if sbd else "trainval")
  if train_set != "train_aug":
    listed = _read_list(_find_list(voc, train_set, ("Main", "Segmentation")))
    train_ids = _without(voc, listed, val_ids)
  elif sbd_folder is None:
    raise InputError(
      "train_set is 'train_aug' but no folder of SBD is given; set sbd, or"
      " choose a list in ImageSets, e.g. 'trainval'"
    )
  else:
    lists = voc / "ImageSets" / "Segmentation"
    train_ids = _without(
      voc,
      _unique(_read_list(lists / "train.txt") + sbd_ids),
      _unique(_read_list(lists / "val.txt") + val_ids),
    )
  masks = _choose_masks(
    voc, val_ids, sbd_folder, frozenset(sbd_ids), prefer=annotation_source
  )
  background = len(_THINGS)
  objects = _read_all_objects(voc, train_ids + val_ids)
  train, val = (
    [(i, (*_tags(objects[i]), background)) for i in ids]
    for ids in (train_ids, val_ids)
  )

  def read_val(i: int) -> Record:
    record = _read_record(voc, *val[i])
    name = str(_image_path(voc, record.image_id))
    try:
      height, width = decode_image(record.image, name=name).shape[:2]
    except InputError:
      return record  # whoever reads the image meets the same error
    target = masks[record.image_id](size=(height, width))
    return dataclasses.replace(
      record, height=height, width=width, target=target
    )

  return Source(
    name=f"voc{year}_panoptic",
    categories=Categories((*_THINGS, _BACKGROUND)),
    splits={
      "train": LazyRecords(len(train), lambda i: _read_record(voc, *train[i])),
      "val": LazyRecords(len(val), read_val),
    },
    citation=_CITE_VOC + ("\n" + _CITE_SBD if sbd else ""),
  )


def voc_detection_source(
  root: PathOrUrl,
  *,
  year: str,
  train_set: str = "",
  val_set: str = "",
  corloc: bool = True,
) -> Source:
  """VOC for object detection: 20 things, no stuff.

  The tags of an image are the names of the objects in its XML file that are not
  difficult (of all of them where all are difficult). Training images without
  any object are left out.

  Args:
    root: the folder VOCdevkit, or VOC{year} inside it, or its URL.
    year: "2007" or "2012".
    train_set: a list in ImageSets/Main or else ImageSets/Segmentation, by its
      name without the ending; "" is "trainval". Images of the validation set
      are always taken out.
    val_set: the same; "" is "test" if that list and the XML files of its images
      exist, and no validation set elsewhere: then the split "test" has them.
    corloc: whether to add the split "corloc".

  Returns:
    "train"; "val", if there is one, with `instances`; "corloc", the training
    images once more with `instances`, for evaluation only: CorLoc is measured
    on the images that were trained on; and "test", the images of the list
    "test" where only VOC's server knows their objects. Boxes are
    half-open and count from 0: VOC's (xmin, ymin, xmax, ymax) becomes
    (ymin - 1, xmin - 1, ymax, xmax). Areas are those of the boxes.

  Raises:
    InputError: an unknown option, or a file that is missing or damaged.
  """
  voc = _voc_folder(root, year)
  where = ("Main", "Segmentation")
  listed = _read_list(_find_list(voc, train_set or "trainval", where))
  if val_set:
    val_ids, test_ids = _read_list(_find_list(voc, val_set, where)), []
  else:
    val_ids, test_ids = _detection_test_ids(voc)
  train_ids = _without(voc, listed, val_ids)
  objects = {i: [] for i in test_ids}
  objects |= _read_all_objects(voc, train_ids + val_ids)
  kept = [i for i in train_ids if objects[i]]
  if len(kept) < len(train_ids):
    _note(
      f"{voc}: {len(train_ids) - len(kept)} training images show no object,"
      f" e.g. {next(i for i in train_ids if not objects[i])}; they are left out"
    )
  if not kept:
    raise InputError(
      f"{voc}: no training image shows an object; choose another train_set"
    )

  def split(ids: list[str], *, labelled: bool) -> LazyRecords:
    entries = [
      (
        i,
        _tags(objects[i]),
        _instances(voc, i, objects[i]) if labelled else None,
      )
      for i in ids
    ]
    return LazyRecords(len(entries), lambda i: _read_record(voc, *entries[i]))

  splits = {"train": split(kept, labelled=False)}
  if val_ids:
    splits["val"] = split(val_ids, labelled=True)
  if corloc:
    splits["corloc"] = split(kept, labelled=True)
  if test_ids:
    splits["test"] = split(test_ids, labelled=False)
  return Source(
    name=f"voc{year}_detection",
    categories=Categories(_THINGS),
    splits=splits,
    citation=_CITE_VOC,
  )


def _note(message: str) -> None:
  print(message, file=sys.stderr)


def _voc_folder(root: PathOrUrl, year: str) -> AnyPath:
  """The folder VOC{year}, given itself or the VOCdevkit around it."""
  if year not in _YEARS:
    raise InputError(f"year is {year!r}; choose one of {_YEARS}")
  root, name = data_path(root), f"VOC{year}"
  if is_folder(root / name):
    return root / name
  own_name = folder_name(root)
  other_year = re.fullmatch(r"VOC\d{4}", own_name) and own_name != name
  if is_folder(root / "ImageSets") and not other_year:
    return root
  found = "it is another year's" if other_year else "no such folder"
  if is_folder(root) and not other_year:
    found = f"it holds neither {name} nor ImageSets"
  raise InputError(
    f"{root}: {found}; give the folder VOCdevkit that holds {name}, or {name}"
    " itself"
  )


def _sbd_folder(sbd: PathOrUrl) -> AnyPath:
  sbd, wanted = data_path(sbd), ("cls", "inst", "train.txt", "val.txt")
  for folder in (sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset"):
    if set(wanted) <= set(names_in(folder)):
      return folder
  raise InputError(
    f"{sbd}: does not hold {', '.join(wanted)}, nor does dataset/ or"
    " benchmark_RELEASE/dataset/ in it; give the unpacked folder of SBD"
  )


def _find_list(voc: AnyPath, name: str, kinds: tuple[str, ...]) -> AnyPath:
  """The list `name` in the first of the folders of ImageSets that has it."""
  if _is_safe(name):
    for kind in kinds:
      path = voc / "ImageSets" / kind / f"{name}.txt"
      if is_file(path):
        return path
  found = sorted(
    # Main has three lists for each class, which are no sets of images.
    {
      name.removesuffix(".txt")
      for kind in kinds
      for name in _lists(voc / "ImageSets" / kind)
      if name.rpartition("_")[0] not in VOC_NAMES
    }
  )
  raise InputError(
    f"{voc / 'ImageSets'}: there is no list {name!r} in {' or '.join(kinds)};"
    f" choose one of {', '.join(found) or 'none (no lists at all)'}"
  )


def _lists(folder: AnyPath) -> list[str]:
  return [name for name in names_in(folder) if name.endswith(".txt")]


def _read_list(path: AnyPath) -> list[str]:
  """The image ids of a list file, in its order, each once."""
  data = _read_small(path, "it lists images")
  try:
    lines = data.decode("utf-8-sig").split("\n")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{path}: is no list in UTF-8 ({error}); wanted one image name a line"
    ) from error
  for number, line in enumerate(lines, 1):
    if line.strip() and not _is_safe(line.strip()):
      raise InputError(
        f"{path}, line {number}: {line.strip()!r} is no image name; a list has"
        " one a line, without a folder, an ending or a label after it, made of"
        " letters, digits, '_', '-' and '.' (not as the first): correct the"
        " line or choose another list"
      )
  ids = _unique(line.strip() for line in lines if line.strip())
  if not ids:
    raise InputError(f"{path}: lists no image; choose another list")
  return ids


def _is_safe(name: str) -> bool:
  """Whether it can be part of a path without leaving the folder."""
  return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name) is not None


def _unique(ids: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(ids))


def _without(voc: AnyPath, ids: list[str], val_ids: list[str]) -> list[str]:
  """The training images: those that are not for validation."""
  excluded = frozenset(val_ids)
  kept = [i for i in ids if i not in excluded]
  if len(kept) < len(ids):
    _note(
      f"{voc}: {len(ids) - len(kept)} images of the training set are for"
      " validation; they are not trained on"
    )
  if not kept:
    raise InputError(
      f"{voc}: every image of the training set is for validation; choose"
      " another train_set or val_set"
    )
  return kept


def _panoptic_val_ids(voc: AnyPath, val_set: str) -> list[str]:
  if val_set:
    return _read_list(_find_list(voc, val_set, ("Segmentation", "Main")))
  folder = voc / "ImageSets" / "Segmentation"
  lists = _lists(folder)
  if "val.txt" in lists:
    return _read_list(folder / "val.txt")
  if not lists:
    raise InputError(
      f"{folder}: has no list of images; the default val_set is 'val' there:"
      " add that list or set val_set"
    )
  _note(
    f"{folder}: has no val.txt; validation is on all images of"
    f" {', '.join(lists)}"
  )
  return _unique(i for name in lists for i in _read_list(folder / name))


def _detection_test_ids(voc: AnyPath) -> tuple[list[str], list[str]]:
  """The images of "test": to be evaluated here, and by VOC's server."""
  path = voc / "ImageSets" / "Main" / "test.txt"
  if not is_file(path):
    return [], []
  ids = _read_list(path)
  # The objects of the test images of 2012 are not public.
  exists = file_lookup()
  lacking = sum(not exists(_xml_path(voc, i)) for i in ids)
  if not lacking:
    return ids, []
  absent = sum(not exists(_image_path(voc, i)) for i in ids)
  _note(
    f"{path}: {lacking} of {len(ids)} images have no file in Annotations;"
    " there is no validation set, unless val_set names one, and the images are"
    + (
      f" left out, since {absent} are absent" if absent else " for VOC's server"
    )
  )
  return [], [] if absent else ids


def _image_path(voc: AnyPath, image_id: str) -> AnyPath:
  return voc / "JPEGImages" / f"{image_id}.jpg"


def _xml_path(voc: AnyPath, image_id: str) -> AnyPath:
  return voc / "Annotations" / f"{image_id}.xml"


def _read_record(
  voc: AnyPath,
  image_id: str,
  tags: tuple[int, ...],
  instances: Instances | None = None,
) -> Record:
  path = _image_path(voc, image_id)
  try:
    data = read_bytes(path)
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file, but a list names the image; unpack VOC's archive"
      " again or take the image out of the list"
    ) from None
  except OSError as error:
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); check the file"
    ) from error
  return Record(
    image_id, data, 0, 0, tags, instances=instances, file_name=path.name
  )


def _read_small(path: AnyPath, purpose: str) -> bytes:
  """The bytes of a file whose size is bounded."""
  try:
    data = read_bytes(path, limit=_MAX_BYTES + 1)
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file, but {purpose}; unpack the data set's archives"
      " again (for SBD also all of VOC2012 trainval), or choose a list without"
      " the image"
    ) from None
  except OSError as error:
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); check the file"
    ) from error
  if len(data) > _MAX_BYTES:
    raise InputError(
      f"{path}: has more than {_MAX_BYTES} bytes, far more than any file of its"
      " kind in VOC or SBD; replace it"
    )
  return data


# --- XML: objects


@dataclasses.dataclass(frozen=True)
class _Object:
  category: int
  is_difficult: bool
  corners: tuple[str, ...]  # xmin, ymin, xmax, ymax as they are written


class _NoDoctype(ElementTree.TreeBuilder):
  """Entities are declared in a DOCTYPE, and can be made to fill the memory."""

  def doctype(self, *_) -> None:
    raise ValueError("it has a DOCTYPE, which VOC's files do not")


def _read_all_objects(voc: AnyPath, ids: list[str]) -> dict[str, list[_Object]]:
  found = map_reads(functools.partial(_read_objects, voc), ids, voc)
  return dict(zip(ids, found, strict=True))


def _read_objects(voc: AnyPath, image_id: str) -> list[_Object]:
  path = _xml_path(voc, image_id)
  data = _read_small(path, "the tags of that image come from it")
  try:
    parser = ElementTree.XMLParser(target=_NoDoctype())
    annotation = ElementTree.fromstring(data, parser)
  except (ElementTree.ParseError, ValueError, LookupError) as error:
    raise InputError(
      f"{path}: is no XML file of VOC ({error}); replace it"
    ) from error
  if annotation.tag != "annotation":
    raise InputError(
      f"{path}: holds <{annotation.tag}>, not VOC's <annotation>; replace it"
    )
  # The parts of a person are <part>s inside its <object>, with names and boxes.
  return [_read_object(path, e) for e in annotation.findall("object")]


def _read_object(path: AnyPath, element: ElementTree.Element) -> _Object:
  name = element.findtext("name", "").strip()
  if name not in VOC_NAMES:
    raise InputError(
      f"{path}: has an object {name!r}, which is no class of VOC; the classes"
      f" are {', '.join(VOC_NAMES)}"
    )
  difficult = element.findtext("difficult", "0").strip()
  if difficult not in ("0", "1"):
    raise InputError(
      f"{path}: an object {name!r} has <difficult> {difficult!r}; it must be 0"
      " or 1"
    )
  box = element.find("bndbox")
  corners = () if box is None else ("xmin", "ymin", "xmax", "ymax")
  return _Object(
    VOC_NAMES.index(name),
    difficult == "1",
    tuple(box.findtext(corner, "").strip() for corner in corners),
  )


def _tags(objects: list[_Object]) -> tuple[int, ...]:
  easy = [o for o in objects if not o.is_difficult]
  return tuple(sorted({o.category for o in easy or objects}))


def _instances(
  voc: AnyPath, image_id: str, objects: list[_Object]
) -> Instances:
  path = _xml_path(voc, image_id)
  boxes = np.array([_box(path, o) for o in objects], np.float64).reshape(-1, 4)
  return Instances(
    category=np.array([o.category for o in objects], np.int32),
    boxes=boxes,
    area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    is_crowd=np.zeros(len(objects), bool),
    is_difficult=np.array([o.is_difficult for o in objects], bool),
  )


def _box(path: AnyPath, found: _Object) -> tuple[float, float, float, float]:
  try:
    x0, y0, x1, y1 = (float(corner) for corner in found.corners)
  except ValueError:  # also if there are not four
    x0 = y0 = x1 = y1 = math.nan
  # VOC counts pixels from 1, and the last one belongs to the box.
  box = (y0 - 1, x0 - 1, y1, x1)
  if not all(map(math.isfinite, box)) or box[0] >= y1 or box[1] >= x1:
    raise InputError(
      f"{path}: an object {VOC_NAMES[found.category]!r} has the <bndbox>"
      f" {found.corners}; wanted numbers xmin, ymin, xmax, ymax, the latter two"
      " no smaller"
    )
  return box


# --- Masks, of validation images only


def _choose_masks(
  voc: AnyPath,
  ids: list[str],
  sbd: AnyPath | None,
  sbd_ids: frozenset[str],
  *,
  prefer: str,
) -> Mapping[str, Callable[..., PanopticMap]]:
  """What reads the masks of each image, given its `size`; opens no file."""
  readers, exists = {}, file_lookup()
  for image_id in ids:
    png_files = [
      voc / folder / f"{image_id}.png"
      for folder in ("SegmentationClass", "SegmentationObject")
    ]
    lacking = [path for path in png_files if not exists(path)]
    in_sbd = image_id in sbd_ids
    if sbd is not None and in_sbd and (prefer == "sbd" or lacking):
      readers[image_id] = functools.partial(_read_mat_target, sbd, image_id)
    elif not lacking:
      readers[image_id] = functools.partial(_read_png_target, *png_files)
    else:
      also = "" if sbd is None else ", and SBD does not list the image"
      raise InputError(
        f"{lacking[0]}: no such file, but the image is for validation{also};"
        " unpack VOC's archive again or set val_set to a list of images that"
        " have masks"
      )
  return readers


def _read_png_target(
  class_file: AnyPath, object_file: AnyPath, *, size: tuple[int, int]
) -> PanopticMap:
  labels = _read_palette(class_file, size)
  objects = _read_palette(object_file, size)
  _check_labels(class_file, labels)
  label_of = {}
  for object_id in np.unique(objects).tolist():
    if object_id in (0, _VOID_LABEL):
      continue
    counts = np.bincount(labels[objects == object_id], minlength=256)
    counts[[_BACKGROUND_LABEL, _VOID_LABEL]] = 0
    if not counts.any():
      raise InputError(
        f"{object_file}: object {object_id} has no pixel of a class in"
        f" {class_file}; replace both files by those of one archive"
      )
    label_of[object_id] = int(counts.argmax())
  return _to_panoptic(objects, labels, label_of)


def _read_palette(path: AnyPath, size: tuple[int, int]) -> np.ndarray:
  """The indices, not the colours, of a PNG as [H, W] uint8."""
  try:
    with Image.open(io.BytesIO(read_bytes(path)), formats=["PNG"]) as image:
      mode = image.mode
      values = np.asarray(image) if mode in ("P", "L") else None
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file, but the image is for validation; unpack VOC's"
      " archive again"
    ) from None
  except Exception as error:  # Pillow's plugins raise whatever they meet.
    raise InputError(
      f"{path}: cannot be decoded ({error}); wanted a palette PNG: replace it"
    ) from error
  if values is None:
    raise InputError(
      f"{path}: is a PNG of mode {mode!r}; wanted a palette PNG ('P', or 'L'),"
      " whose indices are the labels: use VOC's own file"
    )
  _check_size(path, values, size)
  return values


def _read_mat_target(
  sbd: AnyPath, image_id: str, *, size: tuple[int, int]
) -> PanopticMap:
  class_file = sbd / "cls" / f"{image_id}.mat"
  object_file = sbd / "inst" / f"{image_id}.mat"
  (labels,) = _read_struct(class_file, "GTcls", ("Segmentation",))
  objects, categories = _read_struct(
    object_file, "GTinst", ("Segmentation", "Categories")
  )
  for path, values in ((class_file, labels), (object_file, objects)):
    if values.ndim != 2 or values.dtype.kind not in "iu":
      raise InputError(
        f"{path}: its Segmentation is {_describe(values)}; wanted a 2-D array"
        " of integers: replace the file"
      )
    _check_size(path, values, size)
  _check_labels(class_file, labels)
  is_list = categories.size in (0, max(categories.shape, default=0))
  if categories.dtype.kind not in "iuf" or not is_list:
    raise InputError(
      f"{object_file}: its Categories are {_describe(categories)}; wanted one"
      " number for each object: replace the file"
    )
  known = dict(enumerate(categories.ravel().tolist(), 1))
  label_of = {}
  for object_id in np.unique(objects).tolist():
    if object_id in (0, _VOID_LABEL):
      continue
    label = known.get(object_id)
    if label not in range(1, len(_THINGS) + 1):
      raise InputError(
        f"{object_file}: object {object_id} has category {label}; wanted 1 .."
        f" {len(_THINGS)}: replace the file"
      )
    label_of[object_id] = int(label)
  return _to_panoptic(objects, labels, label_of)


def _read_struct(
  path: AnyPath, name: str, fields: tuple[str, ...]
) -> list[np.ndarray]:
  """Fields of the struct `name` in a MATLAB file."""
  data = _read_small(path, "SBD lists the image")
  try:
    content = read_mat(data, [name], max_bytes=_MAX_BYTES)
  except ValueError as error:
    raise InputError(
      f"{path}: is no readable MATLAB file ({error}); replace it by SBD's own"
    ) from error
  found = content.get(name)
  ok = (
    isinstance(found, np.ndarray)
    and found.size == 1
    and set(fields) <= set(found.dtype.names or ())
  )
  if not ok:
    raise InputError(
      f"{path}: holds no struct {name} with {' and '.join(fields)}; replace it"
      " by SBD's own"
    )
  return [np.asarray(found.flat[0][field]) for field in fields]


def _describe(values: np.ndarray) -> str:
  return f"an array {list(values.shape)} of {values.dtype}"


def _check_size(
  path: AnyPath, values: np.ndarray, size: tuple[int, int]
) -> None:
  if values.shape != size:
    height, width = values.shape
    raise InputError(
      f"{path}: is {height} x {width} (height x width), but the image is"
      f" {size[0]} x {size[1]}; replace the one that is wrong"
    )


def _check_labels(path: AnyPath, labels: np.ndarray) -> None:
  known = {*range(len(_THINGS) + 1), _VOID_LABEL}
  unknown = sorted(set(np.unique(labels).tolist()) - known)
  if unknown:
    raise InputError(
      f"{path}: has the labels {unknown}; wanted 0 .. {len(_THINGS)} or"
      f" {_VOID_LABEL}: replace the file"
    )


def _to_panoptic(
  objects: np.ndarray, labels: np.ndarray, label_of: Mapping[int, int]
) -> PanopticMap:
  """Makes segments of the objects and of the background that is left.

  Args:
    objects: [H, W] object ids.
    labels: [H, W] labels.
    label_of: the label of each object.

  Returns:
    Objects as 1 .. n, in the order of their ids, and the background as n + 1;
    what is neither is void.
  """
  ids = np.full(objects.shape, VOID, np.int32)
  segments = []
  for n, object_id in enumerate(sorted(label_of), 1):
    mask = objects == object_id
    ids[mask] = n
    # Class indices count from 0, labels from 1.
    category = label_of[object_id] - 1
    segments.append(Segment(n, category, True, 1.0, int(mask.sum())))
  background = (labels == _BACKGROUND_LABEL) & (ids == VOID)
  if background.any():
    n = len(segments) + 1
    ids[background] = n
    area = int(background.sum())
    segments.append(Segment(n, len(_THINGS), False, 1.0, area))
  return PanopticMap(ids, tuple(segments))
