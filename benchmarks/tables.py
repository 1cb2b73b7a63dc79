"""The paper's Tables 1 to 3 in small, its figures beside ours.

    python benchmarks/tables.py --workdir=runs/tables
    python benchmarks/tables.py --workdir=runs/tables_msrc --dataset=msrc \
        --root=DIR

Trains the rows of configs/ablations.py from configs/shapes.py, the embedded
set, or from configs/folder.py, on the photographs of DIR; some seeds each. What
docs/beyond_the_paper.md adds as a part of its own (LEFT_OUT) is left out; what
small data needs (docs/decisions.md) stays. Rows that are the same run are run
once. A run that is finished is not repeated, so a stopped study goes on where
it was. Data, proposals and re-estimated masks are shared by all runs, the
backbone's features by those of a seed, which chooses the images of their
projection.

Writes, after each row, the figures of all seeds to --results, by default
WORKDIR/results.json, and WORKDIR/tables.md; at the end WORKDIR/tables.png. What
--results has is not run; benchmarks/results/ has what was measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
import subprocess
import sys

from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs.ablations import ROWS, TABLES
from jtsm_jax.data.files import absolute_path

ROOT = pathlib.Path(__file__).resolve().parent.parent

DATASETS = {"shapes": "shapes", "msrc": "folder"}  # its configuration
LEFT_OUT = {
  "cells.enabled": False,
  "evaluation.show_present": False,
  "evaluation.outline_rounds": 0,
}
PARTS = ("all", "things", "stuff")


def main() -> None:
  """Runs what is missing and writes the tables."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--dataset", default="shapes", choices=DATASETS)
  parser.add_argument("--root", default="", help="folder of the photographs")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--results", type=pathlib.Path)
  parser.add_argument("--tables", nargs="*", default=[*TABLES], choices=TABLES)
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  path = args.results or args.workdir / "results.json"
  results = json.loads(path.read_text()) if path.exists() else {}
  found = {}
  # Seed by seed: a study that is stopped has something of every row.
  for seed in range(args.seeds):
    for table in args.tables:
      for row in TABLES[table]:
        changes = changed_fields(args.dataset, ROWS[row].fields)
        # The name of a run is what it differs in.
        name = ",".join(f"{k}={v}" for k, v in changes.items()) or "default"
        runs = results.setdefault(name, {})
        if str(seed) not in runs:
          runs[str(seed)] = train(args, name, changes, seed)
          path.write_text(json.dumps(results, indent=1) + "\n")
        found.setdefault(row, {})[seed] = runs[str(seed)]
        text = "\n".join(format_table(t, found) for t in args.tables)
        (args.workdir / "tables.md").write_text(text)
  print(text)
  plot(args.workdir / "tables.png", args.tables, found)
  print(f"{path}, {args.workdir / 'tables.md'}, tables.png")


def changed_fields(
  dataset: str, fields: dict[str, object]
) -> dict[str, object]:
  """What of a row's fields differs from the configuration of the data set."""
  module = importlib.import_module(f"configs.{DATASETS[dataset]}")
  config = module.get_config()
  changes = {}
  for field, value in fields.items():
    group, name = field.split(".")
    if config[group][name] != value:
      changes[field] = value
  return changes


def train(
  args: argparse.Namespace, name: str, changes: dict[str, object], seed: int
) -> dict[str, float]:
  """One training, unless it is there: PQ of all, things and stuff."""
  workdir = (args.workdir / f"{name}-{seed}").absolute()
  metrics = workdir / "evaluation" / "metrics.json"
  if not metrics.exists():
    shared = args.workdir.absolute() / "shared"
    options = {
      "seed": seed,
      "data.prepared": shared / "data",
      "proposals.store": shared / "proposals",
      "backbone.cache_dir": shared / "features",
      "reestimation.cache_dir": shared / "masks",
      **({"data.root": absolute_path(args.root)} if args.root else {}),
      **LEFT_OUT,
      **changes,
    }
    command = [
      sys.executable,
      "main.py",
      f"--config=configs/{DATASETS[args.dataset]}.py",
      f"--workdir={workdir}",
      *(f"--config.{k}={v}" for k, v in options.items()),
    ]
    print(f"\n{name}, seed {seed}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
  result = json.loads(metrics.read_text())
  return {part: round(result[part]["pq"], 2) for part in PARTS}


def format_table(name: str, found: dict[str, dict[int, dict]]) -> str:
  """Markdown: mean and half the range over the seeds.

  The last column is the gain over the first row of the table with the same
  seed: what a row gains spreads less than what it reaches.
  """
  lines = [
    f"Table {name}\n",
    "| | PQ, paper (VOC 2012) | PQ | things | stuff | gain | seeds |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  first = found.get(TABLES[name][0], {})
  for row in TABLES[name]:
    runs = found.get(row, {})
    if not runs:
      continue
    columns = [[run[part] for run in runs.values()] for part in PARTS]
    columns.append([runs[s]["all"] - first[s]["all"] for s in runs])
    cells = [ROWS[row].label, f"{ROWS[row].pq:.1f}"]
    for column in columns:
      mean, spread = mean_and_spread(column)
      cells.append(f"{mean:.1f} ± {spread:.1f}")
    lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
  return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float]) -> tuple[float, float]:
  """Mean and half the range."""
  return statistics.mean(values), (max(values) - min(values)) / 2


def plot(path: pathlib.Path, tables: list[str], found) -> None:
  """Bars of what each row gains over the first one, ours and the paper's."""
  figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
  axes = figure.subplots(1, len(tables), squeeze=False)[0]
  for axis, name in zip(axes, tables, strict=True):
    rows = TABLES[name]
    first = found[rows[0]]
    ours = [
      mean_and_spread([run["all"] - first[s]["all"] for s, run in runs.items()])
      for runs in (found[row] for row in rows)
    ]
    places = range(len(rows))
    axis.bar(
      [x - 0.2 for x in places],
      [mean for mean, _ in ours],
      yerr=[spread for _, spread in ours],
      width=0.4,
      label="ours, in small",
      capsize=3,
    )
    axis.bar(
      [x + 0.2 for x in places],
      [ROWS[row].pq - ROWS[rows[0]].pq for row in rows],
      width=0.4,
      label="paper, VOC 2012",
      color="0.7",
    )
    labels = [ROWS[row].label for row in rows]
    axis.set_xticks(places, labels, rotation=25, ha="right", fontsize=8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_title(f"Table {name}")
    axis.set_ylabel("PQ, over the first row")
  axes[0].legend(fontsize=8, loc="upper left")
  figure.savefig(path, dpi=100)


if __name__ == "__main__":
  main()
