"""Tests of COCO's panoptic format."""

import json

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import panoptic_files
from jtsm_jax.types import Categories, InputError, PanopticMap, Segment

CATEGORIES = Categories.from_list(
  [
    {"id": 92, "name": "sky", "isthing": 0},
    {"id": 21, "name": "cow", "isthing": 1},
  ]
)
COW, SKY = 0, 1
IDS = np.array([[0, 7, 7], [0, 70000, 7], [70000, 70000, 300]], np.int32)
MAP = PanopticMap(
  IDS,
  (
    Segment(7, COW, True, 0.5, 3),
    Segment(70000, SKY, False, 1.0, 3),
    Segment(300, COW, True, 1.0, 1, True),
  ),
)


def test_ids_are_coded_as_coco_says():
  colours = panoptic_files.encode_ids(np.array([[0, 255, 256, 65536, 70000]]))
  assert colours.tolist() == [
    # 70000 = 112 + 17 * 256 + 1 * 65536
    [[0, 0, 0], [255, 0, 0], [0, 1, 0], [0, 0, 1], [112, 17, 1]]
  ]
  assert colours.dtype == np.uint8


def test_codes_round_trip():
  ids = np.random.default_rng(0).integers(0, 1 << 24, (9, 11)).astype(np.int32)
  decoded = panoptic_files.decode_ids(panoptic_files.encode_ids(ids))
  assert decoded.dtype == np.int32
  np.testing.assert_array_equal(decoded, ids)


@pytest.mark.parametrize("bad", [-1, 1 << 24])
def test_ids_that_do_not_fit_are_refused(bad):
  with pytest.raises(ValueError, match=str(bad)):
    panoptic_files.encode_ids(np.array([[bad]]))


def test_annotation_by_hand():
  annotation = panoptic_files.panoptic_annotation(5, "a.png", MAP, CATEGORIES)
  assert annotation["image_id"] == 5
  assert annotation["file_name"] == "a.png"
  assert annotation["segments_info"] == [
    {
      "id": 7,
      "category_id": 21,
      "isthing": 1,
      "area": 3,
      "bbox": [1, 0, 2, 2],
      "iscrowd": 0,
      "score": 0.5,
    },
    {
      "id": 70000,
      "category_id": 92,
      "isthing": 0,
      "area": 3,
      "bbox": [0, 1, 2, 2],
      "iscrowd": 0,
      "score": 1.0,
    },
    {
      "id": 300,
      "category_id": 21,
      "isthing": 1,
      "area": 1,
      "bbox": [2, 2, 1, 1],
      "iscrowd": 1,
      "score": 1.0,
    },
  ]


def test_annotation_refuses_segments_that_are_not_the_ids():
  with pytest.raises(ValueError, match=r"\[7\].*\[7, 300, 70000\]"):
    panoptic_files.panoptic_annotation(
      0, "a.png", PanopticMap(IDS, MAP.segments[:1]), CATEGORIES
    )


def write(folder):
  empty = PanopticMap(np.zeros((2, 2), np.int32), ())
  panoptic_files.write_panoptic(
    folder / "p.json",
    folder / "p",
    [(1, "sub/a.jpg", MAP), ("two", "b.png", empty)],
    CATEGORIES,
  )


def test_files_round_trip(tmp_path):
  write(tmp_path)
  maps = panoptic_files.read_panoptic(
    tmp_path / "p.json", tmp_path / "p", CATEGORIES
  )
  assert list(maps) == ["sub/a.jpg", "b.png"]
  np.testing.assert_array_equal(maps["sub/a.jpg"].ids, IDS)
  assert maps["sub/a.jpg"].segments == MAP.segments
  assert maps["b.png"].segments == ()
  content = json.loads((tmp_path / "p.json").read_text())
  assert content["categories"] == CATEGORIES.to_list()
  assert content["images"][0] == {
    "id": 1,
    "file_name": "sub/a.jpg",
    "height": 3,
    "width": 3,
  }
  assert not list(tmp_path.glob("*.partial"))


def test_results_are_known_by_image_id_without_a_list_of_images(tmp_path):
  write(tmp_path)
  path = tmp_path / "p.json"
  data = json.loads(path.read_text())
  path.write_text(json.dumps({"annotations": data["annotations"]}))
  read = panoptic_files.read_panoptic_results
  maps = read(path, tmp_path / "p", CATEGORIES)
  assert list(maps) == [1, "two"]
  np.testing.assert_array_equal(maps[1].ids, IDS)
  assert maps[1].segments == MAP.segments
  assert list(maps.part(["two"])) == ["two"]
  (tmp_path / "p/sub/a.png").unlink()
  assert 1 in maps  # which reads no map
  assert 2 not in maps
  data["annotations"][1]["image_id"] = 1
  path.write_text(json.dumps(data))
  with pytest.raises(InputError, match=r"image_id 1 .*twice"):
    read(path, tmp_path / "p", CATEGORIES)
  with pytest.raises(InputError, match="nowhere: no such folder"):
    read(path, tmp_path / "nowhere", CATEGORIES)


def test_two_images_with_one_png_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"a\.png"):
    panoptic_files.write_panoptic(
      tmp_path / "p.json",
      tmp_path,
      [(1, "a.jpg", MAP), (2, "a.png", MAP)],
      CATEGORIES,
    )


def edit_first(field, value):
  return lambda data: data["annotations"][0].__setitem__(field, value)


def edit_segment(field, value):
  def edit(data):
    data["annotations"][0]["segments_info"][0][field] = value

  return edit


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda d: d.pop("images"), "has no 'images'"),
    (lambda d: d.pop("annotations"), "has no 'annotations'"),
    (lambda d: d["annotations"][0].pop("file_name"), "has no 'file_name'"),
    (lambda d: d["images"][0].pop("file_name"), "has no 'file_name'"),
    (
      lambda d: d["annotations"][0].pop("segments_info"),
      "has no 'segments_info'",
    ),
    (edit_first("image_id", 99), "image 99 has no entry in 'images'"),
    (lambda d: d["annotations"].append(d["annotations"][0]), "twice"),
    (edit_first("file_name", "../a.png"), "leaves"),
    (edit_first("file_name", "/a.png"), "leaves"),
    (edit_first("file_name", "none.png"), r"none\.png: no such file"),
    (edit_segment("category_id", 5), r"category_id 5.*none of.*\[21, 92\]"),
    (edit_first("file_name", None), "None is no name of a file"),
    (edit_first("file_name", ""), "'' is no name of a file"),
    (edit_first("file_name", "a\0.png"), "is no name of a file"),
    (edit_first("segments_info", {}), r"'segments_info' .* type list"),
    (edit_first("image_id", [1]), r"image \[1\] has no entry"),
    (lambda d: d.update(annotations=None), r"'annotations' .* type list"),
    (lambda d: d["images"].append(d["images"][0]), "of another entry"),
    (edit_segment("category_id", [21]), r"category_id \[21\]"),
    (edit_segment("id", "7"), "'id' of a segment in .* is '7'; .*type int"),
    (edit_segment("id", 8), r"only in the PNG \[7\], only in the JSON \[8\]"),
    (edit_segment("id", 300), r"repeated in the JSON \[300\]"),
    (
      lambda d: d["images"][0].update(height=4),
      r"is 3 x 3 .*gives 4 x 3",
    ),
    (lambda d: d["categories"][0].update(name="dog"), "'dog' here but 'cow'"),
  ],
)
def test_faults_of_the_json(tmp_path, edit, message):
  write(tmp_path)
  path = tmp_path / "p.json"
  data = json.loads(path.read_text())
  edit(data)
  path.write_text(json.dumps(data))
  with pytest.raises(InputError, match=message):
    dict(panoptic_files.read_panoptic(path, tmp_path / "p", CATEGORIES))


def test_missing_pngs_are_named(tmp_path):
  write(tmp_path)
  maps = panoptic_files.read_panoptic(
    tmp_path / "p.json", tmp_path / "p", CATEGORIES
  )
  png = tmp_path / "p/sub/a.png"
  with pytest.raises(KeyError):
    maps["sub/a.png"]
  png.unlink()
  with pytest.raises(InputError, match=r"a\.png: no such file, but .*p\.json"):
    maps["sub/a.jpg"]


@pytest.mark.parametrize("linked", ["p/sub", "p/sub/a.png"])
def test_link_that_leaves_the_folder(tmp_path, linked):
  write(tmp_path)
  (tmp_path / linked).rename(tmp_path / "outside")
  (tmp_path / linked).symlink_to(tmp_path / "outside")
  with pytest.raises(InputError, match=r"'sub/a\.png' is a link that leaves"):
    panoptic_files.read_panoptic(
      tmp_path / "p.json", tmp_path / "p", CATEGORIES
    )


def test_png_is_measured_before_it_is_decoded(tmp_path, monkeypatch):
  write(tmp_path)

  def fail(*args):
    raise AssertionError("decoded")

  def look_up(**size):
    path = tmp_path / "p.json"
    data = json.loads(path.read_text())
    data["images"][0].update(size)
    path.write_text(json.dumps(data))
    return panoptic_files.read_panoptic(path, tmp_path / "p", CATEGORIES)[
      "sub/a.jpg"
    ]

  monkeypatch.setattr(panoptic_files, "decode_ids", fail)
  monkeypatch.setattr(Image.Image, "load", fail)
  with pytest.raises(InputError, match=r"is 3 x 3 .*gives 3 x 9"):
    look_up(width=9)
  monkeypatch.setattr(panoptic_files, "MAX_PIXELS", 8)
  with pytest.raises(InputError, match=r"3 x 3 pixels are more than .* 8;"):
    look_up(width=3)
  with pytest.raises(InputError, match=r"3 x 3 pixels are more than .* 8;"):
    look_up(width=None)


def test_faults_of_the_files(tmp_path):
  write(tmp_path)

  def read(name="p.json", folder="p"):
    return dict(
      panoptic_files.read_panoptic(
        tmp_path / name, tmp_path / folder, CATEGORIES
      )
    )

  with pytest.raises(InputError, match="none: no such folder"):
    read(folder="none")
  with pytest.raises(InputError, match=r"none\.json: no such file"):
    read(name="none.json")
  (tmp_path / "bad.json").write_text("{")
  with pytest.raises(InputError, match="no readable JSON"):
    read(name="bad.json")
  (tmp_path / "list.json").write_text("[]")
  with pytest.raises(InputError, match="holds a list"):
    read(name="list.json")
  png = tmp_path / "p" / "sub" / "a.png"
  Image.fromarray(IDS.astype(np.uint8)).save(png)
  with pytest.raises(InputError, match="mode 'L'"):
    read()
  Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(png, format="BMP")
  with pytest.raises(InputError, match="cannot be decoded"):
    read()
  png.write_bytes(b"no picture")
  with pytest.raises(InputError, match="cannot be decoded"):
    read()
