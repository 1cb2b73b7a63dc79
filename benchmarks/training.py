"""Times whole trainings: where the time of a step goes, and what GrabCut adds.

    python benchmarks/training.py --config configs/shapes.py \
        --workdir runs/bench --output training.json
    python benchmarks/training.py --config configs/folder.py \
        --workdir runs/bench --output training.json -- --config.data.root=DIR

Each variant trains the first steps of a run, branches included, through main.py
as a user would: pseudo masks as mined ("none"), and re-estimated by GrabCut
with lag 0 and lag 2. The first run of a variant fills the caches and is not
counted ("cold"); the next ones find every mask. They take turns, so that a busy
machine slows all. Figures are medians over the intervals of metrics.jsonl:
images per second, milliseconds a step, shares of the time spent waiting for
input and for masks, operations per second of the matrix units, utilisation
where the device's peak is known.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parents[1]
VARIANTS = {
  "none": ("--config.reestimation.init=none", "--config.reestimation.lag=0"),
  "lag 0": ("--config.reestimation.lag=0",),
  "lag 2": ("--config.reestimation.lag=2",),
}
COLUMNS = {
  "images_per_second": "speed/images_per_second",
  "input_wait": "speed/input_wait",
  "reestimation_wait": "speed/reestimation_wait",
  "teraflops": "speed/teraflops",
  "utilisation": "speed/utilisation",
}
LOG_EVERY = 20


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("flags", nargs="*", help="of main.py, after --")
  args = parser.parse_args()
  shared = [
    f"--config={args.config}",
    f"--config.data.prepared={args.workdir / 'data'}",
    f"--config.proposals.store={args.workdir / 'proposals'}",
    f"--config.backbone.cache_dir={args.workdir / 'features'}",
    *args.flags,
  ]
  call(shared, args.workdir / "propose", "--mode=propose")
  turns = {name: [] for name in VARIANTS}
  cold = {}
  for turn in range(1 + args.turns):
    for name, flags in VARIANTS.items():
      lines = train(shared + list(flags), args.workdir / name, args.steps)
      if turn:
        turns[name] += lines
      else:
        cold[name] = lines
  report = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "config": args.config,
    "steps": args.steps,
    "warm": {name: summary(lines) for name, lines in turns.items()},
    "cold": {name: summary(lines) for name, lines in cold.items()},
  }
  base = report["warm"]["none"]["images_per_second"]
  for kind in ("cold", "warm"):
    for row in report[kind].values():
      row["step_over_none"] = base / row["images_per_second"]
  print_table(report)
  args.output.write_text(json.dumps(report, indent=1))


def train(flags: list[str], workdir: pathlib.Path, steps: int) -> list[dict]:
  """Trains afresh, with what the caches hold; the lines of its metrics."""
  for name in ("checkpoints", "best"):
    shutil.rmtree(workdir / name, ignore_errors=True)
  (workdir / "metrics.jsonl").unlink(missing_ok=True)
  call(
    flags,
    workdir,
    "--mode=train",
    f"--config.train.steps={steps}",
    "--config.reestimation.start=0",
    f"--config.train.log_every={LOG_EVERY}",
    f"--config.train.images_every={10 * steps}",
    f"--config.train.evaluate_every={10 * steps}",
    f"--config.train.checkpoint_every={10 * steps}",
  )
  with (workdir / "metrics.jsonl").open() as file:
    lines = [json.loads(line) for line in file]
  # The first intervals fill the queues; the last step draws pictures.
  return [x for x in lines if "speed/images_per_second" in x][2:]


def call(flags: list[str], workdir: pathlib.Path, *more: str) -> None:
  """Runs main.py to its end."""
  subprocess.run(
    [sys.executable, ROOT / "main.py", *flags, f"--workdir={workdir}", *more],
    cwd=ROOT,
    check=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def summary(lines: list[dict]) -> dict[str, float]:
  """Medians over the intervals."""
  row = {
    name: statistics.median(line[key] for line in lines)
    for name, key in COLUMNS.items()
    if key in lines[0]
  }
  row["hit_rate"] = lines[-1].get("reestimation/hit_rate", 0.0)
  return row


def print_table(report: dict) -> None:
  print(f"{report['device']}, {report['config']}")
  names = ["images_per_second", "input_wait", "reestimation_wait", "hit_rate"]
  names += ["teraflops", "utilisation", "step_over_none"]
  print(f"{'':<12}" + "".join(f"{name:>19}" for name in names))
  for kind in ("cold", "warm"):
    for variant, row in report[kind].items():
      cells = [f"{row[n]:>19.3f}" if n in row else f"{'-':>19}" for n in names]
      print(f"{kind + ' ' + variant:<12}" + "".join(cells))


if __name__ == "__main__":
  main()
