"""What each part of configs/folder.py is worth: one taken away at a time.

    python benchmarks/parts.py --workdir=runs/parts --root=DIR

Trains configs/folder.py on the photographs of DIR, which must have masks of
validation images, and every row of `PARTS`, some seeds each. Rows that change
nothing but the evaluation evaluate the first row's training again, in its
workdir: processes that run side by side need different seeds. What is in
--results is not run again; a stopped study goes on where it was.

The choice among options owes something to the images that it was made on. So
each run is also measured on two halves of the validation images, every other
one: the row that is best on one half is told with what it has on the other. A
class that a half does not show has no say there.

Writes the figures of all seeds to --results and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.data.files import absolute_path
from jtsm_jax.data.panoptic_files import read_panoptic
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality

ROOT = pathlib.Path(__file__).resolve().parent.parent

ALL = "as it stands"
_ONE_SIZE = ((320, 480), (480, 320))
PARTS: dict[str, dict[str, Any]] = {
  ALL: {},
  # Of the evaluation.
  "near copies up to IoU 0.5": {"evaluation.nms_iou": 0.5},
  "outlines as they are": {"evaluation.outline_rounds": 0},
  "things are not raised": {"evaluation.show_present": False},
  "S^MIL has no say": {"evaluation.mil_share": 0.0},
  "masks of the branch alone": {"evaluation.mask_share": 1.0},
  "masks of the proposals alone": {"evaluation.mask_share": 0.0},
  "stuff of the branch and the cells alone": {"evaluation.semantic_share": 1.0},
  "stuff of the proposals alone": {"evaluation.semantic_share": 0.0},
  "stuff also where the branch finds things": {
    "evaluation.thing_channel": False
  },
  "no mirror images": {"evaluation.flip": False},
  # Of the training.
  "no cell head": {"cells.enabled": False},
  "cells of tagged classes alone": {"losses.tag_advantage": 1e9},
  "one size": {"data.canvases": _ONE_SIZE, "evaluation.canvases": _ONE_SIZE},
  "features of one stage": {"backbone.outputs": ("head",)},
  "no size cue": {"pooling.size_exponents": (0.0, 0.0)},
  "no average beside the maxima": {"pooling.average": False},
  "no refinement heads": {"heads.num_refinements": 0},
  "masks as mined": {"reestimation.init": "none"},
}
COLUMNS = ("PQ", "things", "stuff", "mIoU", "AP50")


def main() -> None:
  """Runs what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--root", required=True, help="folder of the photographs")
  parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
  parser.add_argument("--parts", nargs="*", default=[*PARTS], choices=PARTS)
  parser.add_argument("--results", type=pathlib.Path)
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  path = args.results or args.workdir / "results.json"
  for seed in args.seeds:
    for part in args.parts:
      if str(seed) in read_results(path).get(part, {}):
        continue
      figures = run(
        args.workdir.absolute(), absolute_path(args.root), part, seed
      )
      results = read_results(path)  # perhaps another process has written
      results.setdefault(part, {})[str(seed)] = figures
      path.write_text(json.dumps(results, indent=1) + "\n")
  print(format_table(read_results(path)))


def read_results(path: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
  """Figures of each part and seed."""
  return json.loads(path.read_text()) if path.exists() else {}


def run(
  workdir: pathlib.Path, root: str, part: str, seed: int
) -> dict[str, float]:
  """One training and evaluation, or an evaluation alone."""
  changes = PARTS[part]
  retrains = part == ALL or any(
    not field.startswith("evaluation.") for field in changes
  )
  name = (part if retrains else ALL).replace(" ", "_")
  folder = workdir / f"{name}-{seed}"
  if not retrains and not (folder / "evaluation" / "metrics.json").exists():
    run(workdir, root, ALL, seed)
  shared = workdir / "shared"
  options = {
    "seed": seed,
    "data.root": root,
    "data.prepared": shared / "data",
    "proposals.store": shared / "proposals",
    "backbone.cache_dir": shared / "features",
    "reestimation.cache_dir": shared / "masks",
    **changes,
  }
  command = [
    sys.executable,
    "main.py",
    "--config=configs/folder.py",
    f"--workdir={folder}",
    f"--mode={'all' if retrains else 'evaluate'}",
    *(f"--config.{k}={v}" for k, v in options.items()),
  ]
  print(f"\n{part}, seed {seed}", flush=True)
  subprocess.run(command, cwd=ROOT, check=True)
  return read_figures(folder, shared / "data")


def read_figures(
  folder: pathlib.Path, data_folder: pathlib.Path
) -> dict[str, float]:
  """The columns of the table, and PQ on the two halves, of a finished run."""
  metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
  figures = {
    "PQ": metrics["all"]["pq"],
    "things": metrics["things"]["pq"],
    "stuff": metrics["stuff"]["pq"],
    "mIoU": metrics["semantic"]["miou"],
    "AP50": metrics["coco"]["ap50"],
  }
  data = open_prepared(data_folder)
  predictions = folder / "evaluation" / "predictions"
  predictions = read_panoptic(
    predictions / "panoptic.json", predictions / "panoptic", data.categories
  )
  images = data.splits["val"]
  for half in range(2):
    quality = PanopticQuality(data.categories)
    for i in range(half, len(images), 2):
      quality.add(predictions[images.file_names[i]], images.target(i))
    figures[f"half {half + 1}"] = quality.result()["all"]["pq"]
  return {name: round(value, 2) for name, value in figures.items()}


def format_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
  """Markdown: mean and half the range over the seeds, and the two halves.

  The difference is to the first row with the same seeds: it spreads less than
  what a row reaches.
  """
  lines = [
    f"| | {' | '.join(COLUMNS)} | difference of PQ | seeds |",
    "| --- " * (len(COLUMNS) + 3) + "|",
  ]
  mean = {}
  for part in PARTS:
    runs = results.get(part, {})
    if not runs:
      continue
    cells = [spread([r[column] for r in runs.values()]) for column in COLUMNS]
    pairs = [
      r["PQ"] - results[ALL][seed]["PQ"]
      for seed, r in runs.items()
      if seed in results.get(ALL, {})
    ]
    cells.append(spread(pairs, sign="+") if part != ALL and pairs else "")
    lines.append(f"| {part} | {' | '.join(cells)} | {len(runs)} |")
    if runs.keys() != results.get(ALL, {}).keys():
      continue  # other seeds cannot be compared
    mean[part] = [
      statistics.mean(r[f"half {half}"] for r in runs.values())
      for half in (1, 2)
    ]
  lines.append("")
  if not mean:
    return "\n".join(lines)
  for this, other in ((0, 1), (1, 0)):
    best = max(mean, key=lambda part: mean[part][this])
    lines.append(
      f"Best on half {this + 1}: {best}, {mean[best][this]:.1f}; on the other "
      f"half it has {mean[best][other]:.1f}."
    )
  return "\n".join(lines)


def spread(values: list[float], *, sign: str = "") -> str:
  """Mean ± half the range."""
  half = (max(values) - min(values)) / 2
  return f"{statistics.mean(values):{sign}.1f} ± {half:.1f}"


if __name__ == "__main__":
  main()
