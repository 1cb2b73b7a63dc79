"""Tests of predictions as files: read back by the tools that others use."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import coco

from jtsm_jax.data import panoptic_files
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.reporting import predictions
from jtsm_jax.reporting.visualize import class_colours
from jtsm_jax.types import (
  Categories,
  Category,
  Detections,
  PanopticMap,
  Segment,
)
from tests.run_lengths import decode, pack, unpack

CATEGORIES = Categories(
  (
    Category(7, "cow", True),
    Category(3, "dog", True),
    Category(5, "sky", False),
  )
)
MADE_WITH = {"step": 3, "image": "abc"}


def make_prediction(seed=0, size=(20, 30)):
  rng = np.random.default_rng(seed)
  ids = np.zeros(size, np.int32)
  ids[2:9, 3:12], ids[12:, :20] = 1, 300
  masks = rng.random((3, *size)) < 0.3
  masks[1] = False  # of which nothing is left
  return Prediction(
    index=0,
    panoptic=PanopticMap(
      ids,
      (
        Segment(1, 1, True, 0.75, int((ids == 1).sum())),
        Segment(300, 2, False, 0.5, int((ids == 300).sum())),
      ),
    ),
    detections=Detections(
      proposal=np.array([4, 0, 2], np.int32),
      category=np.array([1, 0, 0], np.int32),
      score=np.array([0.75, 0.5, 0.25], np.float32),
      boxes=np.zeros((3, 4), np.int32),
      **pack(masks),
    ),
    best=None,
    scores=np.zeros((5, 3), np.float32),
    image_scores=np.array([0.25, 0.5, 0.125], np.float32),
  )


def write(folder, name="a", source_id=None, **options):
  prediction = make_prediction(**options)
  image = np.full((*prediction.panoptic.ids.shape, 3), 128, np.uint8)
  predictions.write_prediction(
    folder,
    name,
    prediction,
    CATEGORIES,
    image=image,
    file_name=f"{name}.jpeg",
    source_id=source_id,
    made_with=MADE_WITH,
  )
  return prediction


def test_panoptic_files_are_read_back(tmp_path):
  wanted = {name: write(tmp_path, name, seed=n) for n, name in enumerate("ab")}
  predictions.collect(tmp_path, "ab", CATEGORIES)
  found = panoptic_files.read_panoptic(
    tmp_path / "panoptic.json", tmp_path / "panoptic", CATEGORIES
  )
  assert set(found) == {"a.jpeg", "b.jpeg"}
  for name, prediction in wanted.items():
    panoptic = found[f"{name}.jpeg"]
    np.testing.assert_array_equal(panoptic.ids, prediction.panoptic.ids)
    assert [(s.id, s.category, s.is_thing) for s in panoptic.segments] == [
      (1, 1, True),
      (300, 2, False),
    ]


def test_instances_are_coco_results(tmp_path):
  prediction = write(tmp_path)
  predictions.collect(tmp_path, "a", CATEGORIES)
  instances = json.loads((tmp_path / "instances.json").read_text())
  boxes = json.loads((tmp_path / "detections.json").read_text())
  assert [x["category_id"] for x in instances] == [3, 7]
  assert [x["score"] for x in instances] == [0.75, 0.25]
  for entry, n in zip(instances, (0, 2), strict=True):
    mask = unpack(prediction.detections)[n]
    np.testing.assert_array_equal(decode(entry["segmentation"]), mask)
    y, x = np.nonzero(mask)
    wanted = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
    assert entry["bbox"] == wanted
    assert entry["image_id"] == "a"
  keys = {"image_id", "category_id", "bbox", "score"}
  assert boxes == [{k: entry[k] for k in keys} for entry in instances]


def test_pixels_of_the_class_map_are_indices_and_colours(tmp_path):
  prediction = write(tmp_path)
  with Image.open(tmp_path / "classes" / "a.png") as image:
    assert image.mode == "P"
    index = np.asarray(image)
    rgb = np.asarray(image.convert("RGB"))
  ids = prediction.panoptic.ids
  np.testing.assert_array_equal(
    index, np.select([ids == 1, ids == 300], [1, 2], 255)
  )
  np.testing.assert_array_equal(rgb[3, 4], class_colours(CATEGORIES)[1])
  predictions.collect(tmp_path, "a", CATEGORIES)
  listed = json.loads((tmp_path / "classes.json").read_text())
  assert [c["name"] for c in listed] == ["cow", "dog", "sky"]


def test_more_classes_than_a_byte_has(tmp_path):
  categories = Categories(
    tuple(Category(n + 1, f"c{n}", True) for n in range(301))
  )
  ids = np.zeros((4, 6), np.int32)
  ids[0], ids[1] = 1, 2
  panoptic = PanopticMap(
    ids, (Segment(1, 300, True, 1.0, 6), Segment(2, 255, True, 1.0, 6))
  )
  prediction = dataclasses.replace(
    make_prediction(size=(4, 6)),
    panoptic=panoptic,
    image_scores=np.zeros(301, np.float32),
  )
  predictions.write_prediction(
    tmp_path,
    "a",
    prediction,
    categories,
    image=np.zeros((4, 6, 3), np.uint8),
    file_name="a.png",
    made_with=MADE_WITH,
  )
  with Image.open(tmp_path / "classes" / "a.png") as image:
    index = np.asarray(image)
  assert index.dtype == np.uint16
  wanted = np.select([ids == 1, ids == 2], [300, 255], 65535)
  np.testing.assert_array_equal(index, wanted)
  empty = PanopticMap(np.zeros((2, 2), np.int32), ())
  assert predictions.class_map(empty, 255).dtype == np.uint8
  assert (predictions.class_map(empty, 255) == 255).all()


@pytest.mark.parametrize(
  ("name", "source_id", "image_id"),
  [
    ("a_b", 17, 17),
    ("a_b", "a b", "a b"),
    ("000000000139", None, 139),  # as on COCO's server
    ("000139", None, "000139"),
    ("٠٠٠٠٠٠٠٠٠١٣٩", None, "٠٠٠٠٠٠٠٠٠١٣٩"),
  ],
)
def test_ids_are_those_of_the_ground_truth(tmp_path, name, source_id, image_id):
  prediction = write(tmp_path, name, source_id=source_id)
  predictions.collect(tmp_path, [name], CATEGORIES)
  height, width = prediction.panoptic.ids.shape
  truth = {
    "images": [
      {"id": image_id, "file_name": "a.jpg", "height": height, "width": width}
    ],
    "annotations": [],
    "categories": CATEGORIES.to_list(),
  }
  (tmp_path / "truth.json").write_text(json.dumps(truth))
  with contextlib.redirect_stdout(io.StringIO()):
    results = coco.COCO(tmp_path / "truth.json").loadRes(
      str(tmp_path / "instances.json")
    )
  assert results.getImgIds() == [image_id]
  assert len(results.getAnnIds()) == 2
  (found,) = panoptic_files.read_panoptic_results(
    tmp_path / "panoptic.json", tmp_path / "panoptic", CATEGORIES
  )
  assert found == image_id


def test_done_only_with_the_same_makings(tmp_path):
  assert not predictions.is_done(tmp_path, "a", made_with=MADE_WITH)
  write(tmp_path)
  assert predictions.is_done(tmp_path, "a", made_with=MADE_WITH)
  other = MADE_WITH | {"step": 4}
  assert not predictions.is_done(tmp_path, "a", made_with=other)
  (tmp_path / "records" / "a.json").write_text("{")
  assert not predictions.is_done(tmp_path, "a", made_with=MADE_WITH)


def test_the_record_comes_last_and_vouches_for_the_others(
  tmp_path, monkeypatch
):
  """Killed after any file, an image is done again."""
  for allowed in range(4):
    left = [allowed]

    def stop(write, left=left):
      def limited(*args):
        if not left[0]:
          raise KeyboardInterrupt
        left[0] -= 1
        return write(*args)

      return limited

    with monkeypatch.context() as patch:
      for name in ("write_file", "write_image"):
        patch.setattr(predictions, name, stop(getattr(predictions, name)))
      with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == allowed
    assert not predictions.is_done(tmp_path, "a", made_with=MADE_WITH)
  write(tmp_path)
  assert predictions.is_done(tmp_path, "a", made_with=MADE_WITH)
