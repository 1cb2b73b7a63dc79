"""Tests of a folder of one's own images."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import folder, panoptic_files, prepared
from jtsm_jax.types import InputError, PanopticMap, Segment

CLASSES = [
  {"id": 5, "name": "sky", "isthing": 0},
  {"id": 3, "name": "cow", "isthing": 1},
  {"id": 4, "name": "Sheep dog", "isthing": 1},
]
COW, DOG, SKY = 0, 1, 2


def save(path, value=0, size=(6, 8)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "mine"
  for i, name in enumerate(["a.jpg", "b c.png", "sub/d.jpg", "v.png", "w.png"]):
    save(root / "images" / name, i)
  (root / "classes.json").write_text(json.dumps(CLASSES))
  (root / "train_tags.csv").write_text(
    "image,tags\na.jpg,sky;cow\nb c.png, Sheep dog\n\nsub/d.jpg,cow;cow;\n"
  )
  (root / "val_tags.csv").write_text("image,tags\nv.png,sky\nw.png,\n")
  ids = np.zeros((6, 8), np.int32)
  ids[3:] = 9
  panoptic_files.write_panoptic(
    root / "panoptic_val.json",
    root / "panoptic_val",
    [
      ("v", "v.png", PanopticMap(ids, (Segment(9, SKY, False, 1.0, 24),))),
      ("w", "w.png", PanopticMap(np.zeros((6, 8), np.int32), ())),
    ],
    folder.read_folder(root)[0],
  )
  return root


def test_reads_classes_and_rows(root):
  categories, train, val = folder.read_folder(root)
  assert categories.names == ("cow", "Sheep dog", "sky")
  assert categories.num_things == 2
  assert [(e.image_id, e.name, e.tags) for e in train] == [
    ("a", "a.jpg", (COW, SKY)),
    ("b_c", "b c.png", (DOG,)),
    ("sub_d", "sub/d.jpg", (COW,)),
  ]
  assert [(e.image_id, e.tags) for e in val] == [("v", (SKY,)), ("w", ())]
  assert train[2].path == root / "images" / "sub" / "d.jpg"


def test_is_prepared_and_read_back(root, tmp_path):
  prepared.prepare(folder.folder_source(root), tmp_path / "out")
  data = prepared.open_prepared(tmp_path / "out")
  assert data.name == "mine"
  train, val = data.splits["train"], data.splits["val"]
  assert train.image_ids == ("a", "b_c", "sub_d")
  assert train[0].image == (root / "images" / "a.jpg").read_bytes()
  np.testing.assert_array_equal(train.tags, [[1, 0, 1], [0, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(val.sizes, [[6, 8]] * 2)
  assert val.target(0).segments == (Segment(9, SKY, False, 1.0, 24),)
  assert val.target(1).segments == ()


def test_validation_is_optional(root):
  (root / "panoptic_val.json").unlink()
  source = folder.folder_source(root)
  assert [record.target for record in source.val] == [None, None]
  (root / "val_tags.csv").unlink()
  assert folder.read_folder(root)[2] == []
  assert folder.folder_source(root).val is None


def test_tables_of_spreadsheets_are_read(root):
  # A byte-order mark, Windows line ends, quotes, further columns, any order.
  (root / "train_tags.csv").write_bytes(
    b'\xef\xbb\xbftags,by, image\r\n"sky;cow",me,a.jpg\r\n'
  )
  (entry,) = folder.read_folder(root)[1]
  assert (entry.name, entry.tags) == ("a.jpg", (COW, SKY))


def test_images_may_be_a_link_to_another_disk(root, tmp_path):
  (root / "images").rename(tmp_path / "disk")
  (root / "images").symlink_to(tmp_path / "disk")
  assert len(folder.read_folder(root)[1]) == 3


def test_says_what_is_not_used(root, capsys):
  save(root / "images" / "extra.png")
  with open(root / "val_tags.csv", "a") as file:
    file.write("a.jpg,cow\n")
  (root / "panoptic_val.json").unlink()
  folder.folder_source(root)
  said = capsys.readouterr().err
  assert "1 files in images/ are in no table" in said
  assert "1 images are in train_tags.csv and in val_tags.csv" in said
  (root / "panoptic_val.json").write_text("{}")
  (root / "val_tags.csv").unlink()
  folder.folder_source(root)
  assert "panoptic_val.json is not used" in capsys.readouterr().err


def remove(name):
  return lambda root: (root / name).unlink()


def table(text, name="train_tags.csv"):
  return lambda root: (root / name).write_text(text)


def classes(content):
  return lambda root: (root / "classes.json").write_text(json.dumps(content))


def add_link(root):
  outside = root.parent / "outside.png"
  save(outside)
  os.symlink(outside, root / "images" / "link.png")
  table("image,tags\nlink.png,cow\n")(root)


def add_twin(root):
  save(root / "images" / "a.png")
  table("image,tags\na.jpg,cow\na.png,cow\n")(root)


COW_CLASS = {"id": 1, "name": "cow", "isthing": 1}


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (remove("classes.json"), r"classes\.json: no such file"),
    (remove("train_tags.csv"), r"train_tags\.csv: no such file"),
    (
      lambda root: (root / "images").rename(root / "pictures"),
      "images: no such folder",
    ),
    (
      table("image;tags\na.jpg;cow\n"),
      r"columns image,tags; found 'image;tags'",
    ),
    (table(""), "columns image,tags; found ''"),
    (table("image,tags\n"), "has no rows"),
    (
      table("image,tags\na.jpg,cow\nb c.png,sheepdog\n"),
      r"train_tags\.csv, line 3: tag 'sheepdog' is no class \(did you mean"
      r" 'Sheep dog'\?\); the classes are cow, Sheep dog, sky",
    ),
    (table("image,tags\na.jpg,COW\n"), r"line 2.*did you mean 'cow'"),
    (table("image,tags\na.jpg,zebra\n"), r"'zebra' is no class; the classes"),
    (
      table("image,tags\na.jpeg,cow\n"),
      r"line 2: image 'a\.jpeg' is not in .*\(did you mean 'a\.jpg'\?\)",
    ),
    (
      table("image,tags\na.jpg,cow\nv.png,sky\na.jpg,sky\n"),
      r"line 4: image 'a\.jpg' is also in line 2",
    ),
    (table("image,tags\n./a.jpg,cow\na.jpg,sky\n"), "is also in line 2"),
    (table("image,tags\n/etc/hosts,cow\n"), "line 2.*leaves the folder"),
    (table("image,tags\n../mine/images/a.jpg,cow\n"), "leaves the folder"),
    (add_link, "is a link that leaves"),
    (add_twin, "'a.jpg' and 'a.png' would both be called 'a'"),
    (table("image,tags\na.jpg,\n"), r"line 2: image 'a\.jpg' has no tags"),
    (table("image,tags\na.jpg, ;\n"), "has no tags"),
    (table("image,tags\na.jpg,cow,sky\n"), "line 2: more values than columns"),
    (table("image,tags\na.jpg\n"), r"must be image,tags; found 'a\.jpg'"),
    (table("image,tags\n,cow\n"), "must be image,tags; found 'cow'"),
    (
      lambda root: (root / "train_tags.csv").write_bytes(b"image,tags\n\xff"),
      "no readable CSV in UTF-8",
    ),
    (
      table("image,tags\nv.png,birds\n", "val_tags.csv"),
      r"val_tags\.csv, line 2",
    ),
    (classes([]), "must be a list of classes"),
    (classes({"cow": 1}), "must be a list of classes"),
    (classes([{"id": 1, "name": "cow"}]), "is no class; wanted"),
    (classes([COW_CLASS | {"isthing": 2}]), "is no class; wanted"),
    (classes([COW_CLASS | {"name": "a;b"}]), "'a;b' cannot be a tag"),
    (classes([COW_CLASS, COW_CLASS | {"id": 2}]), "name 'cow' occurs twice"),
    (classes([COW_CLASS, COW_CLASS | {"name": "b"}]), "id 1 occurs twice"),
    (
      lambda root: (root / "classes.json").write_text("["),
      "no readable JSON",
    ),
  ],
)
def test_faults(root, spoil, message):
  spoil(root)
  with pytest.raises(InputError, match=message):
    folder.read_folder(root)


def test_missing_folder(tmp_path):
  with pytest.raises(
    InputError, match="nowhere: no such folder; a data folder"
  ):
    folder.read_folder(tmp_path / "nowhere")


def test_validation_image_without_ground_truth(root):
  with open(root / "val_tags.csv", "a") as file:
    file.write("sub/d.jpg,cow\n")
  with pytest.raises(InputError, match=r"1 images .*'sub/d\.jpg'; add it"):
    folder.folder_source(root)


def test_ground_truth_without_its_pngs(root):
  (root / "panoptic_val").rename(root / "masks")
  with pytest.raises(InputError, match="panoptic_val: no such folder"):
    folder.folder_source(root)


def test_image_that_vanishes(root):
  source = folder.folder_source(root)
  (root / "images" / "b c.png").unlink()
  with pytest.raises(InputError, match=r"b c\.png: cannot be read"):
    list(source.train)
