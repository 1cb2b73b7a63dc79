"""The command behind `python -m jtsm_jax.evaluation.panoptic_quality`.

It takes the flags and files of panopticapi's evaluation and prints its table,
followed by one line for each class.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jtsm_jax import workers
from jtsm_jax.data.panoptic_files import (
  PanopticFiles,
  json_categories,
  read_json,
  read_panoptic_results,
)
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality, format_table
from jtsm_jax.types import Categories, InputError

IMAGES_PER_JOB = 50


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the flags, counts and prints; a fault of the input exits with 2."""
  parser = argparse.ArgumentParser(
    prog="python -m jtsm_jax.evaluation.panoptic_quality",
    description="PQ, SQ and RQ of files in COCO's panoptic format, in percent.",
  )
  parser.add_argument(
    "--gt_json_file", "--gt_json", required=True, help="JSON of ground truth"
  )
  parser.add_argument(
    "--pred_json_file", "--pred_json", required=True, help="JSON of predictions"
  )
  parser.add_argument(
    "--gt_folder", help="its PNG files; default: X if the JSON is X.json"
  )
  parser.add_argument(
    "--pred_folder", help="its PNG files; default: X if the JSON is X.json"
  )
  parser.add_argument("--output", help="JSON file for all results in full")
  parser.add_argument(
    "--num_workers",
    type=int,
    help="processes; default: one for each core, 0: work in this one",
  )
  args = parser.parse_args(argv)
  folders = [
    folder or json_file.removesuffix(".json")
    for json_file, folder in (
      (args.gt_json_file, args.gt_folder),
      (args.pred_json_file, args.pred_folder),
    )
  ]
  started = time.monotonic()
  print("Evaluation panoptic segmentation metrics:")
  for what, folder, json_file in zip(
    ("Ground truth", "Prediction"),
    folders,
    (args.gt_json_file, args.pred_json_file),
    strict=True,
  ):
    print(f"{what}:\n\tSegmentation folder: {folder}\n\tJSON file: {json_file}")
  try:
    quality = compare_files(
      Path(args.gt_json_file),
      Path(folders[0]),
      Path(args.pred_json_file),
      Path(folders[1]),
      num_workers=args.num_workers,
    )
    result = quality.result()
    if args.output:
      try:
        Path(args.output).write_text(json.dumps(result, indent=1))
      except OSError as error:
        raise InputError(
          f"--output={args.output}: cannot be written ({error.strerror})"
        ) from error
  except InputError as error:
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(2)
  print(f"{'':10s}| {'PQ':>5s}  {'SQ':>5s}  {'RQ':>5s} {'N':>5s}")
  print("-" * 38)
  for name in ("all", "things", "stuff"):
    r = result[name]
    print(
      f"{name.capitalize():10s}| {r['pq']:5.1f}  {r['sq']:5.1f}"
      f"  {r['rq']:5.1f} {r['n']:5d}"
    )
  print(f"\n{format_table(result)}\n")
  print(f"Time elapsed: {time.monotonic() - started:0.2f} seconds")


def compare_files(
  gt_json: Path,
  gt_folder: Path,
  pred_json: Path,
  pred_folder: Path,
  *,
  num_workers: int | None = None,
) -> PanopticQuality:
  """Counts the images of two JSON files in COCO's panoptic format.

  Args:
    gt_json: ground truth, with `annotations` and `categories`.
    gt_folder: of its PNG files.
    pred_json: predictions, with `annotations` of at least the same images.
    pred_folder: of its PNG files.
    num_workers: processes; None for one per core, 0 to work in this one.

  Raises:
    InputError: a file is missing or damaged, an image has no prediction, or
      maps, ids, sizes and categories do not fit together.
  """
  categories = json_categories(gt_json, read_json(gt_json), "panoptic")
  targets = read_panoptic_results(gt_json, gt_folder, categories)
  predictions = read_panoptic_results(pred_json, pred_folder, categories)
  lacking = [image for image in targets if image not in predictions]
  if lacking:
    raise InputError(
      f"{pred_json}: no prediction for {len(lacking)} of {len(targets)} images,"
      f" e.g. image_id {lacking[0]!r}; predict them too, or take them out of"
      f" {gt_json}"
    )
  if len(predictions) > len(targets):
    print(
      f"{pred_json}: {len(predictions) - len(targets)} predictions are not"
      f" counted: {gt_json} does not have their images",
      file=sys.stderr,
    )
  images = list(targets)
  parts = [
    images[i : i + IMAGES_PER_JOB]
    for i in range(0, len(images), IMAGES_PER_JOB)
  ]
  if num_workers is None:
    num_workers = min(workers.available_cores(), len(parts))
  jobs = (
    (predictions.part(part), targets.part(part), categories) for part in parts
  )
  total = PanopticQuality(categories)
  for counts in workers.map_in_processes(
    _count,
    jobs,
    num_workers if num_workers > 1 else 0,
    remedy=f"give --num_workers={num_workers // 2}",
  ):
    total.merge(counts)
  return total


def _count(
  predictions: PanopticFiles, targets: PanopticFiles, categories: Categories
) -> PanopticQuality:
  quality = PanopticQuality(categories)
  for image in targets:
    try:
      quality.add(predictions[image], targets[image])
    except ValueError as error:
      raise InputError(f"image_id {image!r}: {error}") from error
  return quality
