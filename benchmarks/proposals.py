"""Measures segment proposals: time per stage, quality, memory, bytes.

    python benchmarks/proposals.py --output proposals.json --named \
        --voc VOCdevkit/VOC2007 \
        --coco instances_train2017.json images \
        --panoptic classes.json panoptic_val.json panoptic_val images

With --named, of VOC and COCO only the images that results/proposal_images.json
names. Each data set is measured with each preset, one thread per process, image
by image; crowds are left out, and all other instances or segments count. Times
are medians over images, after one image that compiles the network. "Two at
once" is the rate of two processes over that of one, on the first images.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import resource
import sys
import time

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax import workers
from jtsm_jax.data.panoptic_files import read_panoptic
from jtsm_jax.data.run_lengths import encode_segments
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.proposals import (
  generate,
  quality,
  ranking,
  record_format,
)
from jtsm_jax.types import Categories

NAMED = pathlib.Path(__file__).parent / "results" / "proposal_images.json"
STAGES = ("cues", "superpixels", "network", "trees", "candidates", "choice")


def main() -> None:
  """Measures what was asked for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--presets", nargs="*", default=[*generate.PRESETS])
  parser.add_argument("--voc", type=pathlib.Path, metavar="DIR")
  parser.add_argument(
    "--coco", type=pathlib.Path, nargs=2, metavar=("JSON", "IMAGES")
  )
  parser.add_argument(
    "--panoptic",
    type=pathlib.Path,
    nargs=4,
    metavar=("CLASSES", "JSON", "MASKS", "IMAGES"),
  )
  parser.add_argument("--named", action="store_true", help=str(NAMED))
  parser.add_argument("--limit", type=int, help="images of each data set")
  args = parser.parse_args()
  images = {}
  if args.voc:
    images["voc"] = voc_images(args.voc)
  if args.coco:
    images["coco"] = coco_images(*args.coco)
  if args.named:
    named = json.loads(NAMED.read_text())["measured"]
    chosen = {*named["VOC 2007"]}
    chosen |= {f"{image:012d}" for image in named["COCO 2017 train"]}
    for name, cases in images.items():
      images[name] = [case for case in cases if case[0].stem in chosen]
  if args.panoptic:
    images["panoptic"] = panoptic_images(*args.panoptic)
  report = dict(
    cores=os.cpu_count(), python=platform.python_version(), results={}
  )
  for name, cases in images.items():
    for preset in args.presets:
      found = measure(cases[: args.limit], preset)
      report["results"][f"{name} {preset}"] = found
      args.output.write_text(json.dumps(report, indent=1))
      print_result(f"{name} {preset}", found)


def measure(cases, preset):
  """All figures of one data set and one preset."""
  work = functools.partial(one_image, preset)
  with workers.start_processes(1) as pool:
    pool.submit(work, cases[0]).result()
    results = list(pool.map(work, cases))
    pool.shutdown()
  some = cases[:40]
  rates = []
  for processes in (1, 2):
    with workers.start_processes(processes) as pool:
      list(pool.map(work, [cases[0]] * (3 * processes)))  # starts them all
      start = time.monotonic()
      list(pool.map(work, some))
      rates.append(len(some) / (time.monotonic() - start))
      pool.shutdown()
  times = np.array([r[1] for r in results])
  summary = quality.summary(quality.concatenate([r[0] for r in results]))
  return dict(
    images=len(cases),
    seconds=float(np.median(times.sum(1))),
    stages=dict(zip(STAGES, np.median(times, 0).tolist(), strict=True)),
    scaling=rates[1] / rates[0],
    peak_mib=max(r[3] for r in results),
    kib_at_2000=float(np.mean([r[2] for r in results])) / 1024,
    counts=quality.COUNTS,
    quality=summary,
  )


def one_image(preset, case):
  """Best IoU, seconds of each stage, bytes of a record, peak memory in MiB."""
  path, read_truth = case
  image = decode_image(path.read_bytes())
  settings = generate.preset_settings(preset, max_proposals=4000)
  times = {}
  clock = time.monotonic()

  def lap(stage):
    nonlocal clock
    now = time.monotonic()
    times[stage] = now - clock
    clock = now

  superpixels, graph, candidates = generate.find_candidates(
    image, settings, lap=lap
  )
  scores = ranking.score(candidates, graph.shape, ranker=settings.ranker)
  membership = generate.choose(candidates, graph, scores, settings)
  lap("choice")
  proposals = generate.in_full_size(superpixels, membership, image.shape[:2])
  encoded = len(record_format.encode_proposals(path.stem, proposals.best(2000)))
  best = quality.best_iou(proposals, read_truth())
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return best, [times.get(s, 0.0) for s in STAGES], encoded, memory


def voc_images(root):
  """Images of VOC with instance masks: (path, function that reads truth)."""
  names = sorted(p.stem for p in (root / "SegmentationObject").glob("*.png"))
  return [
    (root / "JPEGImages" / f"{n}.jpg", functools.partial(voc_truth, root, n))
    for n in names
  ]


def voc_truth(root, name):
  """The true segments of an image."""
  objects, classes = (
    np.asarray(Image.open(root / folder / f"{name}.png"))
    for folder in ("SegmentationObject", "SegmentationClass")
  )
  ids = [i for i in np.unique(objects) if i not in (0, 255)]
  _, rles = encode_segments(objects, ids)
  category = np.array([classes[objects == i].max() for i in ids], np.int64)
  return quality.TrueSegments(
    rles, objects != 255, category, np.ones(len(ids), bool)
  )


def coco_images(json_file, folder):
  """Images with instance masks that are no crowds, as `voc_images`."""
  from pycocotools.coco import COCO

  coco = COCO(str(json_file))
  cases = []
  for image in sorted(coco.imgs.values(), key=lambda i: i["id"]):
    found = coco.loadAnns(coco.getAnnIds(image["id"], iscrowd=False))
    masks = [coco.annToRLE(a) for a in found]
    category = [a["category_id"] for a in found]
    if masks:
      read = functools.partial(coco_truth, masks, category)
      cases.append((folder / image["file_name"], read))
  return cases


def coco_truth(rles, category):
  """The true segments of an image."""
  from pycocotools import mask as coder

  known = np.ones(rles[0]["size"], bool)
  kept = np.flatnonzero(coder.area(rles))
  # Whether they are strings or bytes.
  rles = tuple(coder.encode(coder.decode(rles[n]))["counts"] for n in kept)
  category = np.array(category, np.int64)[kept]
  return quality.TrueSegments(rles, known, category, np.ones(len(kept), bool))


def panoptic_images(classes, json_file, masks, folder):
  """Images with COCO panoptic truth, as `voc_images`."""
  categories = Categories.from_list(json.loads(classes.read_text()))
  truth = read_panoptic(json_file, masks, categories)
  return [
    (folder / name, functools.partial(panoptic_truth, truth, name))
    for name in sorted(truth)
  ]


def panoptic_truth(truth, name):
  """The true segments of an image."""
  return quality.segments_of_map(truth[name])


def print_result(name, found):
  """A few lines for people."""
  stages = ", ".join(f"{k} {v:.2f}" for k, v in found["stages"].items())
  print(
    f"{name}: {found['images']} images, {found['seconds']:.2f} s each"
    f" ({stages}); two at once {found['scaling']:.2f} x; peak"
    f" {found['peak_mib']:.0f} MiB; {found['kib_at_2000']:.1f} KiB on disk at"
    " 2,000"
  )
  for group, row in found["quality"].items():
    values = "  ".join(
      f"{j:.3f}/{r:.3f}@{n}"
      for n, j, r in zip(found["counts"], row["J_i"], row["AR"], strict=True)
    )
    print(f"  {group:<7} {row['segments']:>5} segments  J_i/AR {values}")
  sys.stdout.flush()


if __name__ == "__main__":
  main()
