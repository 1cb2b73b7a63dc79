"""Two real processes on loopback equal one process with two devices."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAST_STEP = 14


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Starts main.py on the tiny configuration, with shared data."""
  shared = tmp_path_factory.mktemp("shared")
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
  }

  def function(workdir, *flags, devices=1):
    split = f" --xla_force_host_platform_device_count={devices}"
    command = [
      sys.executable,
      "main.py",
      "--config=tests/configs/tiny.py:frozen",
      f"--config.data.prepared={shared / 'data'}",
      f"--config.proposals.store={shared / 'proposals'}",
      "--config.data.shapes.num_val=2",
      "--config.train.ema_decay=0.9",
      f"--workdir={workdir}",
      *flags,
    ]
    return subprocess.Popen(
      command,
      cwd=ROOT,
      env=environment | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + split},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return function


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
  """The folder of a run of one process with two devices."""
  workdir = tmp_path_factory.mktemp("runs") / "one"
  for mode in ("propose", "train"):
    process = start(workdir, f"--mode={mode}", devices=2)
    finish(process)
  return workdir


def finish(process, *, code=0):
  out, err = process.communicate(timeout=400)
  assert process.returncode == code, out + err
  return out, err


def start_two(start, workdir):
  with contextlib.closing(socket.socket()) as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return [
    start(
      workdir,
      "--mode=train",
      "--distributed",
      f"--coordinator=localhost:{port}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i in range(2)
  ]


def arrays(checkpoint):
  """All arrays of a checkpoint by name."""
  found = {}
  for item in ("state", "in_flight"):
    with ocp.PyTreeCheckpointer() as checkpointer:
      shapes = checkpointer.metadata(checkpoint / item).item_metadata.tree
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
      )
      tree = checkpointer.restore(checkpoint / item, restore_args=as_numpy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  return found


def assert_same_end(workdir, other):
  a, b = (arrays(x / "checkpoints" / str(LAST_STEP)) for x in (workdir, other))
  assert a.keys() == b.keys()
  assert any("ema" in name for name in a)
  for name, value in a.items():
    # Of two addends, the sum does not depend on the order.
    np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_two_processes_are_as_one(start, one, tmp_path):
  processes = start_two(start, tmp_path / "two")
  (out, err), (quiet, quiet_err) = [finish(p) for p in processes]
  assert_same_end(tmp_path / "two", one)
  # The first one tells, the other one is quiet and does not evaluate.
  assert "the branches learn" in out
  assert [x for x in quiet.splitlines() if not x.startswith("[Gloo]")] == []
  assert f"train: {LAST_STEP}/{LAST_STEP}" in err
  assert not re.search(r"^[a-z ]+: \d+/\d+ \[", quiet_err, re.MULTILINE)
  metrics = (tmp_path / "two" / "metrics.jsonl").read_text()
  assert metrics.count('"val/pq"') == 1
  assert metrics.count('"val_averaged/pq"') == 1


def test_sigterm_to_one_stops_both_and_another_goes_on(start, one, tmp_path):
  workdir = tmp_path / "stopped"
  processes = start_two(start, workdir)
  limit = time.monotonic() + 300
  while not (workdir / "metrics.jsonl").exists() or not (
    (workdir / "metrics.jsonl").read_text()
  ):
    assert processes[0].poll() is None, processes[0].communicate()
    assert time.monotonic() < limit
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  for process in processes:
    finish(process)
  steps = [int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")]
  assert 2 <= max(steps) < LAST_STEP
  # On one host now: a checkpoint does not know how many wrote it.
  out, _ = finish(start(workdir, "--mode=train", devices=2))
  assert f"going on from step {max(steps)} of {LAST_STEP}" in out
  assert_same_end(workdir, one)


def test_what_several_processes_do_not_do(start, tmp_path):
  process = start(tmp_path / "none", "--mode=evaluate", "--distributed")
  _, err = finish(process, code=2)
  assert "--distributed is for --mode=train" in err
  process = start(
    tmp_path / "none", "--mode=train", "--distributed", "--num_processes=2"
  )
  _, err = finish(process, code=2)
  assert "--coordinator, --num_processes and --process_id go together" in err
  process = start(tmp_path / "none", "--mode=train", "--distributed")
  _, err = finish(process, code=2)
  assert "--coordinator=HOST:PORT" in err
  assert "Traceback" not in err
