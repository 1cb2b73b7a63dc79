"""Times preparation and the training pipeline, beside plain decoding.

    python benchmarks/pipeline.py --root coco --train_set train2017 \
        --output pipeline.json

ROOT is a folder of COCO panoptic data. Printed are images per second of the
preparation; of batches as training reads them (flips, colours, proposals) on a
canvas of 512 x 512; and of OpenCV decoding and resizing the same files to the
same size with as many threads. The last two take turns, so that a busy machine
slows both, and their ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.data.coco import coco_panoptic_source
from jtsm_jax.data.pipeline import make_pipeline
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.data.source import LazyRecords, Source
from jtsm_jax.proposals.fill_store import fill_store, generator
from jtsm_jax.proposals.generate import preset_settings
from jtsm_jax.proposals.store import open_store

SIDE = 512
BATCH = 8


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--root", type=pathlib.Path, required=True)
  parser.add_argument("--train_set", default="train2017")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument(
    "--workdir", type=pathlib.Path, help="kept if it is given"
  )
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--proposals", type=int, default=2000)
  args = parser.parse_args()
  cv2.setNumThreads(1)
  threads = os.cpu_count()
  with tempfile.TemporaryDirectory() as temporary:
    workdir = args.workdir or pathlib.Path(temporary)
    report = dict(threads=threads, **preparation(args, workdir))
    print_line(report, "prepare")
    print_line(report, "prepare_with_masks")
    source = open_prepared(workdir / "train").splits["train"]
    settings = preset_settings("fast", max_proposals=args.proposals)
    fill_store(source, workdir / "proposals", generator(settings))
    store = open_store(workdir / "proposals")
    files = [source[i].image for i in range(len(source))]
    ours, plain = [], []
    for turn in range(args.turns):
      ours.append(pipeline_rate(source, store, settings, threads, turn))
      plain.append(decoding_rate(files, threads))
    report["pipeline"] = statistics.median(ours)
    report["decode_and_resize"] = statistics.median(plain)
    report["ratio"] = statistics.median(
      p / o for p, o in zip(plain, ours, strict=True)
    )
  print_line(report, "pipeline")
  print_line(report, "decode_and_resize")
  print(f"the pipeline takes {report['ratio']:.2f} x decoding and resizing")
  args.output.write_text(json.dumps(report, indent=1))


def preparation(args, workdir) -> dict[str, float]:
  """Images per second, for tags alone and with masks."""
  source = coco_panoptic_source(
    args.root, train_set=args.train_set, val_set=args.train_set
  )
  train = source.splits["train"]
  # Repeated under other names, so that starting up does not count.
  many = [(i, n) for n in range(10) for i in range(len(train))]

  def copy_of(split, k):
    i, n = many[k]
    record = source.splits[split][i]
    return dataclasses.replace(record, image_id=f"{record.image_id}-{n}")

  rates = {}
  for name, splits in dict(
    prepare=("train",), prepare_with_masks=("train", "val")
  ).items():
    copies = {
      s: LazyRecords(len(many), lambda k, s=s: copy_of(s, k)) for s in splits
    }
    with tempfile.TemporaryDirectory() as folder:
      start = time.perf_counter()
      prepare(
        Source("copies", source.categories, copies),
        pathlib.Path(folder) / "data",
      )
      seconds = time.perf_counter() - start
    rates[name] = len(splits) * len(many) / seconds
  shutil.rmtree(workdir / "train", ignore_errors=True)
  prepare(source, workdir / "train")
  return rates


def pipeline_rate(source, store, settings, threads, seed) -> float:
  """Images per second of batches as training reads them."""
  steps = 4 * len(source) // BATCH
  batches = make_pipeline(
    source,
    store,
    seed=seed,
    canvases=((SIDE, SIDE),),
    batch_size=BATCH,
    max_proposals=settings.max_proposals,
    max_superpixels=settings.num_superpixels,
    num_steps=steps,
    colour_factor=1.5,
    num_threads=threads,
  )
  for _ in itertools.islice(batches, threads):  # the threads have started
    pass
  start = time.perf_counter()
  count = sum(len(batch.tags) for _, batch in batches)
  return count / (time.perf_counter() - start)


def decoding_rate(files, threads) -> float:
  """Images per second of OpenCV alone."""

  def decode(data):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    scale = SIDE / max(image.shape[:2])
    size = [round(n * scale) for n in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    start = time.perf_counter()
    count = sum(1 for _ in pool.map(decode, files * 4))
    return count / (time.perf_counter() - start)


def print_line(report, name) -> None:
  print(f"{name.replace('_', ' '):<20}{report[name]:8.1f} images/s", flush=True)


if __name__ == "__main__":
  main()
