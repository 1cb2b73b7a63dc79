"""What the report gathers, with predictions and mining made up by hand."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import PreparedData, open_prepared
from jtsm_jax.data.shapes import shapes_source
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.reporting import report
from jtsm_jax.reporting.mined_images import MinedImage
from jtsm_jax.reporting.predictions import collect, write_prediction
from jtsm_jax.types import (
  Categories,
  Category,
  Detections,
  InputError,
  PanopticMap,
  Proposals,
  Segment,
  pack_members,
)
from tests.reporting.gallery_test import Page

WEIGHTS = {"step": 7, "weights": "ab"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  prepare(shapes_source(num_train=3, num_val=4, side=64), folder)
  return open_prepared(folder)


class Quarters:
  """A store that proposes the quarters of every image."""

  def __contains__(self, image_id):
    return True

  def get(self, image_id):
    y, x = np.mgrid[:64, :64] // 32
    boxes = [
      [32 * a, 32 * b, 32 * a + 32, 32 * b + 32] for a, b in np.ndindex(2, 2)
    ]
    return Proposals(
      superpixels=(2 * y + x).astype(np.int32),
      member_bits=pack_members(np.eye(4, dtype=bool)),
      boxes=np.array(boxes, np.int32),
      scores=np.linspace(1, 0, 4, dtype=np.float32),
    )


def predicted(target, n):
  """The ground truth, without its largest segment in image 1."""
  ids, segments = target.ids.copy(), list(target.segments)
  if n == 1:
    largest = max(segments, key=lambda s: s.area)
    ids[ids == largest.id] = 0
    segments.remove(largest)
  return PanopticMap(
    ids, tuple(dataclasses.replace(s, score=0.5) for s in segments)
  )


def make_prediction(data, n, *, index):
  scores = np.zeros((4, len(data.categories)), np.float32)
  scores[:, 0], scores[2, 3] = [0.1, 0.9, 0, 0.4], 1.0
  return Prediction(
    index=index,
    panoptic=predicted(data.splits["val"].target(n), n),
    detections=Detections(
      *(np.zeros((0, *s)) for s in ((), (), (), (4,))), size=(64, 64)
    ),
    best=None,
    scores=scores,
    image_scores=np.zeros(len(data.categories), np.float32),
  )


def evaluated(workdir, data):
  """What `--mode=evaluate` leaves, by the functions that it uses."""
  source = data.splits["val"]
  folder = workdir / "evaluation" / "predictions"
  for n, name in enumerate(source.image_ids):
    write_prediction(
      folder,
      name,
      make_prediction(data, n, index=n),
      data.categories,
      image=np.zeros((64, 64, 3), np.uint8),
      file_name=f"{name}.jpg",
      made_with={},
    )
  collect(folder, source.image_ids, data.categories)
  metrics = WEIGHTS | {
    "split": "val",
    "settings": {"nms_iou": 0.5},
    "all": {"pq": 61.5, "n": 2},
  }
  (workdir / "evaluation" / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def workdir(tmp_path):
  backbone = {"name": "resnet_ws", "pretrained": "~/models/r18.pkl"}
  evaluation = {"nms_iou": 0.3}
  settings = {"seed": 3, "backbone": backbone, "evaluation": evaluation}
  (tmp_path / "config.json").write_text(json.dumps(settings))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n')
  return tmp_path


def run(
  workdir, data, *, truth=None, weights=None, num_images=9, reestimator=None
):
  """The page, its data, its sections by key; `truth` is what is predicted."""

  def predict(subset):
    order = range(len(subset))
    for index in reversed(order):  # as portrait images come after the others
      yield make_prediction(truth or data, subset.indices[index], index=index)

  def mine(subset):
    for index in reversed(range(len(subset))):
      scores = np.full((4, len(data.categories)), 0.25, np.float32)
      tag = int(np.flatnonzero(subset.tags[index])[0])
      yield MinedImage(index, scores, [(tag, 2, 0.75), (tag, 1, 0.5)])

  page = report.write_report(
    workdir,
    data,
    Quarters(),
    weights=weights or WEIGHTS,
    evaluation={"nms_iou": 0.7},
    predict=predict,
    mine=mine,
    reestimator=reestimator,
    num_images=num_images,
    num_train_images=2,
  )
  found = Page(page.read_text("utf-8")).data
  return page, found, {s["key"]: s for s in found["sections"]}


def check_pictures(page, sections):
  """All that the page names is there, and nothing else."""
  named = set()
  for section in sections.values():
    for image in section["images"]:
      named |= set(image["cover"])
      named |= {p["file"] for g in image["groups"] for p in g["pictures"]}
  folder = page.parent
  found = {p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg")}
  assert named == found
  for name in named:
    with Image.open(folder / name) as picture:
      assert max(picture.size) <= 640


def names(data, pairs):
  return {data.categories.names[k]: count for k, count in pairs}


def test_validation_images(workdir, data):
  evaluated(workdir, data)
  page, content, sections = run(workdir, data)
  assert page == workdir / "report" / "index.html"
  check_pictures(page, sections)
  assert content["metrics"]["all"]["pq"] == 61.5
  assert content["curves"][0]["points"] == [[1, 2.0]]
  summary = dict(map(tuple, content["summary"]))
  assert summary["Validation images"] == "4"
  assert summary["Backbone"] == "resnet_ws, r18.pkl weights"
  images = sections["val"]["images"]
  source = data.splits["val"]
  assert [x["id"] for x in images] == list(source.image_ids)
  assert "All 4 images" in sections["val"]["note"]
  for n, image in enumerate(images):
    target = source.target(n)
    facts = {name: names(data, pairs) for name, pairs in image["facts"]}
    counts = {}
    for segment in target.segments:
      name = data.categories.names[segment.category]
      counts[name] = counts.get(name, 0) + 1
    assert facts["Ground truth"] == counts
    assert list(facts["Tags"]) == [
      data.categories.names[k] for k in np.flatnonzero(source.tags[n])
    ]
    if n != 1:  # the prediction is the truth
      assert image["pq"] == pytest.approx(100)
      assert facts["Predicted"] == counts
      assert facts["Missed"] == facts["False"] == {}
      continue
    # One segment is missed: its class has iou / (tp + 1 / 2) in its stead.
    missed = max(target.segments, key=lambda s: s.area)
    name = data.categories.names[missed.category]
    rest = counts[name] - 1
    assert facts["Missed"] == {name: 1}
    others = 100 * (len(counts) - 1)
    assert image["pq"] == pytest.approx(
      (others + 100 * rest / (rest + 0.5)) / len(counts)
    )


def test_scored_proposals_are_those_of_the_model(workdir, data):
  evaluated(workdir, data)
  _, _, sections = run(workdir, data)
  result, proposals = sections["val"]["images"][0]["groups"]
  assert [p["caption"] for p in result["pictures"]] == [
    "Photograph",
    "Prediction",
    "Ground truth",
  ]
  first, second = data.categories.names[3], data.categories.names[0]
  assert [p["caption"] for p in proposals["pictures"]] == [
    f"{first}: Best 1 of 4 proposals, scores 1.00 to 1.00",
    f"{second}: Best 3 of 4 proposals, scores 0.90 to 0.10",
  ]


def test_few_images_are_the_worst_and_others(workdir, data):
  evaluated(workdir, data)
  page, _, sections = run(workdir, data, num_images=2)
  check_pictures(page, sections)
  ids = [x["id"] for x in sections["val"]["images"]]
  assert ids == ["val_00000", "val_00001"]  # 1 is the worst
  assert "2 of 4 images" in sections["val"]["note"]
  assert "2 of 3 images" in sections["train"]["note"]


@pytest.mark.parametrize("with_masks", [False, True])
def test_training_images(with_masks, workdir, data):
  evaluated(workdir, data)
  source = data.splits["train"]
  with MaskReestimator(init="none") as reestimator:
    page, _, sections = run(
      workdir, data, reestimator=reestimator if with_masks else None
    )
  check_pictures(page, sections)
  first, last = sections["train"]["images"]
  assert (first["id"], last["id"]) == (source.image_ids[0], source.image_ids[2])
  tags = np.flatnonzero(source.tags[0]).tolist()
  assert first["tags"] == first["classes"] == tags
  assert [g["category"] for g in first["groups"]] == [None, *tags]
  captions = [p["caption"] for p in first["groups"][1]["pictures"]]
  assert (
    captions
    == [
      "Best 4 of 4 proposals, scores 0.25 to 0.25",
      "2 mined segments: 50 % of the image, score 0.75, 0.50",
      "2 pseudo masks: 50 % of the image",
    ][: 2 + with_masks]
  )
  if len(tags) > 1:
    captions = [p["caption"] for p in first["groups"][2]["pictures"]]
    assert captions[1] == "0 mined segments: 0 % of the image"


class WithoutTargets:
  """A split whose images have no ground truth."""

  has_targets = False

  def __init__(self, source):
    self._source = source

  def __getattr__(self, name):
    return getattr(self._source, name)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    return self._source[i]

  def target(self, i):
    return None


def test_without_ground_truth(workdir, data):
  splits = data.splits | {"val": WithoutTargets(data.splits["val"])}
  blind = dataclasses.replace(data, splits=splits)
  page, content, sections = run(workdir, blind, truth=data, num_images=3)
  check_pictures(page, sections)
  assert content["metrics"] is None
  assert content["settings"]["evaluation"] == {"nms_iou": 0.7}
  images = sections["val"]["images"]
  assert [x["id"] for x in images] == ["val_00000", "val_00002", "val_00003"]
  assert all(x["pq"] is None for x in images)
  captions = [p["caption"] for p in images[0]["groups"][0]["pictures"]]
  assert captions == ["Photograph", "Prediction"]
  assert [name for name, _ in images[0]["facts"]] == ["Tags", "Predicted"]


def test_without_validation_images(workdir, data):
  blind = PreparedData(
    data.name, data.categories, {"train": data.splits["train"]}
  )
  _, _, sections = run(workdir, blind)
  assert sections.keys() == {"train"}


def test_figures_of_training_images_alone(workdir, data):
  train = data.splits["train"]
  splits = {"train": train, "corloc": train}
  blind = PreparedData(data.name, data.categories, splits)
  with pytest.raises(InputError, match=r"metrics\.json.*run --mode=evaluate"):
    run(workdir, blind)
  metrics = WEIGHTS | {"split": "corloc", "corloc": {"corloc": 40.0}}
  (workdir / "evaluation").mkdir()
  (workdir / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
  _, content, sections = run(workdir, blind)
  assert content["metrics"] == metrics
  assert sections.keys() == {"train"}


def test_settings_are_those_of_the_evaluation(workdir, data):
  evaluated(workdir, data)
  _, content, _ = run(workdir, data)
  assert content["settings"]["evaluation"] == {"nms_iou": 0.5}
  assert content["settings"]["seed"] == 3
  # Metrics of older versions tell neither them nor the weights' hash.
  path = workdir / "evaluation" / "metrics.json"
  metrics = json.loads(path.read_text())
  del metrics["settings"], metrics["weights"]
  path.write_text(json.dumps(metrics))
  _, content, _ = run(workdir, data)
  assert content["settings"]["evaluation"] == {"nms_iou": 0.3}


def test_faults_name_the_remedy_and_keep_the_older_report(workdir, data):
  with pytest.raises(InputError, match=r"metrics\.json.*run --mode=evaluate"):
    run(workdir, data)
  evaluated(workdir, data)
  page, _, _ = run(workdir, data)
  before = page.read_bytes()
  with pytest.raises(InputError, match=r"step 7, .* step 8; run --mode=eval"):
    run(workdir, data, weights={"step": 8, "weights": "ab"})
  with pytest.raises(InputError, match=r"other weights of step 7.*--mode=eval"):
    run(workdir, data, weights=WEIGHTS | {"weights": "cd"})
  (workdir / "metrics.jsonl").write_text("no JSON\n")
  with pytest.raises(InputError, match="line 1 is no metrics line"):
    run(workdir, data)
  assert page.read_bytes() == before
  (workdir / "metrics.jsonl").unlink()
  _, content, _ = run(workdir, data)  # over the older one, and the torn draft
  assert content["curves"] == []
  assert {p.name for p in workdir.glob("report*")} == {"report"}
  (workdir / "evaluation" / "predictions" / "panoptic.json").unlink()
  with pytest.raises(InputError, match=r"missing; run --mode=evaluate again"):
    run(workdir, data)
  (workdir / "evaluation" / "metrics.json").write_text("{")
  with pytest.raises(InputError, match=r"metrics\.json is damaged"):
    run(workdir, data)


def test_image_quality_of_empty_maps():
  categories = Categories((Category(1, "cow", True), Category(2, "sky", False)))
  empty = PanopticMap(np.zeros((4, 4), np.int32), ())
  assert report.image_quality(empty, empty, categories) == {
    "pq": None,
    "missed": [],
    "false": [],
  }
  # Half of a cow: IoU 1 / 2 is no match; the sky is found whole.
  truth, found = np.full((4, 4), 2, np.int32), np.full((4, 4), 2, np.int32)
  truth[:2], found[:1] = 1, 1
  found[1] = 0
  wanted = report.image_quality(
    PanopticMap(found, (Segment(1, 0, True, 1, 4), Segment(2, 1, False, 1, 8))),
    PanopticMap(truth, (Segment(1, 0, True, 1, 8), Segment(2, 1, False, 1, 8))),
    categories,
  )
  assert wanted == {"pq": 50.0, "missed": [(0, 1)], "false": [(0, 1)]}


def test_pictures_have_names_that_need_no_care(workdir, data):
  evaluated(workdir, data)
  _, _, sections = run(workdir, data, num_images=1)
  (image,) = sections["val"]["images"]
  for group in image["groups"]:
    for picture in group["pictures"]:
      name = pathlib.PurePosixPath(picture["file"])
      assert name.parent.name == "images"
      assert name.stem.replace("-", "").isalnum()
