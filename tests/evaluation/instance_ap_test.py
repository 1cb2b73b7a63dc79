"""Instance AP against pycocotools run on files, and mAP^r against loops."""

import contextlib
import copy
import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
from pycocotools import coco, cocoeval
from pycocotools import mask as mask_utils

from jtsm_jax.data.coco import read_instances
from jtsm_jax.data.panoptic_files import json_categories, read_json
from jtsm_jax.evaluation import instance_ap
from jtsm_jax.evaluation.instance_ap import InstanceAP, VocInstanceAP
from jtsm_jax.types import Categories, Category, Detections, Instances
from tests.evaluation.voc_detection_test import devkit_area
from tests.run_lengths import decode, pack, unpack

MINI = pathlib.Path(__file__).parents[2].parent / "shared/data/coco_mini"
needs_mini = pytest.mark.skipif(
  not MINI.is_dir(),
  reason="there is no shared/data/coco_mini beside the repository",
)
CATEGORIES = Categories(
  (
    Category(3, "cat", True),
    Category(8, "dog", True),
    Category(2, "owl", True),
    Category(9, "sky", False),
  )
)
MEASURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def boxes_of(masks):
  boxes = []
  for mask in masks:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    boxes.append([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
  return np.array(boxes, np.int32).reshape(-1, 4)


def detected(category, score, masks):
  return Detections(
    proposal=np.zeros(len(score), np.int32),
    category=np.array(category, np.int32),
    score=np.array(score, np.float32),
    boxes=boxes_of(masks),
    **pack(masks),
  )


def annotated(category, masks, crowd=(), difficult=()):
  n = len(category)
  return Instances(
    category=np.array(category, np.int32),
    boxes=boxes_of(masks).astype(float),
    area=masks.sum((1, 2)).astype(float),
    is_crowd=np.isin(np.arange(n), crowd),
    is_difficult=np.isin(np.arange(n), difficult),
    rles=tuple(
      mask_utils.encode(np.asfortranarray(m.astype(np.uint8)))["counts"]
      for m in masks
    ),
  )


def blobs(rng, count, size):
  """[count, H, W] ellipses of all sizes, none empty."""
  y, x = np.mgrid[: size[0], : size[1]]
  centre = rng.random((count, 2)) * size
  radius = 2 + rng.random((count, 2)) ** 2 * np.array(size) / 2
  masks = [
    ((y - c[0]) / r[0]) ** 2 + ((x - c[1]) / r[1]) ** 2 < 1
    for c, r in zip(centre, radius, strict=True)
  ]
  return np.array(masks, bool).reshape(count, *size)


def random_images(seed, number=30):
  """Images with crowds, equal scores, wrong classes, and empty sides."""
  rng = np.random.default_rng(seed)
  images = {}
  for i in range(number):
    size = tuple(int(n) for n in rng.integers(60, 200, 2))
    truth = blobs(rng, rng.integers(0, 6), size)
    kinds = rng.integers(0, 3, len(truth))
    chosen = rng.integers(0, max(len(truth), 1), 2 * len(truth))
    shift = rng.integers(-4, 5, (len(chosen), 2))
    masks = [
      np.roll(truth[j], s, (0, 1)) for j, s in zip(chosen, shift, strict=True)
    ]
    masks = np.concatenate(
      [np.array(masks, bool).reshape(-1, *size), blobs(rng, 2, size)]
    )
    masks[:, 0, 0] |= ~masks.any((1, 2))
    guess = np.concatenate([kinds[chosen], rng.integers(0, 3, 2)])
    other = rng.random(len(guess)) < 0.2
    guess[other] = rng.integers(0, 3, other.sum())
    score = rng.integers(0, 40, len(guess)) / 40
    order = np.argsort(-score, kind="stable")
    images[f"{7 * i % number:03}"] = (
      detected(guess[order], score[order], masks[order]),
      annotated(kinds, truth, crowd=np.nonzero(rng.random(len(truth)) < 0.1)),
    )
  return images


def official(images, categories, kind, folder):
  """pycocotools on JSON files: its six measures and AP of each class."""
  names = sorted(images)
  truth = {
    "images": [],
    "annotations": [],
    "categories": [{"id": c.id, "name": c.name} for c in categories.items],
  }
  results = []

  def xywh(box):
    y0, x0, y1, x1 = (float(v) for v in box)
    return [x0, y0, x1 - x0, y1 - y0]

  for number, name in enumerate(names):
    detections, instances = images[name]
    height, width = detections.size
    truth["images"].append({"id": number, "height": height, "width": width})
    for i, c in enumerate(instances.category):
      counts = instances.rles[i].decode()
      truth["annotations"].append(
        {
          "id": len(truth["annotations"]) + 1,
          "image_id": number,
          "category_id": categories.items[c].id,
          "bbox": xywh(instances.boxes[i]),
          "area": float(instances.area[i]),
          "iscrowd": int(instances.is_crowd[i]),
          "segmentation": {"size": [height, width], "counts": counts},
        }
      )
    for i, c in enumerate(detections.category):
      entry = {
        "image_id": number,
        "category_id": categories.items[c].id,
        "score": float(detections.score[i]),
      }
      if kind == "bbox":
        entry["bbox"] = xywh(detections.boxes[i])
      else:
        counts = detections.rles[i].decode()
        entry["segmentation"] = {"size": [height, width], "counts": counts}
      results.append(entry)
  (folder / "truth.json").write_text(json.dumps(truth))
  (folder / "results.json").write_text(json.dumps(results))
  with contextlib.redirect_stdout(io.StringIO()):
    data = coco.COCO(folder / "truth.json")
    found = data.loadRes(str(folder / "results.json"))
    evaluator = cocoeval.COCOeval(data, found, kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
  each = {}
  for c in categories.items[: categories.num_things]:
    k = evaluator.params.catIds.index(c.id)
    precision = evaluator.eval["precision"][:, :, k, 0, -1]
    each[c.name] = 100 * precision[precision > -1].mean()
  return [100 * v if v > -1 else 0 for v in evaluator.stats[:6]], each


def score(state, images):
  for name, image in images.items():
    state.add(name, *image)
  return state.result()


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_pycocotools(seed, kind, tmp_path, capsys):
  images = random_images(seed)
  result = score(InstanceAP(CATEGORIES, kind), images)
  assert capsys.readouterr().out == ""
  expected, each = official(images, CATEGORIES, kind, tmp_path)
  assert 0 < min(expected) < max(expected) < 100
  assert [result[m] for m in MEASURES] == pytest.approx(expected, abs=1e-10)
  assert {k: v["ap"] for k, v in result["per_class"].items()} == pytest.approx(
    each, abs=1e-10
  )
  for at in ("ap", "ap50", "ap75"):
    mean = np.mean([v[at] for v in result["per_class"].values()])
    assert result[at] == pytest.approx(mean)
  real = [~i.is_crowd for _, i in images.values()]
  assert result["objects"]["all"] == sum(r.sum() for r in real)
  assert sum(result["objects"].values()) == 2 * result["objects"]["all"]
  json.dumps(result)


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_hotcoco_gives_the_same_values(kind, capfd):
  pytest.importorskip("hotcoco")
  cases = [random_images(seed) for seed in range(3)]
  nothing = detected([], [], np.zeros((0, 9, 9), bool))
  cases.append({k: (nothing, _resized(i)) for k, (_, i) in cases[0].items()})
  for images in cases:
    usual = score(InstanceAP(CATEGORIES, kind), images)
    fast = score(InstanceAP(CATEGORIES, kind, fast=True), images)
    assert fast == usual  # to the last bit
  assert capfd.readouterr().out == ""


def _resized(instances):
  """The first object alone, as a mask of 9 x 9."""
  masks = np.zeros((1, 9, 9), bool)
  masks[0, 2:5, 3:8] = True
  return annotated([int(sum(instances.category)) % 3], masks)


def test_fast_says_what_is_missing(monkeypatch):
  monkeypatch.setattr(instance_ap, "hotcoco", None)
  with pytest.raises(ImportError, match=r"jtsm_jax\[fast\]"):
    InstanceAP(CATEGORIES, fast=True)


@needs_mini
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_coco_mini_equals_pycocotools(kind, tmp_path):
  path = MINI / "instances_train2017.json"
  categories = json_categories(path, read_json(path), "instances")
  rng = np.random.default_rng(0)
  sizes = {
    e["file_name"]: (e["height"], e["width"])
    for e in json.loads(path.read_text())["images"]
  }
  images = {}
  for name, instances in list(read_instances(path, categories).items())[:60]:
    size = sizes[name]
    rles = [{"size": list(size), "counts": counts} for counts in instances.rles]
    masks = [decode(r).astype(bool) for r in rles]
    masks = np.array(masks, bool).reshape(-1, *size)
    masks = np.roll(masks, rng.integers(-6, 7, 2), (1, 2))
    masks[:, 0, 0] |= ~masks.any((1, 2))
    order = rng.permutation(len(masks))
    images[name] = (
      detected(instances.category[order], rng.random(len(masks)), masks[order]),
      instances,
    )
  result = score(InstanceAP(categories, kind), images)
  # Not the classes without objects: pycocotools has -1 for them.
  there = [
    i for i, c in enumerate(result["per_class"].values()) if c["objects"]
  ]
  assert len(there) == result["n"] > 20
  kept = Categories(tuple(categories.items[i] for i in there))
  position = {old: new for new, old in enumerate(there)}

  def renumbered(arrays):
    known = np.isin(arrays.category, there)
    assert known.all()
    new = np.array([position[c] for c in arrays.category], np.int32)
    return dataclasses.replace(arrays, category=new)

  images = {k: tuple(renumbered(a) for a in v) for k, v in images.items()}
  expected, each = official(images, kept, kind, tmp_path)
  assert [result[m] for m in MEASURES] == pytest.approx(expected, abs=1e-10)
  for name, ap in each.items():
    assert result["per_class"][name]["ap"] == pytest.approx(ap, abs=1e-10)


# --- VOC


def loop_map(images, threshold):
  """mAP^r on sets of pixels, after its definition."""
  aps = []
  for wanted in range(3):
    positives, rows = 0, []
    for name in sorted(images):
      detections, instances = images[name]
      size = list(detections.size)
      rles = [{"size": size, "counts": c} for c in instances.rles]
      objects = [
        (set(np.flatnonzero(decode(r))), bool(crowd))
        for r, c, crowd in zip(
          rles, instances.category, instances.is_crowd, strict=True
        )
        if c == wanted
      ]
      positives += sum(not crowd for _, crowd in objects)
      taken = set()
      for c, s, mask in zip(
        detections.category, detections.score, unpack(detections), strict=True
      ):
        if c != wanted:
          continue
        pixels = set(np.flatnonzero(mask))
        ious = [len(pixels & o) / len(pixels | o) for o, _ in objects]
        best = max(range(len(ious)), key=ious.__getitem__, default=None)
        if best is None or ious[best] < threshold:
          outcome = "false"
        elif objects[best][1]:
          outcome = "ignored"
        else:
          outcome = "false" if best in taken else "true"
          taken.add(best)
        rows.append((s, outcome))
    rows.sort(key=lambda row: -row[0])
    true = false = 0
    curve = []
    for _, outcome in rows:
      true += outcome == "true"
      false += outcome == "false"
      curve.append((true, true / (true + false) if true + false else None))
    aps.append(100 * devkit_area(positives, curve))
  return aps


def test_voc_ap_of_masks_against_loops():
  images = random_images(5)
  result = score(VocInstanceAP(CATEGORIES), images)
  for key, threshold in (("25", 0.25), ("50", 0.5), ("70", 0.7), ("75", 0.75)):
    expected = loop_map(images, threshold)
    assert 0 < min(expected) < max(expected) < 100
    found = [v[f"ap{key}"] for v in result["per_class"].values()]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert result[f"map{key}"] == pytest.approx(np.mean(expected))
  assert result["n"] == 3
  json.dumps(result)


def test_voc_ap_of_masks_by_hand():
  masks = np.zeros((3, 4, 4), bool)
  masks[0, :2], masks[1, 2:], masks[2, 0, :2] = True, True, True
  images = {
    # The second cat has a quarter of the first one's pixels.
    "a": (
      detected([0, 0, 1], [0.9, 0.8, 0.7], masks[[0, 2, 1]]),
      annotated([0, 0, 1], masks[[0, 1, 1]], difficult=[2]),
    )
  }
  result = score(VocInstanceAP(CATEGORIES, thresholds=(0.25, 0.5)), images)
  # One of two cats, then a false one; the dog is difficult.
  assert result == {
    "map25": pytest.approx(50),
    "map50": pytest.approx(50),
    "n": 1,
    "per_class": {
      "cat": {"ap25": 50, "ap50": 50, "objects": 2},
      "dog": {"ap25": 0, "ap50": 0, "objects": 0},
      "owl": {"ap25": 0, "ap50": 0, "objects": 0},
    },
  }


# --- both


def kinds():
  return (
    InstanceAP(CATEGORIES),
    InstanceAP(CATEGORIES, "bbox"),
    VocInstanceAP(CATEGORIES),
  )


@pytest.mark.parametrize("empty", kinds(), ids=str)
def test_hosts_that_share_the_images_get_what_one_gets(empty):
  images = random_images(8, number=12)
  whole = score(copy.deepcopy(empty), images)
  parts = [copy.deepcopy(empty) for _ in range(3)]
  for i, (name, image) in enumerate(images.items()):
    parts[i % 3].add(name, *image)
  merged = parts[2].merge(parts[0]).merge(parts[1])
  assert merged.result() == whole
  with pytest.raises(ValueError, match="images are in both"):
    merged.merge(parts[0])
  other = dataclasses.replace(
    empty, categories=Categories(CATEGORIES.items[1:])
  )
  with pytest.raises(ValueError, match="same categories"):
    merged.merge(other)


@pytest.mark.parametrize("empty", kinds(), ids=str)
def test_nothing_to_find_or_nothing_found(empty):
  assert empty.result()["n"] == 0
  size = (8, 9)
  nothing = detected([], [], np.zeros((0, *size), bool))
  mask = np.ones((1, *size), bool)
  no_object = annotated([], np.zeros((0, *size), bool))
  state = copy.deepcopy(empty)
  state.add("a", nothing, no_object)
  state.add("b", detected([0], [0.5], mask), no_object)
  assert state.result()["n"] == 0
  state.add("c", nothing, annotated([0], mask))
  result = state.result()
  assert result["n"] == 1
  assert result["per_class"]["cat"]["objects"] == 1
  measures = [v for k, v in result.items() if k.startswith(("ap", "map"))]
  assert measures == [0] * len(measures)
  # And where nothing at all is detected.
  state = copy.deepcopy(empty)
  state.add("c", nothing, annotated([0], mask))
  assert state.result()["n"] == 1
  assert result["per_class"] == state.result()["per_class"]


@pytest.mark.parametrize("empty", kinds(), ids=str)
def test_faults_are_errors(empty):
  mask = np.ones((1, 4, 5), bool)
  good = detected([0], [0.5], mask), annotated([0], mask)
  state = copy.deepcopy(empty)
  state.add("a", *good)
  with pytest.raises(ValueError, match="'a' is counted already"):
    state.add("a", *good)
  with pytest.raises(ValueError, match=r"detections.*'b'.*category 3"):
    state.add("b", detected([3], [0.5], mask), good[1])
  with pytest.raises(ValueError, match=r"instances.*'b'.*category 5"):
    state.add("b", good[0], annotated([5], mask))
  if getattr(state, "kind", "segm") == "segm":
    with pytest.raises(ValueError, match="0 masks for 1 objects"):
      state.add("b", good[0], dataclasses.replace(good[1], rles=()))
    with pytest.raises(ValueError, match=r"20 pixels.*4 x 4.*own size"):
      state.add("b", detected([0], [0.5], mask[:, :, :4]), good[1])
    with pytest.raises(ValueError, match="0 masks for 1 detections"):
      state.add("b", dataclasses.replace(good[0], rles=()), good[1])
  assert list(state.images) == ["a"]


def test_unlike_kinds_and_thresholds():
  with pytest.raises(ValueError, match="'mask', wanted one of"):
    InstanceAP(CATEGORIES, "mask")
  with pytest.raises(ValueError, match="'bbox' into 'segm'"):
    InstanceAP(CATEGORIES).merge(InstanceAP(CATEGORIES, "bbox"))
  with pytest.raises(ValueError, match="cannot merge"):
    VocInstanceAP(CATEGORIES).merge(VocInstanceAP(CATEGORIES, (0.5,)))
