"""Tests of PASCAL VOC and SBD, on small data sets in their own formats."""

import io
import pathlib
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from jtsm_jax.data import voc
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.types import InputError, Segment
from tests.data.buckets import plain, upload

AEROPLANE, BIRD, CAT, COW, DOG, PERSON, BACKGROUND = 0, 2, 7, 9, 11, 14, 20
REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "VOCdevkit"
SIZE = (6, 8)

# One aeroplane of two parts (object 1), another (object 2), a person (object 3)
# that touches the frame, void around object 2 and in the last row, background.
CLASSES = """
  0 0 0 0 0 0 0 0
  0 1 1 0 255 255 255 0
  0 1 1 0 255 1 255 0
  0 0 0 0 255 255 255 0
  1 0 0 0 0 0 15 15
  1 0 255 255 255 255 15 15
"""
OBJECTS = """
  0 0 0 0 0 0 0 0
  0 1 1 0 255 255 255 0
  0 1 1 0 255 2 255 0
  0 0 0 0 255 255 255 0
  1 0 0 0 0 0 3 3
  1 0 255 255 255 255 3 3
"""
IDS = """
  4 4 4 4 4 4 4 4
  4 1 1 4 0 0 0 4
  4 1 1 4 0 2 0 4
  4 4 4 4 0 0 0 4
  1 4 4 4 4 4 3 3
  1 4 0 0 0 0 3 3
"""
SEGMENTS = (
  Segment(1, AEROPLANE, True, 1.0, 6),
  Segment(2, AEROPLANE, True, 1.0, 1),
  Segment(3, PERSON, True, 1.0, 4),
  Segment(4, BACKGROUND, False, 1.0, 25),
)


def grid(text, dtype=np.uint8):
  return np.array(text.split(), int).reshape(SIZE).astype(dtype)


def thing(name, box=(1, 1, 8, 6), difficult=0, inner=""):
  corners = "".join(
    f"<{tag}>{value}</{tag}>"
    for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
  )
  return (
    f"<object><name>{name}</name><difficult>{difficult}</difficult>"
    f"<bndbox>{corners}</bndbox>{inner}</object>"
  )


PARTS = (
  "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin>"
  "<xmax>3</xmax><ymax>3</ymax></bndbox></part>"
)


def add_image(folder, image_id, *objects):
  """An image and its XML file, as VOC writes them."""
  for name in ("JPEGImages", "Annotations"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  value = sum(image_id.encode()) % 256  # so that images differ
  Image.fromarray(np.full((*SIZE, 3), value, np.uint8)).save(
    folder / "JPEGImages" / f"{image_id}.jpg"
  )
  objects = objects or (thing("cow"),)
  (folder / "Annotations" / f"{image_id}.xml").write_text(
    f"<annotation>\n<filename>{image_id}.jpg</filename>\n<size><width>8</width>"
    f"<height>6</height><depth>3</depth></size>{''.join(objects)}</annotation>"
  )


def add_masks(folder, image_id, classes=CLASSES, objects=OBJECTS):
  for name, text in (
    ("SegmentationClass", classes),
    ("SegmentationObject", objects),
  ):
    values = grid(text) if isinstance(text, str) else text
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    # VOC's palette is not in the order of grey, so colours are not labels.
    palette = np.random.default_rng(0).permutation(768) % 256
    image.putpalette(palette.tolist())
    (folder / name).mkdir(exist_ok=True)
    image.save(folder / name / f"{image_id}.png")


def write_list(folder, name, ids):
  path = folder / "ImageSets" / f"{name}.txt"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(f"{i}\n" for i in ids))


def add_mat(sbd, image_id, classes, objects, categories):
  """The structs of SBD, with the fields that are not read, too."""
  boundaries = np.empty((20, 1), object)
  for i in range(20):
    boundaries[i, 0] = scipy.sparse.csc_matrix(SIZE, dtype=float)
  for folder, name, fields in (
    (
      "cls",
      "GTcls",
      {"Segmentation": classes, "CategoriesPresent": np.array([[1], [15]])},
    ),
    (
      "inst",
      "GTinst",
      {"Segmentation": objects, "Categories": np.array([categories]).T},
    ),
  ):
    (sbd / folder).mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(
      sbd / folder / f"{image_id}.mat",
      {name: {**fields, "Boundaries": boundaries}},
      do_compression=True,
    )


# SBD's masks: an aeroplane, then a dog; no void.
SBD_OBJECTS = np.zeros(SIZE, np.uint8)
SBD_OBJECTS[:2, :3], SBD_OBJECTS[4:, 4:] = 1, 2
SBD_CLASSES = np.array([0, 1, 12], np.uint8)[SBD_OBJECTS]
SBD_SEGMENTS = (
  Segment(1, AEROPLANE, True, 1.0, 6),
  Segment(2, DOG, True, 1.0, 8),
  Segment(3, BACKGROUND, False, 1.0, 34),
)


@pytest.fixture
def root(tmp_path):
  """VOC2007: 5 images in Main, 1 + 1 in Segmentation, 2 for testing."""
  folder = tmp_path / "VOCdevkit" / "VOC2007"
  add_image(folder, "000001", thing("dog"), thing("cat"), thing("dog"))
  add_image(folder, "000002", thing("person", inner=PARTS * 2))
  add_image(folder, "000003", thing("bird"), thing("cat", difficult=1))
  add_image(
    folder, "000004", thing("cow", difficult=1), thing("bird", difficult=1)
  )
  add_image(folder, "000005", thing("aeroplane"), thing("person"))
  add_image(folder, "000006", thing("dog", (2, 3, 2, 4)))
  add_image(
    folder,
    "000007",
    thing("bird", ("2.5", "1", "8", "5.25"), 1),
    thing("cow", inner=PARTS),
  )
  main = ["000001", "000002", "000003", "000004", "000005"]
  write_list(folder, "Main/trainval", main)
  write_list(folder, "Main/train", main[:2])
  write_list(folder, "Main/test", ["000006", "000007"])
  (folder / "ImageSets" / "Main" / "dog_train.txt").write_text(
    "000001  1\n000002 -1\n"
  )
  write_list(folder, "Segmentation/train", ["000002"])
  write_list(folder, "Segmentation/val", ["000005"])
  for image_id in ("000002", "000005"):
    add_masks(folder, image_id)
  return tmp_path / "VOCdevkit"


@pytest.fixture
def devkit(tmp_path):
  """VOC2012 and SBD.

  Segmentation: train 01 02, val 03 04 05. SBD: train 02 03 06 07, val 04 08 06.
  PNG files for 01 .. 04, .mat files for all of SBD; 05 has PNG files alone.
  """
  folder = tmp_path / "VOCdevkit" / "VOC2012"
  sbd = tmp_path / "benchmark_RELEASE" / "dataset"
  ids = [f"2008_00000{i}" for i in range(10)]
  for image_id in ids[1:]:
    add_image(folder, image_id)
  write_list(folder, "Main/trainval", [ids[i] for i in (1, 2, 3, 9)])
  write_list(folder, "Segmentation/train", ids[1:3])
  write_list(folder, "Segmentation/val", ids[3:6])
  for image_id in (ids[1], ids[2], ids[3], ids[5]):
    add_masks(folder, image_id)
  (sbd / "img").mkdir(parents=True)
  for name, members in (("train", (2, 3, 6, 7)), ("val", (4, 8, 6))):
    (sbd / f"{name}.txt").write_text("".join(f"{ids[i]}\n" for i in members))
    for i in members:
      add_mat(sbd, ids[i], SBD_CLASSES, SBD_OBJECTS, [1, 12])
  return tmp_path


def panoptic(root, **options):
  return voc.voc_panoptic_source(root, **{"year": "2007", **options})


def detection(root, **options):
  return voc.voc_detection_source(root, **{"year": "2007", **options})


def augmented(devkit, **options):
  return voc.voc_panoptic_source(
    devkit / "VOCdevkit",
    year="2012",
    **{"sbd": devkit / "benchmark_RELEASE" / "dataset", **options},
  )


def ids_of(split):
  return [record.image_id for record in split]


def test_classes():
  assert len(voc.VOC_NAMES) == 20
  assert list(voc.VOC_NAMES) == sorted(voc.VOC_NAMES)


def test_panoptic_source(root, capsys):
  source = panoptic(root)
  assert source.name == "voc2007_panoptic"
  assert source.categories.names == (*voc.VOC_NAMES, "background")
  assert source.categories.num_things == 20
  assert [c.id for c in source.categories.items] == list(range(1, 22))
  assert list(source.splits) == ["train", "val"]
  train, val = source.splits["train"], source.splits["val"]
  assert ids_of(train) == ["000001", "000002", "000003", "000004"]
  assert ids_of(val) == ["000005"]
  assert "1 images of the training set are for" in capsys.readouterr().err
  assert "everingham2010" in source.citation
  assert "hariharan2011" not in source.citation


def test_tags(root):
  source = panoptic(root)
  assert [record.tags for record in source.splits["train"]] == [
    (CAT, DOG, BACKGROUND),
    (PERSON, BACKGROUND),  # its parts are no objects
    (BIRD, BACKGROUND),  # the cat is difficult
    (BIRD, COW, BACKGROUND),  # all are difficult
  ]
  assert source.splits["val"][0].tags == (AEROPLANE, PERSON, BACKGROUND)


def test_training_images_without_objects_show_background(root):
  (root / "VOC2007" / "Annotations" / "000001.xml").write_text(
    "<annotation></annotation>"
  )
  assert panoptic(root).splits["train"][0].tags == (BACKGROUND,)


@pytest.mark.parametrize("image_id", ["000001", "000005"])
def test_a_damaged_image_of_either_split_is_left_out(root, tmp_path, image_id):
  segmentation = root / "VOC2007" / "ImageSets" / "Segmentation" / "val.txt"
  segmentation.write_text("000002\n000005\n")
  path = root / "VOC2007" / "JPEGImages" / f"{image_id}.jpg"
  path.write_bytes(path.read_bytes()[:-40])
  prepare(panoptic(root), tmp_path / "out")
  splits = open_prepared(tmp_path / "out").splits
  left = {name: set(s.image_ids) for name, s in splits.items()}
  wanted = {
    "train": {"000001", "000003", "000004"},
    "val": {"000002", "000005"},
  }
  assert left == {name: ids - {image_id} for name, ids in wanted.items()}
  assert image_id in (tmp_path / "out" / "quarantine.txt").read_text()


def test_target(root):
  record = panoptic(root).splits["val"][0]
  path = root / "VOC2007" / "JPEGImages" / "000005.jpg"
  assert record.image == path.read_bytes()
  assert (record.height, record.width) == SIZE
  assert record.instances is None
  assert record.target.ids.dtype == np.int32
  np.testing.assert_array_equal(record.target.ids, grid(IDS))
  assert record.target.segments == SEGMENTS


def test_a_frame_without_background_or_objects(root):
  folder = root / "VOC2007"
  full = np.full(SIZE, 10, np.uint8)
  add_masks(folder, "000005", full, np.full(SIZE, 7, np.uint8))
  target = panoptic(root).splits["val"][0].target
  assert target.segments == (Segment(1, COW, True, 1.0, 48),)
  assert (target.ids == 1).all()
  add_masks(folder, "000005", full * 0, full * 0)
  target = panoptic(root).splits["val"][0].target
  assert target.segments == (Segment(1, BACKGROUND, False, 1.0, 48),)
  add_masks(folder, "000005", full * 0 + 255, full * 0 + 255)
  target = panoptic(root).splits["val"][0].target
  assert target.segments == ()
  assert not target.ids.any()


def test_the_most_frequent_class_of_an_object_counts(root):
  # 3 pixels of class 10, 2 of class 3, 5 of the background and 6 void.
  objects, classes = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
  objects[:2] = 1
  classes[:2].flat[:11] = [10, 3, 10, 3, 10] + [255] * 6
  add_masks(root / "VOC2007", "000005", classes, objects)
  target = panoptic(root).splits["val"][0].target
  assert target.segments == (
    Segment(1, COW, True, 1.0, 16),
    Segment(2, BACKGROUND, False, 1.0, 32),
  )


def test_class_pixels_of_no_object_are_void(root):
  classes = np.zeros(SIZE, np.uint8)
  classes[0] = 5
  add_masks(root / "VOC2007", "000005", classes, np.zeros(SIZE, np.uint8))
  target = panoptic(root).splits["val"][0].target
  assert target.segments == (Segment(1, BACKGROUND, False, 1.0, 40),)
  assert not target.ids[0].any()


def test_sets_are_chosen_by_name(root, capsys):
  splits = panoptic(root, train_set="train", val_set="train").splits
  # Main/train for training, Segmentation/train for validation.
  assert ids_of(splits["train"]) == ["000001"]
  assert ids_of(splits["val"]) == ["000002"]
  splits = panoptic(root, train_set="val", val_set="train").splits
  assert ids_of(splits["train"]) == ["000005"]  # there is no Main/val
  capsys.readouterr()
  (root / "VOC2007" / "ImageSets" / "Segmentation" / "val.txt").unlink()
  write_list(root / "VOC2007", "Segmentation/more", ["000005", "000002"])
  splits = panoptic(root).splits
  assert ids_of(splits["val"]) == ["000005", "000002"]
  assert ids_of(splits["train"]) == ["000001", "000003", "000004"]
  said = capsys.readouterr().err
  assert "has no val.txt; validation is on all images of more.txt" in said
  assert "2 images of the training set" in said


def test_the_folder_of_the_year_is_accepted(root, monkeypatch):
  assert len(panoptic(root / "VOC2007").splits["train"]) == 4
  monkeypatch.chdir(root / "VOC2007")
  assert len(panoptic(".").splits["train"]) == 4
  (root / "VOC2007").rename(root / "mine")
  assert len(detection(root / "mine").splits["train"]) == 5


def test_train_aug(devkit, capsys):
  source = augmented(devkit)
  assert source.name == "voc2012_panoptic"
  # 01 02 of VOC, 06 07 08 of SBD: its 03 and 04 are for validation.
  assert [i[-1] for i in ids_of(source.splits["train"])] == list("12678")
  assert [i[-1] for i in ids_of(source.splits["val"])] == list("345")
  assert "2 images of the training set" in capsys.readouterr().err
  assert "everingham2010" in source.citation
  assert "hariharan2011" in source.citation
  assert {r.tags for r in source.splits["train"]} == {(COW, BACKGROUND)}
  assert len(augmented(devkit, train_set="train_aug").splits["train"]) == 5
  splits = augmented(devkit, train_set="trainval").splits
  assert [i[-1] for i in ids_of(splits["train"])] == list("129")
  # Another list for validation: its images go, and those of "val" do not come.
  write_list(
    devkit / "VOCdevkit" / "VOC2012", "Segmentation/own", ["2008_000001"]
  )
  splits = augmented(devkit, val_set="own").splits
  assert [i[-1] for i in ids_of(splits["train"])] == list("2678")


def test_2012_without_sbd(devkit):
  add_masks(devkit / "VOCdevkit" / "VOC2012", "2008_000004")
  source = augmented(devkit, sbd="")
  assert [i[-1] for i in ids_of(source.splits["train"])] == list("129")
  assert [r.target.segments for r in source.splits["val"]] == [SEGMENTS] * 3


@pytest.mark.parametrize("given", ["", "benchmark_RELEASE", "flat"])
def test_layouts_of_sbd(devkit, given):
  if given == "flat":
    (devkit / "benchmark_RELEASE" / "dataset").rename(devkit / "flat")
  assert len(augmented(devkit, sbd=devkit / given).splits["train"]) == 5


def test_annotation_source(devkit):
  # 03 has PNG and .mat files, 04 .mat files, 05 PNG files.
  val = augmented(devkit).splits["val"]
  assert [r.target.segments for r in val] == [SEGMENTS, SBD_SEGMENTS, SEGMENTS]
  val = augmented(devkit, annotation_source="sbd").splits["val"]
  assert [r.target.segments for r in val] == [
    SBD_SEGMENTS,
    SBD_SEGMENTS,
    SEGMENTS,
  ]
  expected = np.full(SIZE, 3, np.int32)
  expected[:2, :3], expected[4:, 4:] = 1, 2
  np.testing.assert_array_equal(val[0].target.ids, expected)


def test_sbd_void_and_types(devkit):
  sbd = devkit / "benchmark_RELEASE" / "dataset"
  objects, classes = SBD_OBJECTS.copy(), SBD_CLASSES.copy()
  objects[3], classes[3] = 255, 255
  add_mat(
    sbd, "2008_000004", classes.astype(np.int16), objects.astype(int), [1.0, 12]
  )
  target = augmented(devkit).splits["val"][1].target
  assert target.segments == (
    *SBD_SEGMENTS[:2],
    Segment(3, BACKGROUND, False, 1.0, 26),
  )
  assert not target.ids[3].any()


def test_an_sbd_image_without_objects(devkit):
  sbd = devkit / "benchmark_RELEASE" / "dataset"
  empty = np.zeros(SIZE, np.uint8)
  add_mat(sbd, "2008_000004", empty, empty, [])
  target = augmented(devkit).splits["val"][1].target
  assert target.segments == (Segment(1, BACKGROUND, False, 1.0, 48),)


def test_training_needs_no_masks(devkit, monkeypatch):
  splits = augmented(devkit).splits
  for name in ("SegmentationClass", "SegmentationObject"):
    shutil.rmtree(devkit / "VOCdevkit" / "VOC2012" / name)
  for name in ("cls", "inst"):
    shutil.rmtree(devkit / "benchmark_RELEASE" / "dataset" / name)

  def fail(*args, **kwargs):
    raise AssertionError("a mask is read")

  monkeypatch.setattr(Image, "open", fail)
  monkeypatch.setattr(scipy.io, "loadmat", fail)
  records = list(splits["train"])
  assert len(records) == 5
  assert all(r.target is None and r.instances is None for r in records)


def test_making_a_source_opens_no_mask(devkit, monkeypatch):
  opened = []
  monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
  monkeypatch.setattr(scipy.io, "loadmat", lambda *a, **k: opened.append(a))
  augmented(devkit, annotation_source="sbd")
  assert opened == []


def test_detection_source(root):
  source = detection(root)
  assert source.name == "voc2007_detection"
  assert source.categories.names == voc.VOC_NAMES
  assert source.categories.num_things == len(source.categories) == 20
  assert list(source.splits) == ["train", "val", "corloc"]
  train, val, corloc = source.splits.values()
  assert ids_of(train) == [f"00000{i}" for i in range(1, 6)]
  assert ids_of(corloc) == ids_of(train)
  assert ids_of(val) == ["000006", "000007"]
  assert [r.tags for r in train] == [
    (CAT, DOG),
    (PERSON,),
    (BIRD,),
    (BIRD, COW),
    (AEROPLANE, PERSON),
  ]
  assert all(r.instances is None and r.target is None for r in train)
  assert [r.tags for r in corloc] == [r.tags for r in train]
  assert [r.image for r in corloc] == [r.image for r in train]
  assert corloc[3].instances.is_difficult.tolist() == [True, True]
  assert corloc[0].instances.category.tolist() == [DOG, CAT, DOG]
  assert corloc[1].instances.category.tolist() == [PERSON]
  assert "everingham2010" in source.citation
  assert list(detection(root, corloc=False).splits) == ["train", "val"]


def test_boxes(root):
  one, two = (record.instances for record in detection(root).splits["val"])
  # x 2 .. 2, y 3 .. 4, counted from 1 and inclusive: 2 rows, 1 column.
  assert one.boxes.tolist() == [[2, 1, 4, 2]]
  assert one.area.tolist() == [2]
  assert two.boxes.tolist() == [[0, 1.5, 5.25, 8], [0, 0, 6, 8]]
  assert two.area.tolist() == [5.25 * 6.5, 48]
  assert two.category.tolist() == [BIRD, COW]
  assert two.is_difficult.tolist() == [True, False]
  assert two.is_crowd.tolist() == [False, False]
  assert two.rles == ()
  assert two.boxes.dtype == two.area.dtype == np.float64
  assert two.category.dtype == np.int32
  assert two.is_difficult.dtype == two.is_crowd.dtype == bool


def test_detection_sets(root, capsys):
  splits = detection(root, train_set="trainval", val_set="train").splits
  assert ids_of(splits["train"]) == ["000003", "000004", "000005"]
  assert ids_of(splits["val"]) == ["000001", "000002"]
  assert "2 images of the training set" in capsys.readouterr().err
  (root / "VOC2007" / "Annotations" / "000007.xml").unlink()
  splits = detection(root).splits
  assert list(splits) == ["train", "corloc", "test"]
  assert ids_of(splits["test"]) == ["000006", "000007"]
  assert [r.tags for r in splits["test"]] == [(), ()]  # not even those known
  assert [r.instances for r in splits["test"]] == [None, None]
  said = capsys.readouterr().err
  assert "1 of 2 images have no file in Annota" in said
  assert "the images are for VOC's server" in said
  assert list(detection(root, val_set="train").splits)[1:] == ["val", "corloc"]
  capsys.readouterr()
  (root / "VOC2007" / "JPEGImages" / "000006.jpg").unlink()
  assert list(detection(root).splits) == ["train", "corloc"]
  assert "are left out, since 1 are absent" in capsys.readouterr().err
  (root / "VOC2007" / "ImageSets" / "Main" / "test.txt").unlink()
  assert list(detection(root).splits) == ["train", "corloc"]
  assert capsys.readouterr().err == ""


def test_images_without_objects(root, capsys):
  for image_id in ("000002", "000006"):
    (root / "VOC2007" / "Annotations" / f"{image_id}.xml").write_text(
      "<annotation></annotation>"
    )
  splits = detection(root).splits
  assert "1 training images show no object, e.g. 000002" in (
    capsys.readouterr().err
  )
  for name in ("train", "corloc"):
    assert ids_of(splits[name]) == ["000001", "000003", "000004", "000005"]
  record = splits["val"][0]
  assert (record.image_id, record.tags) == ("000006", ())
  assert record.instances.boxes.shape == (0, 4)
  assert record.instances.area.shape == (0,)


def test_lists_of_other_systems(root):
  path = root / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
  path.write_bytes(b"\xef\xbb\xbf000001 \r\n\r\n000003\r\n000001\r\n")
  assert ids_of(panoptic(root).splits["train"]) == ["000001", "000003"]


def listed(text, name="Main/trainval"):
  return lambda folder: (folder / "ImageSets" / f"{name}.txt").write_bytes(text)


def annotated(text):
  return lambda folder: (folder / "Annotations" / "000003.xml").write_bytes(
    text if isinstance(text, bytes) else text.encode()
  )


def remove(name):
  def spoil(folder):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()

  return spoil


ENTITIES = (
  '<?xml version="1.0"{}?><!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa">'
  + "".join(
    f'<!ENTITY {name} "{f"&{inner};" * 10}">'
    for inner, name in zip("abcdefgh", "bcdefghi", strict=True)
  )
  + "]><annotation><object><name>&i;</name></object></annotation>"
)
OUTER = (
  '<!DOCTYPE annotation [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
  "<annotation><object><name>&a;</name></object></annotation>"
)


@pytest.mark.parametrize("make", [panoptic, detection])
@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (
      listed(b"000001\n../../etc/passwd\n"),
      r"trainval\.txt, line 2: '\.\./\.\./etc/passwd' is no image name",
    ),
    (listed(b"/etc/passwd\n"), "line 1: '/etc/passwd' is no image name"),
    (listed(b"..\n"), r"line 1: '\.\.' is no image name"),
    (listed(b".hidden\n"), "is no image name"),
    (listed(b"000001\0\n"), "is no image name"),
    (listed(b"000001 -1\n"), "'000001 -1' is no image name.*or a label"),
    (listed("Küche\n".encode()), "'Küche' is no image name"),
    (listed(b"\xff\xfe0\n"), r"trainval\.txt: is no list in UTF-8"),
    (listed(b"\n\n"), r"trainval\.txt: lists no image"),
    (listed(b"0" * 10_000_001), "more than 10000000 bytes"),
    (
      remove("ImageSets/Main/trainval.txt"),
      r"no list 'trainval' in Main or Segmentation; choose one of test, train,"
      " val",
    ),
    (
      remove("Annotations/000003.xml"),
      r"000003\.xml: no such file, but the tags .*unpack .*VOC2012 trainval",
    ),
    (annotated(ENTITIES.format("")), r"000003\.xml: .*has a DOCTYPE"),
    (
      annotated(ENTITIES.format(' encoding="UTF-16"').encode("utf-16")),
      "has a DOCTYPE",
    ),
    (annotated(OUTER), "has a DOCTYPE"),
    (annotated("<annotation><object>"), r"000003\.xml: is no XML file of VOC"),
    (annotated(""), "is no XML file of VOC"),
    (annotated('<?xml version="1.0" encoding="x"?><a/>'), "is no XML file"),
    (annotated("<html></html>"), "holds <html>, not VOC's <annotation>"),
    (annotated(" " * 10_000_001), "more than 10000000 bytes"),
    (
      annotated(f"<annotation>{thing('zebra')}</annotation>"),
      r"000003\.xml: has an object 'zebra'.*; the classes are aeroplane, bic",
    ),
    (annotated(f"<annotation>{thing('background')}</annotation>"), "no class"),
    (annotated("<annotation><object/></annotation>"), "has an object ''"),
    (
      annotated(f"<annotation>{thing('cow', difficult='no')}</annotation>"),
      "'cow' has <difficult> 'no'; it must be 0 or 1",
    ),
  ],
)
def test_faults_of_lists_and_annotations(root, make, spoil, message):
  spoil(root / "VOC2007")
  with pytest.raises(InputError, match=message):
    make(root)


@pytest.mark.parametrize(
  "box",
  [
    ("", 1, 2, 3),
    (1, 1, "x", 3),
    (3, 1, 2, 3),
    (1, 4, 2, 3),
    ("nan", 1, 2, 3),
    (1, 1, "inf", 3),
  ],
)
def test_faults_of_boxes(root, box):
  annotated(f"<annotation>{thing('cow', box)}</annotation>")(root / "VOC2007")
  with pytest.raises(InputError, match=r"000003\.xml: .*'cow' has the <bndb"):
    detection(root)
  assert len(panoptic(root).splits["train"]) == 4  # needs no boxes


def test_an_object_without_a_box_or_a_flag(root):
  annotated("<annotation><object><name>cow</name></object></annotation>")(
    root / "VOC2007"
  )
  with pytest.raises(InputError, match=r"<bndbox> \(\); wanted"):
    detection(root)
  assert panoptic(root).splits["train"][2].tags == (COW, BACKGROUND)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"year": "2010"}, r"year is '2010'; choose one of \('2007', '2012'\)"),
    ({"year": "2012"}, "neither VOC2012 nor ImageSets"),
    ({"train_set": "tset"}, "no list 'tset'.*choose one of test, train, trai"),
    ({"train_set": "../Main/trainval"}, r"no list '\.\./Main/trainval'"),
    ({"val_set": "nowhere"}, "no list 'nowhere'"),
    ({"train_set": "dog_train"}, "'000001  1' is no image name"),
    (
      {"train_set": "train", "val_set": "trainval"},
      "every image of the training set is for validation",
    ),
  ],
)
@pytest.mark.parametrize("make", [panoptic, detection])
def test_faults_of_options(root, make, options, message):
  with pytest.raises(InputError, match=message):
    make(root, **options)


def test_faults_of_panoptic_options(root, devkit, tmp_path):
  for options, message in (
    ({"train_set": "train_aug"}, "'train_aug' but no folder of SBD"),
    ({"annotation_source": "sbd"}, "'sbd' but no folder of SBD"),
    ({"annotation_source": "SBD"}, "is 'SBD'; choose 'voc' or 'sbd'"),
    ({"sbd": tmp_path}, "year is '2007'; SBD has masks .* 2012 only"),
  ):
    with pytest.raises(InputError, match=message):
      panoptic(root, **options)
  with pytest.raises(InputError, match=r"does not hold cls, inst, train\.txt"):
    augmented(devkit, sbd=tmp_path / "VOCdevkit")


def test_faults_of_folders(root):
  with pytest.raises(InputError, match="nowhere: no such folder; give the"):
    panoptic(root / "nowhere")
  with pytest.raises(InputError, match="VOC2007: it is another year's"):
    panoptic(root / "VOC2007", year="2012")


def test_no_lists_at_all(root):
  shutil.rmtree(root / "VOC2007" / "ImageSets" / "Segmentation")
  with pytest.raises(InputError, match="Segmentation: has no list of images"):
    panoptic(root)
  (root / "VOC2007" / "ImageSets" / "Main").rename(root / "Main")
  with pytest.raises(InputError, match=r"none \(no lists at all\)"):
    detection(root)


def test_missing_files_of_images(root):
  source = panoptic(root)
  (root / "VOC2007" / "JPEGImages" / "000003.jpg").unlink()
  assert source.splits["train"][1].image_id == "000002"
  with pytest.raises(InputError, match=r"000003\.jpg: no such file, but a l"):
    source.splits["train"][2]
  (root / "VOC2007" / "SegmentationObject" / "000005.png").unlink()
  with pytest.raises(InputError, match=r"Object.000005\.png: no such file"):
    source.splits["val"][0]
  with pytest.raises(InputError, match=r"Object.000005\.png: no such file"):
    panoptic(root)


def test_images_without_masks_that_sbd_does_not_list(devkit):
  shutil.rmtree(devkit / "VOCdevkit" / "VOC2012" / "SegmentationClass")
  with pytest.raises(InputError, match=r"5\.png: .*, and SBD does not list"):
    augmented(devkit)


def png_mode(mode):
  def spoil(folder):
    for name in ("SegmentationClass", "SegmentationObject"):
      path = folder / name / "000005.png"
      Image.open(path).convert(mode).save(path)

  return spoil


def png_values(classes=CLASSES, objects=OBJECTS):
  return lambda folder: add_masks(folder, "000005", classes, objects)


def resized(names):
  def spoil(folder):
    for name in names:
      path = folder / name / "000005.png"
      Image.open(path).resize((8, 5)).save(path)

  return spoil


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (png_mode("RGB"), r"Class.000005\.png: is a PNG of mode 'RGB'; wanted a"),
    (png_mode("1"), "mode '1'"),
    (
      resized(["SegmentationClass"]),
      r"Class.000005\.png: is 5 x 8 \(height x width\), but the image is 6 x 8",
    ),
    (resized(["SegmentationObject"]), r"Object.000005\.png: is 5 x 8"),
    (resized(["SegmentationObject", "SegmentationClass"]), "is 5 x 8"),
    (
      png_values(classes=np.full(SIZE, 21, np.uint8)),
      r"Class.000005\.png: has the labels \[21\]; wanted 0 \.\. 20 or 255",
    ),
    (
      png_values(classes=np.zeros(SIZE, np.uint8)),
      r"Object.000005\.png: object 1 has no pixel of a class in .*Class",
    ),
    (
      lambda folder: (folder / "SegmentationClass" / "000005.png").write_bytes(
        b"\x89PNG"
      ),
      "cannot be decoded",
    ),
  ],
)
def test_faults_of_masks(root, spoil, message):
  spoil(root / "VOC2007")
  val = panoptic(root).splits["val"]
  with pytest.raises(InputError, match=message):
    val[0]


def test_grey_masks_are_read(root):
  for name, text in (
    ("SegmentationClass", CLASSES),
    ("SegmentationObject", OBJECTS),
  ):
    path = root / "VOC2007" / name / "000005.png"
    Image.fromarray(grid(text)).save(path)
  assert panoptic(root).splits["val"][0].target.segments == SEGMENTS


class Payload:
  """Leaves a file behind if it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self._path,))


def objects_cell(path):
  cell = np.empty(SIZE, object)
  cell.fill(np.ones((1, 1)))
  scipy.io.savemat(
    path, {"GTinst": {"Segmentation": cell, "Categories": np.array([[1]])}}
  )


def mat(**fields):
  fields = {
    "Segmentation": SBD_OBJECTS,
    "Categories": np.array([[1], [12]]),
    **fields,
  }
  return lambda path: scipy.io.savemat(path, {"GTinst": fields})


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (
      lambda path: path.write_bytes(path.read_bytes()[:-150]),
      r"inst.2008_000004\.mat: is no readable MATLAB file",
    ),
    (lambda path: path.write_bytes(b""), "is no readable MATLAB file"),
    (lambda path: path.write_bytes(b"no" * 500), "is no readable MATLAB file"),
    (lambda path: path.write_bytes(b"0" * 10_000_001), "more than 10000000"),
    (lambda path: path.unlink(), r"\.mat: no such file, but SBD lists"),
    (
      lambda path: path.write_bytes(
        pickle.dumps(Payload(path.with_name("touched")))
      ),
      "is no readable MATLAB file",
    ),
    (objects_cell, r"Segmentation is an array \[6, 8\] of object; wanted"),
    (lambda path: scipy.io.savemat(path, {"x": 1}), "holds no struct GTinst"),
    (
      lambda path: scipy.io.savemat(path, {"GTinst": {"Segmentation": 1}}),
      "holds no struct GTinst with Segmentation and Categories",
    ),
    (lambda path: scipy.io.savemat(path, {"GTinst": 1}), "holds no struct"),
    (mat(Segmentation=SBD_OBJECTS * 0.5), r"\[6, 8\] of float64; wanted"),
    (mat(Segmentation=SBD_OBJECTS[None]), r"\[1, 6, 8\] of uint8; wanted"),
    (mat(Segmentation="text"), "is an array .* wanted a 2-D array of integers"),
    (
      mat(Segmentation=scipy.sparse.csc_matrix(SBD_OBJECTS.astype(float))),
      "Segmentation is an array",
    ),
    (mat(Segmentation=SBD_OBJECTS[:5]), "is 5 x 8 .* but the image is 6 x 8"),
    (
      mat(Segmentation=SBD_OBJECTS.astype(int) - 1),
      "object -1 has category No",
    ),
    (mat(Categories=np.array([[1]])), "object 2 has category None"),
    (mat(Categories=np.array([[1], [21]])), r"category 21; wanted 1 \.\. 20"),
    (mat(Categories=np.array([[0], [1]])), "object 1 has category 0"),
    (mat(Categories=np.array([[1], [1.5]])), "object 2 has category 1.5"),
    (mat(Categories=[[1, "x"]]), r"Categories are an array .* of <U21"),
    (mat(Categories=1j), "its Categories are an array .* of complex128"),
    (mat(Categories=np.ones((2, 2))), r"its Categories are an array \[2, 2\]"),
  ],
)
def test_faults_of_sbd_files(devkit, spoil, message):
  inst = devkit / "benchmark_RELEASE" / "dataset" / "inst"
  spoil(inst / "2008_000004.mat")
  val = augmented(devkit).splits["val"]
  with pytest.raises(InputError, match=message):
    val[1]
  assert val[0].target.segments == SEGMENTS
  assert not (inst / "touched").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_bytes_of_sbd_files_do_no_harm(tmp_path, compressed):
  # SciPy alone ends the process on many of these.
  buffer = io.BytesIO()
  scipy.io.savemat(
    buffer,
    {"GTinst": {"Segmentation": SBD_OBJECTS, "Categories": [[1], [12]]}},
  )
  good = buffer.getvalue()
  (tmp_path / "inst").mkdir()
  add_mat(tmp_path, "a", SBD_CLASSES, SBD_OBJECTS, [1, 12])
  path = tmp_path / "inst" / "a.mat"
  kept = 0
  for position in range(124, len(good)):
    for value in {0, 14, 118, 255} - {good[position]}:
      data = bytearray(good)
      data[position] = value
      if compressed:
        body = zlib.compress(data[128:], 1)
        data[128:] = struct.pack("<II", 15, len(body)) + body
      path.write_bytes(data)
      try:
        voc._read_mat_target(tmp_path, "a", size=SIZE)
        kept += 1
      except InputError:
        pass
  assert kept  # e.g. in what pads the elements


def test_a_small_file_does_not_unpack_to_a_large_one(devkit):
  path = devkit / "benchmark_RELEASE" / "dataset" / "inst" / "2008_000004.mat"
  mat(Segmentation=np.zeros((4000, 4000), np.uint8))(path)
  data = path.read_bytes()
  body = zlib.compress(data[128:])
  path.write_bytes(data[:128] + struct.pack("<II", 15, len(body)) + body)
  assert path.stat().st_size < 100_000
  with pytest.raises(InputError, match="or unpacks to over 10000000 bytes"):
    augmented(devkit).splits["val"][1]


def test_labels_of_sbd_are_checked(devkit):
  sbd = devkit / "benchmark_RELEASE" / "dataset"
  add_mat(sbd, "2008_000004", SBD_CLASSES + 21, SBD_OBJECTS, [1, 12])
  with pytest.raises(InputError, match=r"cls.2008_000004\.mat: has the label"):
    augmented(devkit).splits["val"][1]


def test_sbd_is_preferred_only_where_it_is_whole(devkit):
  # An image that SBD lists does not silently get other masks.
  path = devkit / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000003.mat"
  path.unlink()
  val = augmented(devkit, annotation_source="sbd").splits["val"]
  with pytest.raises(InputError, match=r"2008_000003\.mat: no such file"):
    val[0]


def test_real_images():
  if not REAL.is_dir():
    pytest.skip("shared/data/VOCdevkit is not beside the repository")
  source = panoptic(REAL)
  train, val = source.splits["train"], source.splits["val"]
  assert (len(train), len(val)) == (477, 20)
  assert not set(ids_of(train)) & set(ids_of(val))
  for record in val:
    classes, objects = (
      np.array(Image.open(REAL / "VOC2007" / folder / f"{record.image_id}.png"))
      for folder in ("SegmentationClass", "SegmentationObject")
    )
    ids, segments = record.target.ids, record.target.segments
    assert ids.shape == (record.height, record.width) == classes.shape
    np.testing.assert_array_equal(ids == 0, classes == 255)
    areas = [s.area for s in segments if s.category == BACKGROUND]
    shown = int((classes == 0).sum())
    assert areas == ([shown] if shown else [])
    things = [s for s in segments if s.is_thing]
    assert len(things) == len(set(np.unique(objects)) - {0, 255})
    # Here every object has one class.
    for s in things:
      assert (classes[ids == s.id] == s.category + 1).all()
  corloc = detection(REAL).splits["corloc"]
  assert len(corloc) == 497
  for record in corloc:
    boxes = record.instances.boxes
    assert len(boxes)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_voc_in_a_bucket(root, bucket):
  url = upload(root, bucket)
  for make in (detection, panoptic):
    assert plain(make(str(url))) == plain(make(root))
  with pytest.raises(InputError, match=r"memory://bucket/none: no such folder"):
    panoptic("memory://bucket/none")


def test_sbd_in_a_bucket(devkit, bucket):
  url = upload(devkit, bucket)
  for source in ("voc", "sbd"):
    found = augmented(url, annotation_source=source)
    assert plain(found) == plain(augmented(devkit, annotation_source=source))
  with pytest.raises(InputError, match=r"memory://bucket/none: does not hold"):
    augmented(url, sbd="memory://bucket/none")
