"""Times PQ and instance AP on one core, and other tools beside them.

    pip install -e '.[fast]'        # hotcoco; may be left out
    python benchmarks/evaluation.py --output evaluation.json

PQ is of random pairs of maps with 12 segments each, once from arrays and once
from the PNG and JSON files that the other tools read. panopticapi takes part
where it is installed; its 15 ms per pair of this size, PNG files included, are
from a measurement on another 2-core machine. All tools must agree on the
values. AP is of random masks. Times are of the processor, so that other
programs on the machine matter little.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

# Before anything starts its threads.
os.environ |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import cv2
import numpy as np
from pycocotools import mask as mask_utils

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.data import panoptic_files
from jtsm_jax.evaluation.instance_ap import InstanceAP
from jtsm_jax.evaluation.panoptic_command import compare_files
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality
from jtsm_jax.types import (
  Categories,
  Category,
  Detections,
  Instances,
  PanopticMap,
  Segment,
)

SIZE, SEGMENTS = (480, 640), 12
PUBLISHED = {"panopticapi, published": 15.2}
CATEGORIES = Categories(
  tuple(Category(i + 1, f"class {i}", i < 12) for i in range(20))
)


def main() -> None:
  """Measures, prints and writes the times."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--pairs", type=int, default=1000)
  parser.add_argument("--images", type=int, default=500, help="for AP")
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  report = {
    "machine": platform.machine(),
    "python": platform.python_version(),
    "numpy": np.__version__,
    "size": SIZE,
    "segments": SEGMENTS,
  }
  report |= measure_pq([random_pair(rng) for _ in range(args.pairs)])
  report |= measure_ap(rng, args.images)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(json.dumps(report, indent=1))


def measure_pq(pairs) -> dict:
  """Milliseconds per pair of each tool."""
  print(f"PQ, {len(pairs)} pairs of {SIZE[0]} x {SIZE[1]}, ms per pair")
  times, values = {}, {}

  def measure(name, function):
    start = time.process_time()
    values[name] = function()
    times[name] = (time.process_time() - start) / len(pairs) * 1e3
    print(
      f"  {name:<34}{times[name]:8.2f}   PQ {values[name]:.12f}", flush=True
    )

  def from_arrays():
    quality = PanopticQuality(CATEGORIES)
    for prediction, target in pairs:
      quality.add(prediction, target)
    return quality.result()["all"]["pq"] / 100

  measure("jtsm_jax, from arrays", from_arrays)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for name, maps in zip(
      ("pred", "gt"), zip(*pairs, strict=True), strict=True
    ):
      panoptic_files.write_panoptic(
        folder / f"{name}.json",
        folder / name,
        ((i, f"{i}.jpg", m) for i, m in enumerate(maps)),
        CATEGORIES,
      )
    files = [folder / name for name in ("gt.json", "gt", "pred.json", "pred")]

    def from_files():
      quality = compare_files(*files, num_workers=0)
      return quality.result()["all"]["pq"] / 100

    measure("jtsm_jax, from files", from_files)
    truth, found = str(files[0]), str(files[2])
    if importlib.util.find_spec("hotcoco"):
      from hotcoco import panoptic

      def run_hotcoco():
        evaluator = panoptic.PanopticEval(truth, found)
        evaluator.evaluate()
        return evaluator.results()["All"]["pq"]

      measure("hotcoco, from files", run_hotcoco)
    else:
      print("  hotcoco is not installed")
    if importlib.util.find_spec("panopticapi"):
      measure("panopticapi, from files", lambda: run_panopticapi(truth, found))
  for name, value in PUBLISHED.items():
    print(f"  {name:<34}{value:8.2f}")
  if max(values.values()) - min(values.values()) > 1e-12:
    raise SystemExit(f"the tools do not agree: {values}")
  return {"pq_ms_per_pair": times | PUBLISHED, "pq": values}


def run_panopticapi(truth: str, found: str) -> float:
  """Without its processes, which would use all cores."""
  from panopticapi import evaluation

  content = [json.loads(pathlib.Path(f).read_text()) for f in (truth, found)]
  annotations = list(zip(*(c["annotations"] for c in content), strict=True))
  known = {c["id"]: c for c in CATEGORIES.to_list()}
  with contextlib.redirect_stdout(io.StringIO()):
    counts = evaluation.pq_compute_single_core(
      0,
      annotations,
      truth.removesuffix(".json"),
      found.removesuffix(".json"),
      known,
    )
  return counts.pq_average(known, isthing=None)[0]["pq"]


def measure_ap(rng, number: int) -> dict:
  """Seconds for mask AP of all images, by pycocotools and by hotcoco."""
  fast = [False] + [True] * bool(importlib.util.find_spec("hotcoco"))
  states = [InstanceAP(CATEGORIES, fast=f) for f in fast]
  start = time.process_time()
  for i in range(number):
    states[0].add(str(i), *random_instances(rng))
  added = (time.process_time() - start) / number * 1e3
  for state in states[1:]:
    state.images = states[0].images
  times, values = {}, []
  print(f"mask AP, {number} images, seconds")
  for name, state in zip(("pycocotools", "hotcoco"), states, strict=False):
    start = time.process_time()
    values.append(state.result())
    times[name] = time.process_time() - start
    print(f"  {name:<34}{times[name]:8.2f}   AP {values[-1]['ap']:.12f}")
  print(f"  (images made and masks packed: {added:.1f} ms per image)")
  if values[0] != values[-1]:
    raise SystemExit("pycocotools and hotcoco do not agree")
  return {"ap_seconds": times, "ap_images": number}


def random_pair(rng) -> tuple[PanopticMap, PanopticMap]:
  """A target with ragged outlines and a prediction that has most of them."""
  centres = rng.random((SEGMENTS, 2)) * SIZE
  maps = []
  for _ in range(2):
    noise = rng.normal(size=(2, 24, 32))
    shift = [
      cv2.resize(n, SIZE[::-1], interpolation=cv2.INTER_CUBIC) * 14
      for n in noise
    ]
    rough = rng.normal(size=(2, *SIZE)) * 0.7
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + np.array(shift) + rough
    distance = [
      (y - c[0]).astype(np.float32) ** 2 + (x - c[1]).astype(np.float32) ** 2
      for c in centres
    ]
    maps.append(np.argmin(distance, 0).astype(np.int32))
  kinds = rng.integers(0, len(CATEGORIES), SEGMENTS)
  names = rng.choice(1 << 20, SEGMENTS, replace=False) + 1
  return tuple(
    PanopticMap(
      names[m].astype(np.int32),
      tuple(
        Segment(int(names[i]), int(kinds[i]), bool(kinds[i] < 12), 1.0, 0)
        for i in np.unique(m)
      ),
    )
    for m in maps
  )


def random_instances(rng) -> tuple[Detections, Instances]:
  """28 detections of ellipses and 7 objects, a quarter of a megapixel."""
  size, count = (480, 512), 28
  low = rng.random((count, 2)) * 380
  high = low + 10 + rng.random((count, 2)) * 90
  low[::4] = low[1::4] + rng.normal(size=(7, 2)) * 6
  high[::4] = high[1::4] + rng.normal(size=(7, 2)) * 6
  high = np.maximum(high, low + 1)
  boxes = np.concatenate([low, high], 1).clip(0).round().astype(np.int32)
  masks = np.zeros((count, *size), np.uint8)
  for mask, (y0, x0, y1, x1) in zip(masks, boxes, strict=True):
    centre = ((x0 + x1) // 2, (y0 + y1) // 2)
    axes = ((x1 - x0) // 2 + 1, (y1 - y0) // 2 + 1)
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, -1)
  kinds = rng.integers(0, 12, 7).repeat(4)
  truth = np.asfortranarray(masks[1::4].transpose(1, 2, 0))
  objects = Instances(
    category=kinds[1::4],
    boxes=boxes[1::4].astype(np.float64),
    area=masks[1::4].sum((1, 2)).astype(np.float64),
    is_crowd=np.zeros(7, bool),
    is_difficult=np.zeros(7, bool),
    rles=tuple(r["counts"] for r in mask_utils.encode(truth)),
  )
  keep = np.arange(count) % 4 != 1
  score = np.sort(rng.random(keep.sum()))[::-1].astype(np.float32)
  found = np.asfortranarray(masks[keep].transpose(1, 2, 0))
  detections = Detections(
    proposal=np.arange(keep.sum()),
    category=kinds[keep],
    score=score,
    boxes=boxes[keep],
    size=size,
    rles=tuple(r["counts"] for r in mask_utils.encode(found)),
  )
  return detections, objects


if __name__ == "__main__":
  main()
