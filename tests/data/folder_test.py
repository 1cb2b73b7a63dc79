"""Tests of a folder of one's own images."""

import json
import os
import pathlib
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import folder, panoptic_files, prepare, prepared
from jtsm_jax.types import InputError, PanopticMap, Segment
from tests.data.buckets import plain, upload

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
  prepare.prepare(folder.folder_source(root), tmp_path / "out")
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
  assert [r.target for r in source.splits["val"]] == [None, None]
  (root / "val_tags.csv").unlink()
  assert folder.read_folder(root)[2] == []
  assert set(folder.folder_source(root).splits) == {"train"}


def test_tables_of_spreadsheets_are_read(root):
  # A byte-order mark, Windows line ends, quotes, further columns, any order.
  (root / "train_tags.csv").write_bytes(
    b'\xef\xbb\xbftags,by, image\r\n"sky;cow",me,a.jpg\r\n'
  )
  (entry,) = folder.read_folder(root)[1]
  assert (entry.name, entry.tags) == ("a.jpg", (COW, SKY))


def json_table(root, split, content):
  (root / f"{split}_tags.csv").unlink(missing_ok=True)
  (root / f"{split}_tags.json").write_text(
    content if isinstance(content, str) else json.dumps(content)
  )


def test_a_class_may_have_a_comma(root):
  classes([*CLASSES, {"id": 9, "name": "bus, red", "isthing": 1}])(root)
  table('image,tags\na.jpg,"cow;bus, red"\n')(root)
  (entry,) = folder.read_folder(root)[1]
  assert len(entry.tags) == 2


def test_tables_may_be_json(root):
  tables = folder.read_folder(root)
  train = {
    "a.jpg": ["sky", "cow"],
    "b c.png": ["Sheep dog"],
    "sub/d.jpg": ["cow", "cow"],
  }
  json_table(root, "train", train)
  json_table(root, "val", {"v.png": ["sky"], "w.png": []})
  assert folder.read_folder(root) == tables
  splits = folder.folder_source(root).splits
  assert (len(splits["train"]), len(splits["val"])) == (3, 2)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({}, "has no rows"),
    ([], r"holds a list; wanted \{"),
    ({"a.jpg": "cow"}, "'cow' is no list of tags"),
    ({"a.jpg": [1]}, r"\[1\] is no list of tags"),
    ({"a.jpg": []}, r"entry 'a\.jpg': image 'a\.jpg' has no tags"),
    ({"a.jpg": ["Cow"]}, r"'Cow' is no class \(did you mean 'cow'"),
    ({"a.jpeg": ["cow"]}, r"not in .*did you mean 'a\.jpg'"),
    ({"/a.jpg": ["cow"]}, "leaves the folder"),
    ({"": ["cow"]}, "'' is no name of a file"),
    ({"a.jpg": ["cow"], "./a.jpg": ["cow"]}, r"also in entry 'a\.jpg'"),
    ('{"a.jpg": ["cow"], "a.jpg": ["sky"]}', r"'a\.jpg' occurs twice"),
  ],
)
def test_faults_of_json_tables(root, content, message):
  json_table(root, "train", content)
  with pytest.raises(InputError, match=message):
    folder.read_folder(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_two_tables_of_a_split(root, split):
  (root / f"{split}_tags.json").write_text("{}")
  with pytest.raises(
    InputError, match=rf"{split}_tags\.csv and {split}_tags\.json; keep one"
  ):
    folder.read_folder(root)


def remove_panoptic(root):
  (root / "panoptic_val.json").unlink()


def add_instances(root):
  remove_panoptic(root)
  images = [
    {"id": i, "file_name": f"{name}.png", "height": 6, "width": 8}
    for i, name in enumerate("xwv")
  ]
  cow = {
    "id": 1,
    "image_id": 2,
    "category_id": 3,
    # x in 1 .. 4, y in 2 .. 3
    "segmentation": [[1, 2, 5, 2, 5, 4, 1, 4]],
    "bbox": [1, 2, 4, 2],
    "area": 8,
  }
  content = {"images": images, "annotations": [cow]}
  (root / "instances_val.json").write_text(json.dumps(content))


def test_instances(root, tmp_path):
  add_instances(root)
  source = folder.folder_source(root)
  assert all(r.instances is None for r in source.splits["train"])
  v, w = source.splits["val"]
  assert (v.target, v.height, v.width) == (None, 6, 8)
  assert v.instances.category.tolist() == [COW]
  assert v.instances.boxes.tolist() == [[2, 1, 4, 5]]
  # The runs are 8 2 4 2 4 2 4 2 20, columns first. From the fourth on they are
  # differences to the one two before; the last, 16, takes two characters.
  assert v.instances.rles == (b"82400000`0",)
  assert w.instances.category.tolist() == []
  prepare.prepare(source, tmp_path / "out")
  val = prepared.open_prepared(tmp_path / "out").splits["val"]
  assert val.instances(0).rles == v.instances.rles
  assert val.file_names == ("v.png", "w.png")
  assert val.source_ids == (2, 1)


def test_instances_lack_an_image(root):
  add_instances(root)
  table("image,tags\nv.png,\na.jpg,\n", "val_tags.csv")(root)
  with pytest.raises(
    InputError, match=r"instances_val\.json: 1 images .*'a\.jpg'; add it"
  ):
    folder.folder_source(root)


LABELS = np.array(
  [
    [3, 3, 0, 0, 5, 5, 255, 4],
    [3, 0, 0, 0, 5, 0, 255, 4],
    [0, 3, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 3],
    [5, 0, 0, 0, 0, 0, 3, 3],
    [5, 5, 5, 5, 0, 0, 0, 0],
  ],
  np.uint8,
)


def add_labels(root, image=None):
  remove_panoptic(root)
  (root / "labels_val").mkdir()
  if image is None:
    image = Image.fromarray(LABELS)
  image.save(root / "labels_val" / "v.png")
  save_grey(root / "labels_val" / "w.png", np.zeros((6, 8), np.uint8))


def save_grey(path, values):
  Image.fromarray(values).save(path)


def palette_image(values):
  image = Image.frombytes("P", values.shape[::-1], values.tobytes())
  image.putpalette([9, 8, 7] * 256)
  return image


@pytest.mark.parametrize("in_bucket", [False, True])
@pytest.mark.parametrize("truth", [None, add_instances, add_labels])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_names_match_however_unicode_spells_them(
  root, tmp_path, bucket, on_disk, truth, in_bucket, capsys
):
  if truth:
    truth(root)
  (root / "images" / "w.png").unlink()
  table("image,tags\nà/é.jpg,cow\n日本.jpg,sky\n中国.jpg,cow\n")(root)
  table("image,tags\nü.png,sky\n", "val_tags.csv")(root)

  def spelt(name):
    return unicodedata.normalize(on_disk, name)

  images = root / "images"
  (images / spelt("à")).mkdir()
  for old, new in {
    "images/a.jpg": "images/à/é.jpg",
    "images/b c.png": "images/日本.jpg",
    "images/sub/d.jpg": "images/中国.jpg",
    "images/v.png": "images/ü.png",
    "labels_val/v.png": "labels_val/ü.png",
  }.items():
    if (root / old).exists():
      (root / old).rename(root / spelt(new))
  for name in ("panoptic_val.json", "instances_val.json"):
    if (root / name).exists():
      text = (root / name).read_text()
      text = text.replace('"v.png"', json.dumps(spelt("ü.png")), 1)
      (root / name).write_text(text)
  state = folder.folder_state(root)
  source = folder.folder_source(upload(root, bucket) if in_bucket else root)
  train, val = source.splits["train"], source.splits["val"]
  assert [r.image_id for r in train] == ["à_é", "日本", "中国"]
  assert [r.image_id for r in val] == ["ü"]
  assert val[0].instances if truth is add_instances else val[0].target
  assert "not used" not in capsys.readouterr().err
  prepare.prepare(source, tmp_path / "out")
  data = prepared.open_prepared(tmp_path / "out")
  assert data.splits["train"][1].image_id == "日本"
  if truth is add_labels:  # are looked at, however they are spelt
    save_grey(root / spelt("labels_val/ü.png"), np.ones((9, 9), np.uint8))
    assert folder.folder_state(root) != state


@pytest.mark.parametrize(
  ("of_class", "of_tag"), [("NFC", "NFD"), ("NFD", "NFC")]
)
def test_tags_match_however_unicode_spells_them(root, of_class, of_tag):
  name = unicodedata.normalize(of_class, "café")
  tag = unicodedata.normalize(of_tag, "café")
  classes([*CLASSES, {"id": 9, "name": name, "isthing": 0}])(root)
  table(f"image,tags\na.jpg,sky;{tag}\n")(root)
  json_table(root, "val", {"v.png": [tag]})
  categories, train, val = folder.read_folder(root)
  assert categories.names[3] == name
  assert [e.tags for e in train + val] == [(SKY, 3), (3,)]
  twins = [{"id": i, "name": x, "isthing": 0} for i, x in ((8, name), (9, tag))]
  classes([*CLASSES, *twins])(root)
  with pytest.raises(InputError, match="name 'café' occurs twice"):
    folder.read_folder(root)


@pytest.mark.parametrize("kind", ["grey", "grey16", "palette"])
def test_labels(root, kind):
  add_labels(
    root,
    {
      "grey": lambda: Image.fromarray(LABELS),
      "grey16": lambda: Image.fromarray(LABELS.astype(np.uint16)),
      "palette": lambda: palette_image(LABELS),
    }[kind](),
  )
  v, w = folder.folder_source(root).splits["val"]
  assert w.target.segments == ()
  assert v.instances is None
  # Pixels that touch by a corner are of one thing; sky is one wherever it is.
  assert v.target.segments == (
    Segment(1, COW, True, 1.0, 4),
    Segment(2, COW, True, 1.0, 3),
    Segment(3, DOG, True, 1.0, 2),
    Segment(4, SKY, False, 1.0, 8),
  )
  assert v.target.ids.dtype == np.int32
  assert v.target.ids.tolist() == [
    [1, 1, 0, 0, 4, 4, 0, 3],
    [1, 0, 0, 0, 4, 0, 0, 3],
    [0, 1, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 2],
    [4, 0, 0, 0, 0, 0, 2, 2],
    [4, 4, 4, 4, 0, 0, 0, 0],
  ]


def test_values_0_and_255_may_be_classes(root):
  classes([CLASSES[0] | {"id": 0}, CLASSES[1] | {"id": 255}, CLASSES[2]])(root)
  values = np.full((6, 8), 255, np.uint8)
  values[2:] = 0
  add_labels(root, Image.fromarray(values))
  target = folder.folder_source(root).splits["val"][0].target
  assert target.segments == (
    Segment(1, COW, True, 1.0, 16),
    Segment(2, SKY, False, 1.0, 32),
  )


def test_class_ids_above_255(root):
  classes([CLASSES[0] | {"id": 1000}, *CLASSES[1:]])(root)
  add_labels(root, Image.fromarray(np.full((6, 8), 1000, np.uint16)))
  target = folder.folder_source(root).splits["val"][0].target
  assert target.segments == (Segment(1, SKY, False, 1.0, 48),)


def test_labels_lie_as_the_images_do(root):
  table("image,tags\nsub/d.jpg,\n", "val_tags.csv")(root)
  add_labels(root)
  with pytest.raises(InputError, match=r"labels_val: 1 images .*'sub/d\.jpg'"):
    folder.folder_source(root)
  (root / "labels_val/sub").mkdir()
  (root / "labels_val/v.png").rename(root / "labels_val/sub/d.png")
  assert len(folder.folder_source(root).splits["val"][0].target.segments) == 4


def test_labels_of_another_size_are_refused_by_prepare(root, tmp_path):
  add_labels(root, Image.fromarray(LABELS[1:]))
  with pytest.raises(InputError, match=r"masks of 'v' are for 5 x 8 .* 6 x 8"):
    prepare.prepare(folder.folder_source(root), tmp_path / "out")


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (
      Image.fromarray(LABELS + 1),
      r"v\.png: has pixels of the values \[1, 6\], which are no ids",
    ),
    (Image.fromarray(np.stack([LABELS] * 3, -1)), "8 bits and colour type 2"),
    (Image.fromarray(np.stack([LABELS] * 2, -1)), "8 bits and colour type 4"),
    (Image.fromarray(LABELS > 3), "1 bits and colour type 0"),
  ],
)
def test_faults_of_labels(root, image, message):
  add_labels(root, image)
  source = folder.folder_source(root)
  with pytest.raises(InputError, match=message):
    source.splits["val"][0]


def test_damaged_labels(root, monkeypatch):
  add_labels(root)
  val = folder.folder_source(root).splits["val"]
  path = root / "labels_val/v.png"
  data = path.read_bytes()
  for bad in (b"", data[:20], data[:50], b"no picture" * 9):
    path.write_bytes(bad)
    with pytest.raises(InputError, match=r"v\.png: cannot be decoded"):
      val[0]
  Image.fromarray(LABELS).save(path, format="BMP")
  with pytest.raises(InputError, match=r"v\.png: cannot be decoded"):
    val[0]
  path.write_bytes(data)
  monkeypatch.setattr(folder, "MAX_PIXELS", 47)
  with pytest.raises(InputError, match=r"6 x 8 pixels are more than .* 47"):
    val[0]


def test_labels_behind_a_link(root):
  add_labels(root)
  (root / "labels_val/v.png").rename(root / "outside.png")
  (root / "labels_val/v.png").symlink_to(root / "outside.png")
  with pytest.raises(InputError, match=r"of 'v\.png': 'v\.png' is a link that"):
    folder.folder_source(root)
  (root / "labels_val/v.png").unlink()
  (root / "labels_val/w.png").unlink()
  (root / "labels_val").rmdir()
  (root / "labels_val").write_text("")
  with pytest.raises(InputError, match="labels_val: is no folder"):
    folder.folder_source(root)


@pytest.mark.parametrize("second", ["instances_val.json", "labels_val"])
def test_ground_truth_of_two_forms(root, second):
  (root / second).mkdir()
  with pytest.raises(
    InputError, match=rf"2 forms, panoptic_val\.json and {second}; keep one"
  ):
    folder.folder_source(root)


@pytest.mark.parametrize("add", [add_labels, add_instances])
def test_training_opens_no_ground_truth(root, add, monkeypatch):
  add(root)
  opened = []

  def read_file(path):
    opened.append(path)
    return path.read_bytes()

  def fail(*args, **kwargs):
    raise AssertionError("an image was decoded")

  monkeypatch.setattr(folder, "read_file", read_file)
  monkeypatch.setattr(Image, "open", fail)
  records = list(folder.folder_source(root).splits["train"])
  assert all(r.target is None and r.instances is None for r in records)
  tables = {"classes.json", "train_tags.csv", "val_tags.csv"}
  assert [path for path in opened if path.name not in tables] == [
    root / "images" / name for name in ("a.jpg", "b c.png", "sub/d.jpg")
  ]


MSRC = pathlib.Path(__file__).parents[2].parent / "shared/data/msrc"


@pytest.mark.skipif(
  not MSRC.is_dir(), reason="there is no shared/data/msrc beside the repository"
)
def test_real_folder():
  source = folder.folder_source(MSRC)
  assert source.name == "msrc"
  assert source.citation == ""
  assert len(source.categories) == 21
  train, val = source.splits["train"], source.splits["val"]
  assert (len(train), len(val)) == (296, 98)
  assert all(r.target is None and r.tags for r in train)
  void = []
  for record in val:
    areas = sum(s.area for s in record.target.segments)
    void.append(1 - areas / record.target.ids.size)
  assert 0.1 < np.mean(void) < 0.3


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
  assert "1 images are in both tables of tags, train and val" in said
  (root / "panoptic_val.json").write_text("{}")
  (root / "val_tags.csv").unlink()
  folder.folder_source(root)
  said = capsys.readouterr().err
  assert "panoptic_val.json is not used" in said
  assert "tagged with" not in said


def test_says_of_which_classes_nothing_is_learnt(root, capsys):
  (root / "train_tags.csv").write_text("image,tags\na.jpg,sky\n")
  folder.folder_source(root)
  said = capsys.readouterr().err
  assert "no training image is tagged with cow, Sheep dog; nothing" in said


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


def add_twins(root):
  for name in ("a.png", "b_c.png"):
    save(root / "images" / name)
  table("image,tags\na.jpg,cow\nb c.png,cow\na.png,cow\n")(root)
  table("image,tags\nb_c.png,\n", "val_tags.csv")(root)


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
      table('image,tags\na.jpg,"cow, sky"\n'),
      r"line 2: tag 'cow, sky' is no class; separate the tags of an image by"
      r" ';', not by ','; the classes are cow, Sheep dog, sky",
    ),
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
    (
      add_twins,
      "(?s)'a.jpg' and 'a.png' would be called 'a'.*'b c.png' and 'b_c.png'",
    ),
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
    list(source.splits["train"])


@pytest.mark.parametrize("kind", ["panoptic", "labels"])
def test_a_folder_in_a_bucket(root, bucket, kind, capsys):
  if kind == "labels":
    for path in ("panoptic_val.json", "panoptic_val"):
      (root / path).rename(root.parent / path)
    (root / "labels_val").mkdir()
    for name in "vw":
      labels = Image.fromarray(np.full((6, 8), 5, np.uint8))
      labels.save(root / "labels_val" / f"{name}.png")
  wanted = plain(folder.folder_source(root))
  url = upload(root, bucket)
  assert plain(folder.folder_source(str(url))) == wanted
  assert capsys.readouterr().err == ""  # no file is unused
  table = url / "train_tags.csv"
  for name, message in {
    "A.jpg": r"'A\.jpg' is not in .*did you mean 'a\.jpg'",
    "../images/a.jpg": r"leaves the folder",
    "memory://bucket/mine/images/a.jpg": r"is not in",
  }.items():
    bucket.fs.pipe_file(table.path, f"image,tags\n{name},cow\n".encode())
    with pytest.raises(InputError, match=message):
      folder.folder_source(url)
  with pytest.raises(InputError, match="memory://bucket/none: no such folder"):
    folder.folder_source(bucket / "none")


def test_state_changes_with_tables_and_files(root):
  states = [folder.folder_state(root)]
  assert folder.folder_state(root) == states[0]
  (root / "notes.txt").write_text("nobody's business")
  assert folder.folder_state(root) == states[0]

  def note():
    states.append(folder.folder_state(root))

  with (root / "train_tags.csv").open("a") as file:
    file.write("\n")
  note()
  image = root / "images" / "a.jpg"
  image.write_bytes(image.read_bytes() + b"x")
  note()
  classes = (root / "classes.json").read_text()
  (root / "classes.json").write_text(classes + " ")
  note()
  assert len(set(states)) == 4


def test_state_of_a_bucket_is_not_looked_at(root, bucket):
  assert folder.folder_state(upload(root, bucket)) == ""
