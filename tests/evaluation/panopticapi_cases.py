"""Maps that panopticapi was run on, and how its values came to be stored.

    python -m tests.evaluation.panopticapi_cases [COCO_MINI]

writes the expected values anew, with an installed panopticapi (the stored ones
are of panopticapi-lite 0.2.0, whose rules are those of commit 7bb4655). The
tests need neither: they make the maps again and compare.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import sys
import tempfile

import numpy as np

from jtsm_jax.data import panoptic_files
from jtsm_jax.types import Categories, Category, PanopticMap, Segment

HERE = pathlib.Path(__file__).parent
RANDOM_PAIRS = HERE / "panopticapi_random_pairs.npz"
COCO_MINI = HERE / "panopticapi_coco_mini.json"
NUM_PAIRS = 500
CATEGORIES = Categories(
  tuple(Category(10 + 7 * i, f"class {i}", i < 3) for i in range(6))
)


def random_pairs():
  """500 pairs (prediction, target) of all sizes from 6 to 40 pixels.

  They have void on both sides, crowds (also several of a category, in any
  order), segments of one pixel, wrong classes, and halves.
  """
  rng = np.random.RandomState(2021)  # its stream is fixed for ever
  return [_random_pair(rng) for _ in range(NUM_PAIRS)]


def _random_pair(rng):
  height, width = rng.randint(6, 41, 2)
  y, x = np.mgrid[:height, :width]
  seeds = rng.randint(0, 40, (rng.randint(1, 10), 2))
  distance = (y[..., None] - seeds[:, 0]) ** 2 + (
    x[..., None] - seeds[:, 1]
  ) ** 2
  names = rng.randint(1, 1 << 24, 40)
  truth = names[distance.argmin(-1)]
  for name in names[10 : 10 + rng.randint(0, 5)]:  # tiny ones
    truth[rng.randint(height), rng.randint(width)] = name
  if rng.rand() < 0.7:
    truth[:, : rng.randint(width)][: rng.randint(height)] = 0
  mine = np.roll(truth, rng.randint(-1, 2, 2), (0, 1))
  for name in np.unique(mine)[1:]:
    chance = rng.rand()
    if chance < 0.1:
      mine[mine == name] = 0
    elif chance < 0.2:  # two segments become one
      mine[mine == name] = np.unique(mine)[-1]
    elif chance < 0.3:  # one becomes two
      mine[(mine == name) & (y % 2 == 0)] = names[20 + rng.randint(10)]
  if rng.rand() < 0.6:
    mine[rng.randint(height) :, rng.randint(width) :] = names[30]
  noise = rng.rand(height, width) < rng.choice([0, 0, 0.02, 0.2])
  mine[noise] = names[rng.randint(31, 40)]
  kinds = {name: rng.randint(6) for name in names.tolist()}
  target = _to_map(rng, truth, kinds, crowd_share=rng.choice([0, 0.4]))
  for name in kinds:
    if rng.rand() < 0.15:
      kinds[name] = rng.randint(6)
  return _to_map(rng, mine, kinds, crowd_share=0), target


def _to_map(rng, ids, kinds, *, crowd_share):
  found = [i for i in np.unique(ids).tolist() if i]
  segments = [
    Segment(
      i,
      int(kinds[i]),
      bool(kinds[i] < 3),
      1.0,
      int((ids == i).sum()),
      bool(rng.rand() < crowd_share),
    )
    for i in rng.permutation(found).astype(int).tolist()
  ]
  return PanopticMap(ids.astype(np.int32), tuple(segments))


def perturbed(target, seed, num_classes):
  """A prediction made of the target: moved, torn, merged and confused."""
  rng = np.random.RandomState(seed)
  ids = np.roll(target.ids, rng.randint(-8, 9, 2), (0, 1))
  kinds = {s.id: s.category for s in target.segments}
  for name in sorted(kinds):
    chance = rng.rand()
    if chance < 0.1:
      ids[ids == name] = 0
    elif chance < 0.2:
      ids[ids == name] = sorted(kinds)[rng.randint(len(kinds))]
    elif chance < 0.35:
      kinds[name] = rng.randint(num_classes)
    elif chance < 0.45:
      upper = np.arange(len(ids))[:, None] < len(ids) // 2
      ids[(ids == name) & upper] = 1 << 23 | name
      kinds[1 << 23 | name] = kinds[name]
  height, width = (n // 4 for n in ids.shape)
  y, x = rng.randint(ids.shape[0] - height), rng.randint(ids.shape[1] - width)
  ids[y : y + height, x : x + width] = 0
  segments = tuple(
    Segment(i, int(kinds[i]), False, 1.0, int((ids == i).sum()))
    for i in np.unique(ids).tolist()
    if i
  )
  return PanopticMap(ids, segments)


def digest(pairs):
  """Of all maps and segments: the values are of exactly these pairs."""
  sha = hashlib.sha256()
  for pair in pairs:
    for panoptic in pair:
      sha.update(np.ascontiguousarray(panoptic.ids, "<i4").tobytes())
      rows = [(s.id, s.category, int(s.is_crowd)) for s in panoptic.segments]
      sha.update(repr((panoptic.ids.shape, rows)).encode())
  return sha.hexdigest()


def write_files(folder, pairs, categories):
  """The pairs as files: gt.json, gt/, pred.json, pred/; images are 1, 2, ..."""
  for name, maps in zip(("pred", "gt"), zip(*pairs, strict=True), strict=True):
    panoptic_files.write_panoptic(
      folder / f"{name}.json",
      folder / name,
      [(i, f"{i}.jpg", m) for i, m in enumerate(maps, 1)],
      categories,
    )


def mini_pairs(root):
  """coco_mini's classes, and its 100 maps with a perturbed copy of each."""
  json_file = root / "panoptic_train2017.json"
  categories = panoptic_files.json_categories(
    json_file, panoptic_files.read_json(json_file), "panoptic"
  )
  targets = panoptic_files.read_panoptic_results(
    json_file, root / "panoptic_train2017", categories
  )
  pairs = [
    (perturbed(targets[image], seed, len(categories)), targets[image])
    for seed, image in enumerate(sorted(targets))
  ]
  return categories, pairs


def _run_panopticapi(pairs, categories):
  """Its counts for each pair, [N, K] each, and its result for all of them."""
  from panopticapi import evaluation

  known = {c["id"]: c for c in categories.to_list()}
  counts = {name: [] for name in ("iou", "tp", "fp", "fn")}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_files(folder, pairs, categories)
    files = [str(folder / f"{n}.json") for n in ("gt", "pred")]
    annotations = [
      json.loads(pathlib.Path(f).read_text())["annotations"] for f in files
    ]
    with contextlib.redirect_stdout(io.StringIO()):
      for pair in zip(*annotations, strict=True):
        state = evaluation.pq_compute_single_core(
          0, [pair], str(folder / "gt"), str(folder / "pred"), known
        )
        for field, rows in counts.items():
          rows.append([getattr(state[i], field) for i in known])
      result = evaluation.pq_compute(*files)
  return counts, result


def main():
  """Runs panopticapi and stores what it says."""
  pairs = random_pairs()
  counts, result = _run_panopticapi(pairs, CATEGORIES)
  small = {k: np.array(counts[k], np.uint8) for k in ("tp", "fp", "fn")}
  np.savez_compressed(
    RANDOM_PAIRS,
    iou=np.array(counts["iou"], np.float64),
    digest=digest(pairs),
    result=json.dumps(result),
    **small,
  )
  if len(sys.argv) > 1:
    categories, pairs = mini_pairs(pathlib.Path(sys.argv[1]))
    _, result = _run_panopticapi(pairs, categories)
    content = {"digest": digest(pairs), "result": result}
    COCO_MINI.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
  main()
