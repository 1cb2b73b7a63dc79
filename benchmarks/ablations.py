"""The paper's choices one against the other, on the embedded set.

    python benchmarks/ablations.py --workdir=runs/ablations --seeds=3

Trains `configs/shapes.py` with one choice changed at a time (the paper's Tables
1 to 3 in small) and prints PQ, mean and spread over the seeds. Data and
proposals are shared by all runs, the backbone's features by those of a seed,
which chooses the images of their projection. A run that is finished is not
repeated, so a stopped study goes on where it was.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

MINING_ALONE = ("instance.enabled=False", "semantic.enabled=False")
ROWS = {
  "MoIPool, mining alone": MINING_ALONE,
  "RoIPool, mining alone": (*MINING_ALONE, "pooling.kind=roi"),
  "no refinement heads, mining alone": (
    *MINING_ALONE,
    "heads.num_refinements=0",
  ),
  "both branches, mined masks": ("reestimation.init=none",),
  "both branches, re-estimated masks": (),
}


def main() -> None:
  """Runs what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--config", default="configs/shapes.py")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
  args = parser.parse_args()
  table = {}
  for row in args.rows:
    table[row] = [run(args, row, seed) for seed in range(args.seeds)]
  print(format_table(table))
  path = args.workdir / "ablations.json"
  path.write_text(json.dumps(table, indent=1))
  print(f"\n{path}")


def run(args: argparse.Namespace, row: str, seed: int) -> dict[str, float]:
  """One training; returns PQ of all, things and stuff."""
  name = row.replace(",", "").replace(" ", "_")
  workdir = (args.workdir / f"{name}-{seed}").absolute()
  metrics = workdir / "evaluation" / "metrics.json"
  if not metrics.exists():
    shared = args.workdir.absolute() / "shared"
    overrides = (
      f"seed={seed}",
      f"data.prepared={shared / 'data'}",
      f"proposals.store={shared / 'proposals'}",
      f"backbone.cache_dir={shared / 'features'}",
      *ROWS[row],
    )
    command = [
      sys.executable,
      "main.py",
      f"--config={args.config}",
      f"--workdir={workdir}",
      *(f"--config.{o}" for o in overrides),
    ]
    print("\n" + row, f"seed {seed}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
  result = json.loads(metrics.read_text())
  return {part: result[part]["pq"] for part in ("all", "things", "stuff")}


def format_table(table: dict[str, list[dict[str, float]]]) -> str:
  """Mean and spread (half the range) over the seeds."""
  lines = [f"{'':36}{'PQ':>14}{'things':>14}{'stuff':>14}"]
  for row, runs in table.items():
    cells = []
    for part in ("all", "things", "stuff"):
      values = [run[part] for run in runs]
      spread = (max(values) - min(values)) / 2
      cells.append(f"{statistics.mean(values):.1f} +- {spread:.1f}")
    lines.append(f"{row:36}" + "".join(f"{cell:>14}" for cell in cells))
  return "\n".join(lines)


if __name__ == "__main__":
  main()
