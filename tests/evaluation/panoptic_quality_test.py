"""PQ against panopticapi, hand-worked cases and a set-based implementation."""

import copy
import dataclasses
import json
import pathlib

import numpy as np
import pytest

from jtsm_jax.evaluation.panoptic_quality import (
  PanopticQuality,
  format_table,
  overlap_counts,
)
from jtsm_jax.types import Categories, Category, PanopticMap, Segment
from tests.evaluation import panopticapi_cases

MINI = pathlib.Path(__file__).parents[2].parent / "shared/data/coco_mini"
needs_mini = pytest.mark.skipif(
  not MINI.is_dir(),
  reason="there is no shared/data/coco_mini beside the repository",
)

CATEGORIES = Categories(
  (
    Category(7, "cow", True),
    Category(3, "dog", True),
    Category(90, "grass", False),
    Category(91, "sky", False),
  )
)
COW, DOG, GRASS, SKY = range(4)


def panoptic(ids, categories, crowds=()):
  """A map from nested lists and {id: category}."""
  ids = np.array(ids, np.int32)
  return PanopticMap(
    ids,
    tuple(
      Segment(i, c, c < 2, 1.0, int((ids == i).sum()), i in crowds)
      for i, c in categories.items()
    ),
  )


def count(prediction, target):
  quality = PanopticQuality(CATEGORIES)
  quality.add(prediction, target)
  return quality


def test_two_matches_by_hand():
  target = panoptic(
    [[1, 1, 2, 2], [1, 1, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]],
    {1: COW, 2: GRASS},
  )
  prediction = panoptic(
    [[5, 5, 5, 9], [5, 5, 9, 9], [9, 9, 9, 9], [9, 9, 9, 9]],
    {5: COW, 9: GRASS},
  )
  result = count(prediction, target).result()
  # Cow: 4 of 5 pixels. Grass: 11 of 12.
  assert result["per_class"]["cow"]["pq"] == pytest.approx(80)
  assert result["per_class"]["grass"]["pq"] == pytest.approx(100 * 11 / 12)
  assert result["all"]["pq"] == pytest.approx((80 + 1100 / 12) / 2)
  assert result["all"]["rq"] == pytest.approx(100)
  assert [result[g]["n"] for g in ("all", "things", "stuff")] == [2, 1, 1]


def test_a_wrong_class_and_a_split():
  target = panoptic(
    [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3], [3, 3, 3, 3]],
    {1: COW, 2: COW, 3: GRASS},
  )
  prediction = panoptic(
    [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]],
    {1: COW, 2: DOG, 3: GRASS, 4: GRASS},
  )
  quality = count(prediction, target)
  # IoU of each half of the grass is exactly 0.5, which is not a match.
  assert quality.tp.tolist() == [1, 0, 0, 0]
  assert quality.fp.tolist() == [0, 1, 2, 0]
  assert quality.fn.tolist() == [1, 0, 1, 0]
  cow = quality.result()["per_class"]["cow"]
  assert cow["sq"] == pytest.approx(100)
  assert cow["rq"] == pytest.approx(100 / 1.5)
  # The dog is averaged in: a false positive is enough. Sky is not.
  assert quality.result()["all"]["n"] == 3
  assert quality.result()["all"]["pq"] == pytest.approx(100 / 1.5 / 3)


def test_void_of_the_target_leaves_the_union():
  target = panoptic([[1, 1, 0, 0]] * 4, {1: COW})
  prediction = panoptic([[1, 1, 1, 1]] * 4, {1: COW})
  assert count(prediction, target).iou[COW] == pytest.approx(1)


def test_void_of_the_prediction_stays_in_the_union():
  target = panoptic([[1, 1, 1, 1]] * 4, {1: COW})
  prediction = panoptic([[1, 1, 1, 0]] * 4, {1: COW})
  assert count(prediction, target).iou[COW] == pytest.approx(0.75)


@pytest.mark.parametrize(("void_rows", "fp"), [(1, 1), (2, 1), (3, 0)])
def test_prediction_in_void_is_ignored_above_half(void_rows, fp):
  """Exactly half in void still counts as false."""
  ids = np.ones((4, 4), np.int32)
  ids[:void_rows] = 0
  target = panoptic(ids, {1: GRASS})
  prediction = panoptic(np.full((4, 4), 6), {6: DOG})
  quality = count(prediction, target)
  assert quality.fp[DOG] == fp
  assert quality.fn[GRASS] == 1


@pytest.mark.parametrize(("category", "fp"), [(COW, 0), (DOG, 1)])
def test_crowd_excuses_its_own_class_and_is_never_missed(category, fp):
  target = panoptic([[1, 1, 1, 2]] * 4, {1: COW, 2: GRASS}, crowds={1})
  prediction = panoptic([[4, 4, 5, 5]] * 4, {4: category, 5: SKY})
  quality = count(prediction, target)
  assert quality.tp.tolist() == [0, 0, 0, 0]
  assert quality.fp[category] == fp
  assert quality.fn.tolist() == [0, 0, 1, 0]
  assert quality.fp[SKY] == 1  # half crowd, but a crowd of cows


def test_crowd_and_void_are_added_up():
  target = panoptic([[1, 1, 0, 2]] * 4, {1: COW, 2: GRASS}, crowds={1})
  # A quarter crowd, half void, a quarter grass.
  prediction = panoptic(
    [[0, 3, 3, 3], [0, 3, 3, 3], [0, 0, 3, 0], [0, 0, 3, 0]], {3: COW}
  )
  quality = count(prediction, target)
  assert quality.fp[COW] == 0


def test_a_crowd_is_never_matched():
  target = panoptic([[1] * 4] * 4, {1: COW}, crowds={1})
  quality = count(panoptic([[1] * 4] * 4, {1: COW}), target)
  assert (quality.tp + quality.fp + quality.fn).sum() == 0
  assert quality.result()["all"] == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


def random_map(rng, *, crowds):
  """Blocks of random segments, some void; stuff may have several segments."""
  ids = rng.integers(0, 7, (4, 4)).repeat(3, 0).repeat(3, 1)
  ids[rng.random(ids.shape) < 0.1] = 0
  present = [int(i) for i in np.unique(ids) if i]
  categories = {i: int(rng.integers(4)) for i in present}
  chosen = {i for i in present if crowds and rng.random() < 0.3}
  return panoptic(ids, categories, chosen)


def jittered(rng, target):
  """A prediction that overlaps with the target enough to have matches."""
  ids = target.ids.copy()
  ids = np.roll(ids, rng.integers(0, 2, 2), (0, 1))
  ids[rng.random(ids.shape) < 0.15] = rng.integers(0, 7)
  old = {s.id: s.category for s in target.segments}
  categories = {
    int(i): old.get(i, 0) if rng.random() < 0.8 else int(rng.integers(4))
    for i in np.unique(ids)
    if i
  }
  return panoptic(ids, categories)


def slow_counts(pairs):
  """The rules, sentence by sentence, on sets of pixels."""
  iou = dict.fromkeys(range(4), 0.0)
  tp, fp, fn = (dict.fromkeys(range(4), 0) for _ in range(3))
  for prediction, target in pairs:

    def pixels(panoptic_map, wanted):
      return {tuple(p) for p in np.argwhere(panoptic_map.ids == wanted)}

    void = pixels(target, 0)
    mine = {s: pixels(prediction, s.id) for s in prediction.segments}
    truth = {s: pixels(target, s.id) for s in target.segments}
    matches = [
      (p, t)
      for p in mine
      for t in truth
      if p.category == t.category
      and not t.is_crowd
      and len(mine[p] & truth[t]) / len((mine[p] - void) | truth[t]) > 0.5
    ]
    for p, t in matches:
      tp[t.category] += 1
      iou[t.category] += len(mine[p] & truth[t]) / len(
        (mine[p] - void) | truth[t]
      )
    for t in truth:
      if not t.is_crowd and t not in [m[1] for m in matches]:
        fn[t.category] += 1
    for p in mine:
      if p in [m[0] for m in matches]:
        continue
      crowds = [
        truth[t] for t in truth if t.is_crowd and t.category == p.category
      ]
      excused = void.union(*crowds[-1:])
      if 2 * len(mine[p] & excused) <= len(mine[p]):
        fp[p.category] += 1
  return [list(x.values()) for x in (iou, tp, fp, fn)]


def test_against_slow_implementation():
  rng = np.random.default_rng(0)
  pairs = []
  for _ in range(60):
    target = random_map(rng, crowds=True)
    pairs.append((jittered(rng, target), target))
  quality = PanopticQuality(CATEGORIES)
  for prediction, target in pairs:
    quality.add(prediction, target)
  iou, tp, fp, fn = slow_counts(pairs)
  assert min(tp + fp + fn) > 0  # the cases exercise every rule
  np.testing.assert_allclose(quality.iou, iou)
  assert quality.tp.tolist() == tp
  assert quality.fp.tolist() == fp
  assert quality.fn.tolist() == fn
  result = quality.result()
  expected = np.mean(
    [
      i / (a + b / 2 + c / 2)
      for i, a, b, c in zip(iou, tp, fp, fn, strict=True)
    ]
  )
  assert result["all"]["pq"] == pytest.approx(100 * expected)
  for values in result["per_class"].values():
    assert values["pq"] == pytest.approx(values["sq"] * values["rq"] / 100)


def check_against_panopticapi(result, expected, categories):
  """Its result, and ours in percent."""
  for theirs, ours in (
    ("All", "all"),
    ("Things", "things"),
    ("Stuff", "stuff"),
  ):
    assert result[ours]["n"] == expected[theirs]["n"]
    check_measures(result[ours], expected[theirs])
  for category in categories.items:
    check_measures(
      result["per_class"][category.name],
      expected["per_class"][str(category.id)],
    )


def check_measures(ours, theirs):
  names = ("pq", "sq", "rq")
  np.testing.assert_allclose(
    [ours[n] / 100 for n in names],
    [theirs[n] for n in names],
    rtol=0,
    atol=1e-12,
  )


def test_500_random_pairs_against_panopticapi():
  pairs = panopticapi_cases.random_pairs()
  categories = panopticapi_cases.CATEGORIES
  with np.load(panopticapi_cases.RANDOM_PAIRS) as expected:
    # Else the generator is at fault, not PQ.
    assert panopticapi_cases.digest(pairs) == str(expected["digest"])
    total = PanopticQuality(categories)
    for i, (prediction, target) in enumerate(pairs):
      quality = PanopticQuality(categories)
      quality.add(prediction, target)
      for name in ("tp", "fp", "fn"):
        assert getattr(quality, name).tolist() == expected[name][i].tolist()
      np.testing.assert_allclose(
        quality.iou, expected["iou"][i], rtol=0, atol=1e-12
      )
      total.merge(quality)
    check_against_panopticapi(
      total.result(), json.loads(str(expected["result"])), categories
    )
  # What the pairs are there for.
  targets = [target for _, target in pairs]
  crowds = [[s.category for s in t.segments if s.is_crowd] for t in targets]
  assert sum(len(c) > len(set(c)) for c in crowds) > 20
  assert sum((t.ids == 0).any() for t in targets) > 100
  assert sum(any(s.area == 1 for s in t.segments) for t in targets) > 100


@needs_mini
def test_coco_mini_against_panopticapi():
  categories, pairs = panopticapi_cases.mini_pairs(MINI)
  expected = json.loads(panopticapi_cases.COCO_MINI.read_text())
  assert panopticapi_cases.digest(pairs) == expected["digest"]
  same, other = PanopticQuality(categories), PanopticQuality(categories)
  for prediction, target in pairs:
    same.add(target, target)
    other.add(prediction, target)
  for group in ("all", "things", "stuff"):
    assert same.result()[group]["pq"] == 100
  check_against_panopticapi(other.result(), expected["result"], categories)


def test_noise_is_counted_as_any_map():
  """One run for each pixel."""
  rng = np.random.default_rng(3)
  ids = rng.integers(0, 3, (2, 7, 9))
  prediction, target = (panoptic(x, {2: DOG, 1: COW}) for x in ids)
  # Lists may be in any order, and so are rows and columns.
  segments, _, overlap = overlap_counts(prediction, target, 4)
  assert [s.id for s in segments] == [2, 1]
  for i, mine in enumerate((0, 2, 1)):
    for j, truth in enumerate((0, 2, 1)):
      expected = ((ids[0] == mine) & (ids[1] == truth)).sum()
      assert overlap[i, j] == expected


def test_an_image_without_segments_or_pixels():
  for shape in ((3, 4), (0, 4)):
    empty = panoptic(np.zeros(shape), {})
    quality = count(empty, empty)
    assert (quality.tp + quality.fp + quality.fn).sum() == 0


def test_perfect_prediction_is_100():
  rng = np.random.default_rng(1)
  quality = PanopticQuality(CATEGORIES)
  for _ in range(10):
    target = random_map(rng, crowds=False)
    quality.add(target, target)
  for group in ("all", "things", "stuff"):
    result = quality.result()[group]
    assert [result[m] for m in ("pq", "sq", "rq")] == pytest.approx([100] * 3)


def test_merge_is_independent_of_order():
  rng = np.random.default_rng(2)
  parts = []
  for _ in range(6):
    target = random_map(rng, crowds=True)
    parts.append(count(jittered(rng, target), target))
  forth = PanopticQuality(CATEGORIES)
  for part in parts:
    forth.merge(part)
  back = copy.deepcopy(parts[-1])
  for part in parts[-2::-1]:
    back = back.merge(part)
  assert forth.tp.sum() > 0
  np.testing.assert_allclose(forth.iou, back.iou)
  for name in ("tp", "fp", "fn"):
    np.testing.assert_array_equal(getattr(forth, name), getattr(back, name))
  # The parts are not changed by being merged.
  assert sum(part.tp.sum() for part in parts) == forth.tp.sum()


GOOD = panoptic([[1, 1], [0, 2]], {1: COW, 2: GRASS})


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (panoptic([[1, 1, 1]], {1: COW}), r"\(1, 3\).*\(2, 2\)"),
    (panoptic([[1, 1], [0, 2]], {1: COW}), r"ids \[2\] are in the map only"),
    (
      panoptic([[1, 1], [0, 0]], {1: COW, 2: DOG}),
      r"ids \[2\] in the segments only",
    ),
    (panoptic([[1, 1], [0, 2]], {1: COW, 2: 90}), "category 90.*0 .. 3"),
    (panoptic([[1, 1], [0, 2]], {1: COW, 2: -1}), "category -1"),
    (
      dataclasses.replace(GOOD, segments=GOOD.segments + GOOD.segments[:1]),
      "1 ids twice",
    ),
  ],
)
def test_a_faulty_map_is_an_error(bad, message):
  """A silent KeyError substitute once gave published PQ above 100."""
  quality = PanopticQuality(CATEGORIES)
  with pytest.raises(ValueError, match=message):
    quality.add(bad, GOOD)
  assert (quality.tp + quality.fp + quality.fn).sum() == 0


def test_a_faulty_target_is_an_error():
  quality = PanopticQuality(CATEGORIES)
  with pytest.raises(ValueError, match="target"):
    quality.add(GOOD, panoptic([[1, 1], [0, 2]], {1: COW}))


def test_merge_of_other_categories_is_an_error():
  other = Categories(CATEGORIES.items[:2])
  with pytest.raises(ValueError, match="same categories"):
    PanopticQuality(CATEGORIES).merge(PanopticQuality(other))


def test_table_has_fixed_columns():
  target = panoptic([[1, 1], [2, 2]], {1: COW, 2: GRASS})
  table = format_table(count(target, target).result())
  lines = table.splitlines()
  assert len({len(line) for line in lines}) == 1
  assert [line.split()[0] for line in lines if line[0].isalpha()] == [
    "All", "Things", "Stuff", "cow", "dog", "grass", "sky",
  ]  # fmt: skip
  assert next(x for x in lines if x.startswith("cow")).split()[1:] == [
    "100.0", "100.0", "100.0", "1", "0", "0",
  ]  # fmt: skip
  assert next(x for x in lines if x.startswith("dog")).split()[1:4] == ["-"] * 3
