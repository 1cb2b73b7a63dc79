"""Tests of COCO's own files."""

import contextlib
import io
import json
import pathlib
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import coco as official
from pycocotools import cocoeval
from pycocotools import mask as mask_utils

from jtsm_jax.data import coco, panoptic_files
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import Categories, InputError, Segment
from tests.data.buckets import plain, upload

MINI = pathlib.Path(__file__).parents[2].parent / "shared/data/coco_mini"
needs_mini = pytest.mark.skipif(
  not MINI.is_dir(),
  reason="there is no shared/data/coco_mini beside the repository",
)

THINGS = [
  {"supercategory": "person", "id": 1, "name": "person"},
  {"supercategory": "animal", "id": 21, "name": "cow"},
]
STUFF = [{"supercategory": "sky", "id": 187, "name": "sky", "isthing": 0}]
PERSON, COW, SKY = 0, 1, 2
H, W = 4, 5
IDS = np.array(
  [[7, 7, 7, 7, 7], [7, 7, 7, 7, 7], [0, 300, 300, 9, 9], [0, 300, 9, 9, 9]],
  np.int32,
)
# Columns are counted first. As COCO compresses them: a number below 16 is one
# character, 48 + n; from the fourth on it is n - (the number two before), and
# negative ones are 32 + n.
RUNS = [2, 6, 4, 3, 5]
COMPRESSED = "264M1"
POLYGON = [1, 1, 4, 1, 4, 3, 1, 3]  # x in 1 .. 3, y in 1 .. 2


def image_entry(id_, name, **fields):
  return {"id": id_, "file_name": name, "height": H, "width": W} | fields


def segment(id_, category, crowd=0):
  # Official areas and boxes are there; the areas are counted in the PNG.
  return {
    "id": id_,
    "category_id": category,
    "iscrowd": crowd,
    "bbox": [0, 0, 1, 1],
    "area": 1,
  }


def panoptic_json(split):
  """Images 1 and 2 of "train", 3 of "val"; image 4 of "train" has no tag."""
  ids = {"train2017": (1, 2), "val2017": (3,)}[split]
  names = [(i, f"{i:012}") for i in ids]
  annotations = [
    {
      "image_id": i,
      "file_name": f"{name}.png",
      "segments_info": [
        segment(300, 21),
        segment(7, 187),
        segment(9, 1, crowd=1),
      ],
    }
    for i, name in names
  ]
  images = [image_entry(i, f"{name}.jpg") for i, name in names]
  if split == "train2017":
    annotations[1]["segments_info"] = [segment(7, 187), segment(8, 187)]
    images.append(image_entry(4, f"{4:012}.jpg"))
  return {
    "images": images,
    "annotations": annotations,
    "categories": STUFF + [c | {"isthing": 1} for c in THINGS],
  }


def annotation(image, category, mask, bbox=(1, 1, 3, 2), area=6.5, **fields):
  return {
    "id": 900,
    "image_id": image,
    "category_id": category,
    "segmentation": mask,
    "bbox": list(bbox),
    "area": area,
    "iscrowd": 0,
  } | fields


def instances_json(split):
  images = panoptic_json(split)["images"]
  if split == "train2017":
    annotations = [
      annotation(2, 21, "whatever", id=5),
      annotation(1, 21, None, iscrowd=1),
      annotation(1, 1, []),
    ]
  else:
    two = [POLYGON, [0, 0, 1, 0, 1, 1, 0, 1]]
    annotations = [
      annotation(3, 21, [POLYGON], bbox=(1.25, 1, 2.5, 2)),
      annotation(3, 1, {"size": [H, W], "counts": RUNS}, area=11.0, iscrowd=1),
      annotation(3, 1, {"size": [H, W], "counts": COMPRESSED}, area=9),
      annotation(3, 1, two),
    ]
    images.append(image_entry(5, "e.jpg"))
  return {"images": images, "annotations": annotations, "categories": THINGS}


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def save_images(folder, content):
  folder.mkdir(parents=True, exist_ok=True)
  for entry in content["images"]:
    pixels = np.full((H, W, 3), entry["id"], np.uint8)
    Image.fromarray(pixels).save(folder / entry["file_name"])


@pytest.fixture
def root(tmp_path):
  """The official layout of both kinds."""
  root = tmp_path / "coco"
  for split in ("train2017", "val2017"):
    content = panoptic_json(split)
    write(root / f"annotations/panoptic_{split}.json", content)
    pngs = root / f"annotations/panoptic_{split}"
    pngs.mkdir()
    if split == "val2017":
      panoptic_files.write_panoptic_png(pngs / f"{3:012}.png", IDS)
    content = instances_json(split)
    write(root / f"annotations/instances_{split}.json", content)
    save_images(root / split, content)
  return root


def edit(root, name, change):
  path = root / "annotations" / f"{name}.json"
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_panoptic(root, capsys):
  source = coco.coco_panoptic_source(root)
  assert source.name == "coco2017_panoptic"
  assert source.categories.names == ("person", "cow", "sky")
  assert [c.id for c in source.categories.items] == [1, 21, 187]
  assert source.categories.num_things == 2
  assert "lin2014coco" in source.citation
  assert r"Doll{\'a}r" in source.citation
  assert "kirillov2019panoptic" in source.citation
  assert list(source.splits) == ["train", "val"]
  train = list(source.splits["train"])
  # The crowd of persons counts; image 4 has no tag.
  assert [(r.image_id, r.tags) for r in train] == [
    ("000000000001", (PERSON, COW, SKY)),
    ("000000000002", (SKY,)),
  ]
  assert all(r.target is None and r.instances is None for r in train)
  assert train[0].image == (root / "train2017/000000000001.jpg").read_bytes()
  said = capsys.readouterr().err
  assert "1 of 3 images have no annotation, so no tags" in said
  (val,) = source.splits["val"]
  assert (val.image_id, val.tags) == ("000000000003", (PERSON, COW, SKY))
  np.testing.assert_array_equal(val.target.ids, IDS)
  assert val.target.segments == (
    Segment(300, COW, True, 1.0, 3),
    Segment(7, SKY, False, 1.0, 10),
    Segment(9, PERSON, True, 1.0, 5, True),
  )


def decoded(counts):
  with warnings.catch_warnings():  # pycocotools 2.0.11 is older than NumPy 2.
    warnings.simplefilter("ignore", DeprecationWarning)
    return mask_utils.decode({"size": [H, W], "counts": counts})


def test_instances(root, capsys):
  source = coco.coco_instances_source(root)
  assert source.name == "coco2017_instances"
  assert source.categories == Categories.from_list(
    [c | {"isthing": 1} for c in THINGS]
  )
  assert "lin2014coco" in source.citation
  assert "kirillov" not in source.citation
  train = list(source.splits["train"])
  assert [(r.image_id, r.tags) for r in train] == [
    ("000000000001", (PERSON, COW)),
    ("000000000002", (COW,)),
  ]
  assert all(r.target is None and r.instances is None for r in train)
  assert "1 of 3 images have no annotation" in capsys.readouterr().err
  val, empty = source.splits["val"]
  assert (val.height, val.width, val.tags) == (H, W, (PERSON, COW))
  found = val.instances
  assert found.category.tolist() == [COW, PERSON, PERSON, PERSON]
  assert found.boxes.dtype == np.float64
  assert found.boxes[:2].tolist() == [[1, 1.25, 3, 3.75], [1, 1, 3, 4]]
  assert found.area.tolist() == [6.5, 11, 9, 6.5]
  assert found.is_crowd.tolist() == [False, True, False, False]
  assert not found.is_difficult.any()
  rectangle = np.zeros((H, W), np.uint8)
  rectangle[1:3, 1:4] = 1
  np.testing.assert_array_equal(decoded(found.rles[0]), rectangle)
  runs = np.repeat([0, 1, 0, 1, 0], RUNS).reshape(W, H).T
  np.testing.assert_array_equal(decoded(found.rles[1]), runs)
  # Compressed by hand above and by pycocotools here.
  assert found.rles[1] == found.rles[2] == COMPRESSED.encode()
  rectangle[0, 0] = 1
  np.testing.assert_array_equal(decoded(found.rles[3]), rectangle)
  assert (empty.image_id, empty.tags) == ("e", ())
  assert empty.instances.boxes.shape == (0, 4)
  assert empty.instances.rles == ()


def test_masks_that_fill_or_leave_an_image(root):
  # 16 and more take two characters: 5 bits with the flag 32, then the rest.
  def change(content):
    masks = ["4`0", "0d0", "d0"]
    content["annotations"] = [
      annotation(3, 21, {"size": [H, W], "counts": c}) for c in masks
    ]
    content["annotations"].append(
      annotation(3, 21, [[-1, -1, W + 1, -1, W + 1, H + 1, -1, H + 1]])
    )

  edit(root, "instances_val2017", change)
  rles = coco.coco_instances_source(root).splits["val"][0].instances.rles
  assert [decoded(rle).sum() for rle in rles] == [16, 20, 0, 20]


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_training_opens_no_masks(root, monkeypatch, kind):
  opened = []

  def read_bytes(path):
    opened.append(path)
    with path.open("rb") as file:
      return file.read()

  def fail(*args, **kwargs):
    raise AssertionError("a mask was made")

  source = getattr(coco, f"coco_{kind}_source")(root)
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "read_bytes", read_bytes)
    patch.setattr(Image, "open", fail)
    patch.setattr(mask_utils, "frPyObjects", fail)
    assert len(list(source.splits["train"])) == 2
    assert {path.parent for path in opened} == {root / "train2017"}
    with pytest.raises((AssertionError, InputError), match="a mask was made"):
      source.splits["val"][0]


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_coco_in_a_bucket(root, bucket, kind):
  make = getattr(coco, f"coco_{kind}_source")
  url = upload(root, bucket)
  assert plain(make(str(url))) == plain(make(root))
  (image,) = (p for p in root.glob("train2017/*") if p.stem.endswith("1"))
  bucket.fs.rm(f"{url.path}/train2017/{image.name}")
  with pytest.raises(InputError, match=f"lacks 1 of .*{image.name}"):
    make(url)


def test_training_needs_no_masks(root):
  (root / "annotations/panoptic_train2017").rmdir()
  assert set(coco.coco_panoptic_source(root, val_set="").splits) == {"train"}


def test_files_beside_each_other(root):
  for path in (root / "annotations").iterdir():
    path.rename(root / path.name)
  (root / "annotations").rmdir()
  (root / "train2017").rename(root / "images")
  for path in (root / "val2017").iterdir():
    path.rename(root / "images" / path.name)
  (root / "val2017").rmdir()
  for make in (coco.coco_panoptic_source, coco.coco_instances_source):
    source = make(root)
    assert len(list(source.splits["train"])) == 2
    assert len(list(source.splits["val"])) >= 1


def test_png_folder_beside_annotations(root):
  (root / "annotations/panoptic_val2017").rename(root / "panoptic_val2017")
  assert coco.coco_panoptic_source(root).splits["val"][0].target is not None


def test_default_validation_set_is_optional(root):
  (root / "annotations/panoptic_val2017.json").unlink()
  assert set(coco.coco_panoptic_source(root).splits) == {"train"}
  with pytest.raises(InputError, match=r"no annotations/panoptic_test\.json"):
    coco.coco_panoptic_source(root, val_set="test")


def test_validation_on_training_images_is_noted(root, capsys):
  coco.coco_instances_source(root)
  assert "too good" not in capsys.readouterr().err
  source = coco.coco_panoptic_source(
    root, train_set="val2017", val_set="val2017"
  )
  assert len(source.splits["train"]) == len(source.splits["val"]) == 1
  assert source.splits["train"][0].target is None
  said = capsys.readouterr().err
  assert "1 images are trained on, too, e.g. '000000000003'" in said
  assert "too good" in said


def test_names_and_ids_are_the_jsons(root, tmp_path):
  def rename(content):
    content["images"][0]["file_name"] = "my u\u0308ber photo.jpg"

  edit(root, "instances_val2017", rename)
  folder = root / "val2017"
  (folder / f"{3:012}.jpg").rename(folder / "my u\u0308ber photo.jpg")
  prepare(coco.coco_instances_source(root), tmp_path / "out")
  val = open_prepared(tmp_path / "out").splits["val"]
  assert val.image_ids == ("my_\u00fcber_photo", "e")
  assert val.file_names == ("my u\u0308ber photo.jpg", "e.jpg")
  assert val.source_ids == (3, 5)


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_two_images_of_one_name_in_two_sets(root, kind):
  """What is made of an image, as its proposals, is filed under its name."""
  edit(root, f"{kind}_val2017", set_image(file_name=f"{1:012}.jpg"))
  (root / "val2017" / f"{3:012}.jpg").rename(root / f"val2017/{1:012}.jpg")
  make = getattr(coco, f"coco_{kind}_source")
  with pytest.raises(
    InputError,
    match=r"train2017/0+1\.jpg and .*val2017/0+1\.jpg .* '0+1'; rename one",
  ):
    make(root)


def set_image(**fields):
  return lambda content: content["images"][0].update(fields)


def set_annotation(**fields):
  return lambda content: content["annotations"][0].update(fields)


def repeat_image(**fields):
  return lambda c: c["images"].append(c["images"][0] | fields)


COMMON_FAULTS = [
  (lambda c: c.pop("images"), "has no 'images'"),
  (lambda c: c.pop("annotations"), "has no 'annotations'"),
  (lambda c: c.pop("categories"), "has no 'categories'"),
  (lambda c: c.update(images={}), r"'images' of the JSON is \{\}; .*type list"),
  (lambda c: c.update(categories=[]), "'categories' is empty"),
  (
    lambda c: c["categories"].append(c["categories"][0]),
    "occurs twice in 'categories'",
  ),
  (lambda c: c["categories"][0].pop("name"), "has no 'name'"),
  (lambda c: c["categories"][0].update(id="a"), "must be of the type int"),
  (lambda c: c["annotations"].clear(), "no image has an annotation"),
  (set_annotation(image_id=77), "image 77 has no entry in 'images'"),
  (set_annotation(image_id=[1]), r"image \[1\] has no entry in 'images'"),
  (repeat_image(file_name="new.jpg"), "has the id or the file_name of another"),
  (repeat_image(id=9), "has the id or the file_name of another"),
  (
    repeat_image(id=9, file_name=f"sub/{1:012}.jpg"),
    "'000000000001.jpg' and 'sub/000000000001.jpg' would both be called",
  ),
  (set_image(id=None), "it must be a number or a string"),
  (set_image(file_name=5), "must be of the type str"),
  (set_image(file_name=""), "'' is no name of a file"),
  (set_image(file_name="a\0b.jpg"), "is no name of a file"),
  (set_image(file_name="\ud800.jpg"), "is no name of a file"),
  (set_image(file_name="/etc/hosts"), "'/etc/hosts' leaves the folder"),
  (set_image(file_name="sub/../../a.jpg"), "leaves the folder"),
  (
    set_image(file_name="none.jpg"),
    r"train2017: lacks 1 of the 3 images .*'none\.jpg'",
  ),
]


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize(("change", "message"), COMMON_FAULTS)
def test_faults_of_the_training_set(root, kind, change, message):
  edit(root, f"{kind}_train2017", change)
  with pytest.raises(InputError, match=message):
    getattr(coco, f"coco_{kind}_source")(root)


def test_unknown_categories_of_the_training_set(root):
  edit(root, "instances_train2017", set_annotation(category_id=187))
  with pytest.raises(InputError, match=r"category_id 187, .*none of \[1, 21\]"):
    coco.coco_instances_source(root)
  edit(
    root,
    "panoptic_train2017",
    lambda c: c["annotations"][0]["segments_info"][0].pop("category_id"),
  )
  with pytest.raises(InputError, match="category_id None"):
    coco.coco_panoptic_source(root)
  edit(root, "panoptic_train2017", lambda c: c["categories"][0].pop("isthing"))
  with pytest.raises(InputError, match="has no 'isthing'"):
    coco.coco_panoptic_source(root)


@pytest.mark.parametrize("inner", ["link.jpg", "folder/a.jpg"])
def test_link_that_leaves_the_images(root, inner):
  outside = root.parent / "outside"
  outside.mkdir()
  (outside / "a.jpg").write_bytes(b"secret")
  (root / "train2017/link.jpg").symlink_to(outside / "a.jpg")
  (root / "train2017/folder").symlink_to(outside)
  edit(root, "panoptic_train2017", set_image(file_name=inner))
  with pytest.raises(InputError, match="is a link that leaves"):
    coco.coco_panoptic_source(root)


def test_link_that_leaves_the_pngs(root):
  png = root / f"annotations/panoptic_val2017/{3:012}.png"
  png.rename(root / "outside.png")
  png.symlink_to(root / "outside.png")
  with pytest.raises(InputError, match=r"3\.png' is a link that leaves"):
    coco.coco_panoptic_source(root)


def test_links_within_and_of_folders(root):
  (root / "train2017").rename(root.parent / "disk")
  (root / "train2017").symlink_to(root.parent / "disk")
  first = root / "train2017" / f"{1:012}.jpg"
  first.rename(root / "train2017/real.jpg")
  first.symlink_to("real.jpg")
  assert len(list(coco.coco_panoptic_source(root).splits["train"])) == 2


def mask(**fields):
  rle = {"size": [H, W], "counts": RUNS} | fields
  return set_annotation(segmentation=rle)


VAL_FAULTS = [
  (set_annotation(category_id=9), r"category_id 9, .*none of \[1, 21\]"),
  (set_annotation(bbox=[1, 2, 3]), r"must be \[x, y, width, height\]"),
  (set_annotation(bbox=[1, 2, -3, 4]), r"must be \[x, y, width, height\]"),
  (set_annotation(bbox=[1, 2, float("nan"), 4]), "has the bbox"),
  (set_annotation(area=None), "has the area None"),
  (set_annotation(area=-1), "has the area -1"),
  (set_annotation(area=10**400), "has the area 1000"),
  (set_annotation(iscrowd=2), "iscrowd 2; it must be 0 or 1"),
  (set_annotation(segmentation=[]), "has no mask"),
  (set_annotation(segmentation="264M1"), "has no mask"),
  (set_annotation(segmentation=[[0, 0, 1, 1]]), "at least 6 finite numbers"),
  (set_annotation(segmentation=[[0, 0, 1, 1, 2, 2, 3]]), "at least 6"),
  (set_annotation(segmentation=[[*POLYGON, 0, float("inf")]]), "6 finite"),
  (set_annotation(segmentation=[[*POLYGON, "0", 1]]), "6 finite"),
  (set_annotation(segmentation=[POLYGON, POLYGON[:4]]), "at least 6"),
  (set_annotation(segmentation=[[*POLYGON, 0, 1e9]]), "far outside of its"),
  (mask(size=[W, H]), r"size \[5, 4\], but the image is \[4, 5\]"),
  (mask(size=None), "size None, but"),
  (mask(size=[10**5, 10**5]), r"size \[100000, 100000\], but"),
  (mask(counts=[2, 3]), "add up to 5 pixels"),
  (mask(counts=[25, -5]), "is damaged"),
  (mask(counts=[2**62, 2**62, 2**62, 2**62, 20]), "is damaged"),
  (mask(counts=[2**70]), "is damaged"),
  (mask(counts=[]), "neither a string nor a list"),
  (mask(counts=[2.5, 17.5]), "neither a string nor a list"),
  (mask(counts=None), "neither a string nor a list"),
  (mask(counts="264M2"), "add up to 21 pixels"),
  (mask(counts="0M"), "is damaged"),
  (mask(counts=""), "no complete string"),
  (mask(counts="264M`"), "no complete string"),
  (mask(counts="264M1 "), "no complete string"),
  (mask(counts="264Mé"), "is damaged"),
  (mask(counts="oooooooooo0"), "more than 30 bits"),
  (set_image(height=None), "has the height None"),
  (set_image(width=0), "and the width 0"),
  (set_image(width=10**7, height=10**7), "at most 64000000 in all"),
  (
    lambda c: c["categories"].reverse(),
    "has other categories than .*instances_train2017",
  ),
]


@pytest.mark.parametrize(("change", "message"), VAL_FAULTS)
def test_faults_of_instances(root, change, message):
  edit(root, "instances_val2017", change)
  with pytest.raises(InputError, match=message):
    coco.coco_instances_source(root)


def test_instances_of_stuff_are_refused(root):
  categories = Categories.from_list(
    [THINGS[0] | {"isthing": 1}, THINGS[1] | {"isthing": 0}]
  )
  path = root / "annotations/instances_val2017.json"
  with pytest.raises(InputError, match=r"annotation 900 .* stuff; only things"):
    coco.read_instances(path, categories)


def test_validation_image_without_annotation(root):
  edit(root, "panoptic_val2017", lambda c: c["annotations"].clear())
  with pytest.raises(InputError, match="1 images have no annotation"):
    coco.coco_panoptic_source(root)


def test_missing_files(root):
  with pytest.raises(InputError, match="nowhere: no such folder"):
    coco.coco_panoptic_source(root / "nowhere")
  with pytest.raises(InputError, match=r"no annotations/instances_x\.json"):
    coco.coco_instances_source(root, train_set="x")
  with pytest.raises(InputError, match="leaves the folder"):
    coco.coco_instances_source(root, train_set="../../x/y")
  (root / "annotations/panoptic_val2017").rename(root / "masks")
  with pytest.raises(InputError, match="val2017: no such folder; the PNG"):
    coco.coco_panoptic_source(root)
  source = coco.coco_instances_source(root)
  (root / f"train2017/{1:012}.jpg").unlink()
  with pytest.raises(InputError, match=r"1\.jpg: cannot be read"):
    source.splits["train"][0]
  (root / "train2017").rename(root / "pictures")
  with pytest.raises(InputError, match="train2017: no such folder; the images"):
    coco.coco_instances_source(root)


def test_is_prepared_and_read_back(root, tmp_path):
  source = coco.coco_instances_source(root)
  prepare(source, tmp_path / "out")
  val = open_prepared(tmp_path / "out").splits["val"]
  wanted = source.splits["val"][0].instances
  found = val.instances(0)
  np.testing.assert_array_equal(found.boxes, wanted.boxes)
  assert tuple(found.rles) == wanted.rles


@needs_mini
def test_real_panoptic_areas_are_the_official_ones():
  source = coco.coco_panoptic_source(MINI, val_set="train2017")
  assert len(source.categories) == 133
  assert source.categories.num_things == 80
  train, val = source.splits["train"], source.splits["val"]
  assert len(train) == len(val) == 100
  content = json.loads((MINI / "panoptic_train2017.json").read_text())
  segments_of = {
    a["file_name"].removesuffix(".png"): a["segments_info"]
    for a in content["annotations"]
  }
  compared = 0
  for record in val:
    official_areas = {s["id"]: s["area"] for s in segments_of[record.image_id]}
    assert {s.id: s.area for s in record.target.segments} == official_areas
    assert {s.category for s in record.target.segments} == set(record.tags)
    compared += len(official_areas)
  assert compared == sum(len(s) for s in segments_of.values()) > 1000


@pytest.fixture(scope="module")
def real_instances():
  return coco.coco_instances_source(MINI, val_set="train2017")


@needs_mini
def test_real_instances(real_instances):
  assert len(real_instances.categories) == 80
  assert len(real_instances.splits["train"]) == 258
  records = list(real_instances.splits["val"])
  assert len(records) == 260
  assert sum(not r.instances.is_crowd.all() for r in records) == 258
  assert sum(len(r.instances.category) for r in records) == 2131
  assert sum(r.instances.is_crowd.sum() for r in records) == 25
  for record in records[:20]:
    size = decode_image(record.image).shape[:2]
    assert size == (record.height, record.width)


@needs_mini
def test_compressed_masks_are_taken_as_they_are(real_instances, tmp_path):
  # pycocotools compresses; what it has written must be found sound.
  records = list(real_instances.splits["val"])[:40]
  content = as_json(records, real_instances.categories)
  write(tmp_path / "c.json", content)
  again = coco.read_instances(tmp_path / "c.json", real_instances.categories)
  for record in records:
    found = again[record.image_id]
    assert found.rles == record.instances.rles
    np.testing.assert_array_equal(found.boxes, record.instances.boxes)


def as_json(records, categories):
  annotations = []
  for record in records:
    truth = record.instances
    for n, (y0, x0, y1, x1) in enumerate(truth.boxes.tolist()):
      annotations.append(
        {
          "id": len(annotations) + 1,
          "image_id": record.image_id,
          "category_id": categories.items[truth.category[n]].id,
          "bbox": [x0, y0, x1 - x0, y1 - y0],
          "area": float(truth.area[n]),
          "iscrowd": int(truth.is_crowd[n]),
          "segmentation": {
            "size": [record.height, record.width],
            "counts": truth.rles[n].decode(),
          },
        }
      )
  images = [
    {
      "id": r.image_id,
      "file_name": r.image_id,
      "height": r.height,
      "width": r.width,
    }
    for r in records
  ]
  return {
    "images": images,
    "annotations": annotations,
    "categories": categories.to_list(),
  }


@needs_mini
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_ground_truth_against_itself_has_ap_1(real_instances, kind):
  records = list(real_instances.splits["val"])[:40]
  content = as_json(records, real_instances.categories)
  assert any(a["iscrowd"] for a in content["annotations"])
  results = [
    {k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")}
    | {"score": 1.0}
    for a in content["annotations"]
    if not a["iscrowd"]
  ]
  if kind == "bbox":
    results = [r | {"segmentation": []} for r in results]
    for result in results:
      del result["segmentation"]
  with contextlib.redirect_stdout(io.StringIO()):
    truth = official.COCO()
    truth.dataset = content
    truth.createIndex()
    evaluation = cocoeval.COCOeval(truth, truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
  assert evaluation.stats[0] == pytest.approx(1.0)
