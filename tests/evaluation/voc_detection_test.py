"""mAP and CorLoc against hand-worked cases and loops after the devkit's text.

The loops keep VOC's own boxes (xmin, ymin, xmax, ymax), which count from 1 and
hold their last pixel.
"""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

from jtsm_jax.evaluation.voc_detection import (
  CorLoc,
  VocDetection,
  box_iou,
  write_server_files,
)
from jtsm_jax.types import Categories, Category, Detections, Instances

CATEGORIES = Categories(
  (
    Category(1, "cat", True),
    Category(2, "dog", True),
    Category(5, "owl", True),
    Category(9, "sky", False),
  )
)
CAT, DOG, OWL, SKY = range(4)


def test_files_for_the_server(tmp_path):
  images = {
    "2008_000001": detected(
      (DOG, 0.5, (1, 1, 500, 500)), (CAT, 1e-7, (3, 4, 3, 9))
    ),
    "2008_000002": detected(),
    "2008_000003": detected((DOG, 0.25, (2, 3, 40, 50))),
  }
  write_server_files(tmp_path / "Main", images.items(), CATEGORIES)
  found = {
    p.name: [line.split(" ") for line in p.read_text().splitlines()]
    for p in (tmp_path / "Main").iterdir()
  }
  assert sorted(found) == [
    f"comp4_det_test_{name}.txt" for name in ("cat", "dog", "owl")
  ]
  dog = found["comp4_det_test_dog.txt"]
  assert [row[0] for row in dog] == ["2008_000001", "2008_000003"]
  numbers = [[float(x) for x in row[1:]] for row in dog]
  assert numbers == [[0.5, 1, 1, 500, 500], [0.25, 2, 3, 40, 50]]
  ((_, score, *box),) = found["comp4_det_test_cat.txt"]
  assert float(score) == pytest.approx(1e-7)
  assert [float(x) for x in box] == [3, 4, 3, 9]
  assert found["comp4_det_test_owl.txt"] == []


def half_open(boxes):
  """As the reader of VOC's XML files makes them."""
  x0, y0, x1, y1 = np.array(boxes, float).reshape(-1, 4).T
  return np.stack([y0 - 1, x0 - 1, y1, x1], 1)


def detected(*rows):
  """Rows (class, score, VOC box)."""
  return Detections(
    proposal=np.arange(len(rows), dtype=np.int32),
    category=np.array([r[0] for r in rows], np.int32),
    score=np.array([r[1] for r in rows], np.float32),
    boxes=half_open([r[2] for r in rows]).astype(np.int32),
    size=(500, 500),
  )


def annotated(*rows):
  """Rows (class, VOC box, difficult)."""
  boxes = half_open([r[1] for r in rows])
  return Instances(
    category=np.array([r[0] for r in rows], np.int32),
    boxes=boxes,
    area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
    is_crowd=np.zeros(len(rows), bool),
    is_difficult=np.array([r[2] for r in rows], bool),
  )


def score(state, *images):
  for i, (detections, instances) in enumerate(images):
    state.add(f"{i:04}", detections, instances)
  return state.result()


BOX = (11, 21, 20, 30)  # 10 x 10 pixels


@pytest.mark.parametrize(
  ("box", "iou"),
  [
    (BOX, 1),
    ((11, 21, 15, 30), 0.5),  # without the + 1: 4 / 9
    ((11, 21, 20, 24), 0.4),
    ((20, 30, 29, 39), 1 / 199),  # shares one pixel
    ((21, 21, 30, 30), 0),  # touches
    ((1, 1, 5, 5), 0),
  ],
)
def test_boxes_hold_their_last_pixel(box, iou):
  assert box_iou(half_open(BOX), half_open(box))[0, 0] == iou


def test_an_empty_box_overlaps_with_nothing():
  empty = np.array([[5, 5, 5, 9], [9, 5, 5, 9]])
  np.testing.assert_array_equal(box_iou(empty, empty), np.zeros((2, 2)))


def test_map_by_hand():
  far = (100, 100, 120, 120)
  images = [
    (
      detected((CAT, 0.9, BOX), (CAT, 0.8, BOX), (DOG, 0.7, far)),
      annotated((CAT, BOX, False), (DOG, BOX, True), (DOG, far, False)),
    ),
    # Half the box is enough; the dog is found but difficult.
    (
      detected((CAT, 0.3, (11, 21, 15, 30)), (DOG, 0.9, BOX)),
      annotated((CAT, BOX, False), (DOG, BOX, True)),
    ),
    (detected((OWL, 0.5, BOX)), annotated()),
    (detected(), annotated((CAT, BOX, False), (CAT, far, False))),
  ]
  # Cats: T F T of 4 objects, precision 1, 1/2, 2/3. Dogs: ignored, T of 1.
  result = score(VocDetection(CATEGORIES), *images)
  cat = 100 * (1 / 4 + 2 / 3 / 4)
  assert result["per_class"]["cat"] == {
    "ap": pytest.approx(cat),
    "objects": 4,
    "ignored": 0,
    "detections": 3,
  }
  assert result["per_class"]["dog"] == {
    "ap": pytest.approx(100),
    "objects": 1,
    "ignored": 2,
    "detections": 2,
  }
  # No owl is there to be found: it is not averaged in.
  assert result["per_class"]["owl"]["objects"] == 0
  assert list(result["per_class"]) == ["cat", "dog", "owl"]
  assert (result["n"], result["map"]) == (2, pytest.approx((cat + 100) / 2))
  json.dumps(result)
  result = score(VocDetection(CATEGORIES, metric="11point"), *images)
  # Recall 0, .1, .2 at precision 1; .3, .4, .5 at 2/3.
  cat = 100 * (3 + 3 * 2 / 3) / 11
  assert result["map"] == pytest.approx((cat + 100) / 2)


def test_corloc_by_hand():
  far = (100, 100, 120, 120)
  images = [
    # Only the best box counts.
    (
      detected((CAT, 0.5, BOX), (CAT, 0.6, far)),
      annotated((CAT, BOX, False)),
    ),
    # One of several instances is enough, and so is half of it.
    (
      detected((CAT, 0.1, (11, 21, 15, 30))),
      annotated((CAT, far, False), (CAT, BOX, False)),
    ),
    # A difficult one is one.
    (detected((DOG, 0.1, BOX)), annotated((DOG, BOX, True))),
    # No box at all: missed. A box of an absent class does not matter.
    (detected((OWL, 0.9, BOX)), annotated((DOG, BOX, False))),
    (detected((CAT, 0.9, BOX)), annotated((CAT, BOX, False))),
  ]
  assert score(CorLoc(CATEGORIES), *images) == {
    "corloc": pytest.approx(100 * (2 / 3 + 1 / 2) / 2),
    "n": 2,
    "per_class": {
      "cat": {"corloc": pytest.approx(200 / 3), "images": 3},
      "dog": {"corloc": pytest.approx(50), "images": 2},
      "owl": {"corloc": 0, "images": 0},
    },
  }


# --- a second implementation, written from the text of the devkit


def random_rows(rng, number_of_images=40):
  """For each image: detections (class, score, box), objects (class, box, d)."""

  def box():
    x, y = (int(v) for v in rng.integers(1, 20, 2))
    return (x, y, x + int(rng.integers(0, 12)), y + int(rng.integers(0, 12)))

  def near(old):
    x0, y0, x1, y1 = (int(v) + int(rng.integers(-2, 3)) for v in old)
    return (x0, y0, max(x0, x1), max(y0, y1))

  images = []
  for _ in range(number_of_images):
    objects = [
      (int(rng.integers(3)), box(), bool(rng.random() < 0.3))
      for _ in range(rng.integers(0, 5))
    ]
    found = [
      (
        c if rng.random() < 0.8 else int(rng.integers(3)),
        float(np.float32(rng.integers(50)) / 50),  # with equal scores
        near(old),
      )
      for c, old, _ in objects
      for _ in range(rng.integers(0, 4))
    ]
    found += [
      (int(rng.integers(3)), float(np.float32(rng.random())), box())
      for _ in range(rng.integers(0, 3))
    ]
    images.append((found, objects))
  return images


def devkit_overlap(a, b):
  width = min(a[2], b[2]) - max(a[0], b[0]) + 1
  height = min(a[3], b[3]) - max(a[1], b[1]) + 1
  if width <= 0 or height <= 0:
    return -math.inf
  areas = sum((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
  return width * height / (areas - width * height)


def devkit_curve(images, wanted):
  """Recall and precision after each detection; None while undefined."""
  detections = [
    (score, number, box)
    for number, (found, _) in enumerate(images)
    for c, score, box in found
    if c == wanted
  ]
  # Stable, as sort() of the negated confidence.
  detections.sort(key=lambda d: -d[0])
  positives = sum(
    not d for _, objects in images for c, _, d in objects if c == wanted
  )
  detected_objects = set()
  true = false = 0
  curve = []
  for _, number, box in detections:
    best, which = -math.inf, None
    for j, (c, other, _) in enumerate(images[number][1]):
      if c == wanted and devkit_overlap(box, other) > best:
        best, which = devkit_overlap(box, other), j
    if best >= 0.5:
      if not images[number][1][which][2]:
        if (number, which) in detected_objects:
          false += 1
        else:
          true += 1
          detected_objects.add((number, which))
    else:
      false += 1
    curve.append((true, true / (true + false) if true + false else None))
  return positives, curve


def devkit_11point(positives, curve):
  total = 0
  for tenth in range(11):
    candidates = [
      p for true, p in curve if p is not None and 10 * true >= tenth * positives
    ]
    total += max(candidates, default=0) / 11
  return total


def devkit_area(positives, curve):
  """VOCap: the envelope from the right, rectangles where recall changes."""
  recall = [0, *(true / positives for true, _ in curve), 1]
  precision = [0, *(p or 0 for _, p in curve), 0]
  for i in range(len(precision) - 2, -1, -1):
    precision[i] = max(precision[i], precision[i + 1])
  return sum(
    (recall[i] - recall[i - 1]) * precision[i]
    for i in range(1, len(recall))
    if recall[i] != recall[i - 1]
  )


def discovery(images, wanted):
  """OICR's evaluation of discovery: the best box of each image."""
  right = total = 0
  for found, objects in images:
    truth = [box for c, box, _ in objects if c == wanted]
    mine = [(s, -i, box) for i, (c, s, box) in enumerate(found) if c == wanted]
    if truth:
      total += 1
      if mine:
        box = max(mine)[2]
        right += any(devkit_overlap(box, other) >= 0.5 for other in truth)
  return right / total


def both(rows):
  found, objects = rows
  return detected(*found), annotated(*objects)


@pytest.mark.parametrize("seed", range(5))
def test_against_loops_after_the_devkit(seed):
  images = random_rows(np.random.default_rng(seed))
  for metric, ap in (("11point", devkit_11point), ("area", devkit_area)):
    result = score(
      VocDetection(CATEGORIES, metric=metric), *(both(i) for i in images)
    )
    expected = [100 * ap(*devkit_curve(images, c)) for c in range(3)]
    assert 0 < min(expected) < max(expected) < 100
    found = [v["ap"] for v in result["per_class"].values()]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert result["map"] == pytest.approx(np.mean(expected), abs=1e-10)
  result = score(CorLoc(CATEGORIES), *(both(i) for i in images))
  expected = [100 * discovery(images, c) for c in range(3)]
  found = [v["corloc"] for v in result["per_class"].values()]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [VocDetection, CorLoc])
def test_hosts_that_share_the_images_get_what_one_gets(kind):
  images = [both(i) for i in random_rows(np.random.default_rng(9))]
  whole = kind(CATEGORIES)
  parts = [kind(CATEGORIES) for _ in range(3)]
  for i, image in enumerate(images):
    whole.add(f"{i:04}", *image)
    parts[i % 3].add(f"{i:04}", *image)
  backwards = copy.deepcopy(parts)
  merged = parts[0].merge(parts[1]).merge(parts[2])
  assert merged.result() == whole.result()
  merged = backwards[2].merge(backwards[1]).merge(backwards[0])
  assert merged.result() == whole.result()
  with pytest.raises(ValueError, match="images are in both"):
    merged.merge(parts[1])
  with pytest.raises(ValueError, match="same categories"):
    merged.merge(kind(Categories(CATEGORIES.items[:2])))


@pytest.mark.parametrize("kind", [VocDetection, CorLoc])
def test_nothing_counted(kind):
  result = kind(CATEGORIES).result()
  assert result["n"] == 0
  assert result["map" if kind is VocDetection else "corloc"] == 0
  result = score(kind(CATEGORIES), (detected(), annotated()))
  assert result["n"] == 0


GOOD = detected((CAT, 0.5, BOX)), annotated((CAT, BOX, False))


@pytest.mark.parametrize("kind", [VocDetection, CorLoc])
@pytest.mark.parametrize(
  ("detections", "instances", "message"),
  [
    (detected((SKY, 0.5, BOX)), GOOD[1], "detections.*category 3.* 0 .. 2"),
    (GOOD[0], annotated((7, BOX, False)), "instances.*'new'.*category 7"),
    (detected((-1, 0.5, BOX)), GOOD[1], "category -1"),
    (detected((CAT, math.nan, BOX)), GOOD[1], "no number"),
    (
      dataclasses.replace(GOOD[0], score=np.zeros(2, np.float32)),
      GOOD[1],
      r"fields of \[1, 2, 1\]",
    ),
  ],
)
def test_faults_are_errors(kind, detections, instances, message):
  state = kind(CATEGORIES)
  with pytest.raises(ValueError, match=message):
    state.add("new", detections, instances)
  assert not state.images


def test_an_image_counts_once():
  state = VocDetection(CATEGORIES)
  state.add("a", *GOOD)
  with pytest.raises(ValueError, match="'a' is counted already"):
    state.add("a", *GOOD)


def test_unknown_or_unlike_metrics():
  with pytest.raises(ValueError, match="'2012', wanted one of"):
    VocDetection(CATEGORIES, metric="2012")
  with pytest.raises(ValueError, match="cannot merge 'area' into '11point'"):
    VocDetection(CATEGORIES, metric="11point").merge(VocDetection(CATEGORIES))
