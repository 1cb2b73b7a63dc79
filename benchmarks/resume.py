"""Kills and stops a training run at random moments and compares its end.

    nice python benchmarks/resume.py --workdir=runs/resume \
        --output=runs/resume.json

Runs the same command until it ends, again and again, and interrupts it: `kill
-9` at moments drawn over the duration of a whole run, a part of them while a
checkpoint is being written; and SIGTERM, which has to end the run with exit
code 0 within 30 s. After each interruption, the next 50 image ids that a
resumed run reads are compared with those of a run that reads all of them from
the beginning. At the end of each run, every array of the newest checkpoint
(parameters, model state, optimiser slots, EMA, step, segments in flight) is
compared, bit by bit, with that of a run that nothing has disturbed, and so are
the steps in metrics.jsonl. Two undisturbed runs are compared, too: one that
compiled all programs, and one that found them in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import absl.flags
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import config_flags

from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.modes.data import prepared_directory
from jtsm_jax.modes.proposals import open_proposals
from jtsm_jax.train import setup

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = 50
SETTINGS = (
  "--config.train.ema_decay=0.9",
  "--config.train.checkpoint_every=2",
  "--config.train.evaluate_every=7",
)
LIMIT = 30.0  # seconds in which a SIGTERM ends a run


def main() -> None:
  """Interrupts, compares and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="tests/configs/tiny.py:frozen")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument(
    "--kills_in_save", type=int, default=6, help="of the kills"
  )
  parser.add_argument("--terms", type=int, default=5)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  root = args.workdir.absolute()
  shutil.rmtree(root, ignore_errors=True)
  environment = os.environ | {"JTSM_CACHE_DIR": str(root / "cache")}
  first = root / "undisturbed"
  command = [sys.executable, "main.py", f"--config={args.config}", *SETTINGS]
  command += [f"--config.train.steps={args.steps}"]
  shared = [
    f"--config.data.prepared={first / 'data'}",
    f"--config.proposals.store={first / 'proposals'}",
  ]

  def start(workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{workdir.name}.log", "a") as log:
      return subprocess.Popen(
        [*command, f"--workdir={workdir}", *shared, *flags],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def finish(workdir: pathlib.Path, *flags: str) -> float:
    began = time.monotonic()
    code = start(workdir, *flags).wait()
    if code:
      sys.exit(f"exit code {code}: see {root / workdir.name}.log")
    return time.monotonic() - began

  finish(first, "--mode=propose")
  train = "--mode=train"
  compiled = finish(first, train)
  duration = finish(root / "cached", train)
  expected = end_of(first)
  reader = Reader(args.config, args.steps, first)
  result = {
    "config": args.config,
    "steps": args.steps,
    "seconds_compiled": compiled,
    "seconds_cached": duration,
    "arrays": len(expected.arrays),
    "cached_programs": expected.differences(end_of(root / "cached")),
    "interruptions": [],
    "runs": [],
  }
  print(f"undisturbed {compiled:.0f} s, with cached programs {duration:.0f} s")
  print(
    f"  {len(expected.arrays)} arrays, {verdict(result['cached_programs'])}"
  )

  randomly = random.Random(args.seed)
  kinds = ["kill"] * (args.kills - args.kills_in_save)
  kinds += ["kill in save"] * args.kills_in_save + ["term"] * args.terms
  randomly.shuffle(kinds)
  print("run  kind          moment  step  exit  ends in  next images")
  for number in itertools.count():
    workdir = root / f"run_{number}"
    ended = False
    while not ended:
      process = start(workdir, train)
      if not kinds:
        ended = process.wait() == 0
        continue
      moment = randomly.uniform(0, duration)
      found = interrupt(process, workdir, kinds[0], moment, randomly)
      if found is None:  # it was faster
        ended = process.returncode == 0
        if not ended:
          sys.exit(f"exit code {process.returncode}: see {workdir.name}.log")
        continue
      kind = kinds.pop(0)
      step = newest_step(workdir)
      found |= {"run": number, "kind": kind, "step": step}
      found["images_equal"] = reader.resumes_well(step)
      result["interruptions"].append(found)
      print(
        f"{number:3}  {kind:12}  {found['moment']:5.1f}s {step:5}  "
        f"{found['exit_code']:4}  {found['seconds']:6.1f}s  "
        f"{'equal' if found['images_equal'] else 'DIFFERENT'}",
        flush=True,
      )
    differences = expected.differences(end_of(workdir))
    result["runs"].append(differences)
    print(f"{number:3}  ended: {verdict(differences)}", flush=True)
    shutil.rmtree(workdir)
    args.output.write_text(json.dumps(result, indent=1))
    if not kinds:
      break
  terms = [x for x in result["interruptions"] if x["kind"] == "term"]
  good = (
    not result["cached_programs"]
    and not any(result["runs"])
    and all(x["images_equal"] for x in result["interruptions"])
    and all(x["exit_code"] == 0 and x["seconds"] < LIMIT for x in terms)
  )
  print("all is equal" if good else "SOMETHING DIFFERS")
  sys.exit(not good)


def interrupt(
  process: subprocess.Popen,
  workdir: pathlib.Path,
  kind: str,
  moment: float,
  randomly: random.Random,
) -> dict[str, Any] | None:
  """Sends a signal at a moment; None where the run has ended before."""
  began = time.monotonic()
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(moment)
  pattern = "*/*.orbax-checkpoint-tmp*"
  while kind == "kill in save" and process.poll() is None:
    if any(workdir.glob(pattern)):
      time.sleep(randomly.uniform(0, 0.05))
      break
    time.sleep(0.001)
  if process.poll() is not None:
    return None
  moment = time.monotonic() - began
  process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
  sent = time.monotonic()
  code = process.wait()
  if kind != "term" and code != -signal.SIGKILL:
    return None
  saves = any(workdir.glob(pattern))
  return {
    "moment": moment,
    "exit_code": code,
    "seconds": time.monotonic() - sent,
    "left_an_unfinished_save": saves,
  }


class End:
  """What a run has come to.

  Attributes:
    arrays: of the newest checkpoint, by name.
    steps: that were logged, and those that were evaluated.
  """

  def __init__(self, arrays: dict[str, np.ndarray], steps: list[list[int]]):
    self.arrays, self.steps = arrays, steps

  def differences(self, other: End) -> list[str]:
    """Names of the arrays that differ in any bit, and "metrics.jsonl"."""
    a, b = self.arrays, other.arrays
    different = [
      name
      for name in sorted(a.keys() | b.keys())
      if name not in a
      or name not in b
      or (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape)
      or a[name].tobytes() != b[name].tobytes()
    ]
    return different + ["metrics.jsonl"] * (self.steps != other.steps)


def end_of(workdir: pathlib.Path) -> End:
  """Reads the newest checkpoint and the metrics."""
  folder = workdir / "checkpoints" / str(newest_step(workdir))
  arrays = {}
  for item in ("state", "in_flight"):
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
      tree = handler.metadata(folder / item).tree
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      )
      args = ocp.args.PyTreeRestore(tree, restore_args=as_numpy)
      tree = handler.restore(folder / item, args=args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  text = (workdir / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return End(
    arrays,
    [
      [x["step"] for x in lines if any(name.startswith(kind) for name in x)]
      for kind in ("loss/", "val/")
    ],
  )


def newest_step(workdir: pathlib.Path) -> int:
  """Of the complete checkpoints; 0 without."""
  names = (path.name for path in (workdir / "checkpoints").glob("*"))
  return max((int(name) for name in names if name.isdigit()), default=0)


class Reader:
  """The images that a run reads from its beginning, and from any step on."""

  def __init__(self, config: str, steps: int, workdir: pathlib.Path):
    flag = config_flags.DEFINE_config_file("config")
    more = IMAGES + steps  # the order of the images does not depend on the end
    flags = [f"--config={config}", *SETTINGS, f"--config.train.steps={more}"]
    sys.argv = ["resume", *flags]  # where config_flags looks
    absl.flags.FLAGS(sys.argv)
    data = open_prepared(prepared_directory(flag.value, workdir))
    store = open_proposals(flag.value, workdir, data)
    self._run = setup.set_up(flag.value, workdir, data=data, store=store)
    self._ids = data.splits["train"].image_ids
    self._all = []
    for first in sorted({0, self._run.warm_up_steps}):
      self._all += self._read(first)

  def _read(self, step: int) -> Iterator[list[str]]:
    for batch in setup.batches_from(self._run, step, load_images=False):
      yield [self._ids[i] for i in batch.image_index]

  def resumes_well(self, step: int) -> bool:
    """Whether the images from a step on are those of the whole run."""
    whole = itertools.chain.from_iterable(self._all[step:])
    resumed = self._read(step)
    if step < self._run.warm_up_steps:
      resumed = itertools.chain(resumed, self._read(self._run.warm_up_steps))
    resumed = itertools.chain.from_iterable(resumed)
    a, b = (list(itertools.islice(x, IMAGES)) for x in (whole, resumed))
    return len(a) == IMAGES and a == b


def verdict(differences: list[str]) -> str:
  """In words."""
  if not differences:
    return "bit-equal"
  return f"{len(differences)} DIFFER: {', '.join(differences[:3])}"


if __name__ == "__main__":
  main()
