"""Starts main.py as a user does and looks at what a user sees.

Runs share a compilation cache and, where it does not matter, prepared data. The
configuration is tests/configs/tiny.py.
"""

import contextlib
import ctypes
import gzip
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from array_record.python import array_record_module
from PIL import Image
from pycocotools import mask as mask_utils

from jtsm_jax.data.panoptic_files import decode_ids, write_panoptic
from jtsm_jax.data.shapes import SHAPES_CATEGORIES, shapes_source
from jtsm_jax.data.things import instances_of
from jtsm_jax.data.voc import VOC_NAMES
from jtsm_jax.proposals import store as stores

ROOT = pathlib.Path(__file__).parents[1]
TINY = "tests/configs/tiny.py"
LAST_STEP = 14  # 2 of the warm-up and 12 of training
NEVER = "--config.train.evaluate_every=0"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  return os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
  }


@pytest.fixture(scope="session")
def start(environment):
  """Starts main.py."""

  def function(workdir, *flags, config=TINY):
    return subprocess.Popen(
      [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}"]
      + [str(flag) for flag in flags],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return function


@pytest.fixture(scope="session")
def run(start):
  """Runs main.py to its end, which must be a good one: (stdout, stderr)."""

  def function(workdir, *flags, config=TINY):
    process = start(workdir, *flags, config=config)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out, err

  return function


@pytest.fixture(scope="session")
def fault(start):
  """Runs main.py, which must end with one message: the message."""

  def function(workdir, *flags, config=TINY):
    process = start(workdir, *flags, config=config)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    assert "Traceback" not in out + err
    messages = [x for x in err.splitlines() if x.startswith("error: ")]
    assert len(messages) == 1, err
    return err[err.index("error: ") :]

  return function


@pytest.fixture(scope="session")
def finished(run, tmp_path_factory):
  """(workdir, stdout, stderr) of a run of everything. Only to be read."""
  workdir = tmp_path_factory.mktemp("runs") / "finished"
  return workdir, *run(workdir)


@pytest.fixture(scope="session")
def prepared(finished):
  """Flags that take data and proposals from the finished run."""
  return (
    f"--config.data.prepared={finished[0] / 'data'}",
    f"--config.proposals.store={finished[0] / 'proposals'}",
  )


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def progress_only(err):
  """Whether every line counts something, and none is about the machine."""
  line = re.compile(r"[a-z ]+: \d+/\d+ \[.*\]")
  compiler = "cpu_aot_loader"  # on CPUs whose cached programs it doubts
  return [x for x in err.splitlines() if compiler not in x and x] == [
    x for x in err.splitlines() if line.fullmatch(x)
  ]


# What a run leaves behind.


def test_a_run_evaluates_every_class(finished):
  workdir, out, _ = finished
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  assert metrics["step"] == LAST_STEP
  assert metrics["settings"]["nms_iou"] == 0.5
  for group, classes in (("all", 12), ("things", 8), ("stuff", 4)):
    assert {"pq", "sq", "rq", "n"} <= metrics[group].keys()
    assert 0 < metrics[group]["n"] <= classes
  assert list(metrics["per_class"]) == list(SHAPES_CATEGORIES.names)
  for values in metrics["per_class"].values():
    assert {"pq", "sq", "rq", "tp", "fp", "fn"} <= values.keys()
  assert 0 <= metrics["semantic"]["miou"] <= 100
  overlays = sorted((workdir / "evaluation" / "overlays").glob("*.jpg"))
  assert len(overlays) == 1
  mined = list((workdir / "mining").glob("*.jpg"))
  assert mined  # the images of the last training batch
  for overlay in [*overlays, *mined]:
    assert np.asarray(Image.open(overlay)).std() > 0
  for name in SHAPES_CATEGORIES.names:
    assert name in out


@pytest.mark.parametrize("task", ["instance", "detection"])
def test_the_other_tasks(task, run, fault, tmp_path):
  workdir = tmp_path / "run"
  out, _ = run(workdir, f"--config.task={task}", "--config.train.steps=9")
  assert "12 train, 6 val images, 8 classes" in out  # no stuff
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  assert metrics["task"] == task
  assert len(metrics["voc"]["per_class"]) == 8
  assert 0 <= metrics["coco"]["ap"] <= 100
  main = {"instance": "map50", "detection": "map"}[task]
  logged = lines(workdir)
  assert [x["step"] for x in logged if f"val/{main}" in x] == [8, 11]
  terms = {k for x in logged for k in x if k.startswith("loss/")}
  assert "loss/semantic" not in terms
  assert ("loss/instance" in terms) == (task == "instance")
  message = fault(workdir)
  assert f"config.task = 'panoptic', there '{task}'" in message


def test_a_trained_model_is_exported(finished, run):
  out, _ = run(finished[0], "--mode=export")
  folder = finished[0] / "export"
  assert f"model      {folder} (docs/export.md" in out
  content = json.loads((folder / "model.json").read_text())
  assert set(content["functions"]) == {"score-64x64", "masks-64x64"}
  assert [c["name"] for c in content["classes"]] == list(
    SHAPES_CATEGORIES.names
  )
  assert len(content["calibration"]["tag_threshold"]) == 12
  assert (folder / "score-64x64.stablehlo").stat().st_size > 1000


def test_a_run_logs_each_interval_once(finished):
  logged = lines(finished[0])
  steps = [x["step"] for x in logged if "loss/total" in x]
  assert steps == list(range(2, LAST_STEP + 1, 2))
  assert evaluated_steps(finished[0]) == [8, LAST_STEP]
  evaluated = [x for x in logged if "val/pq" in x]
  metrics = json.loads((finished[0] / "evaluation/metrics.json").read_text())
  assert evaluated[-1]["val/pq"] == metrics["all"]["pq"]
  assert evaluated[-1]["val/miou"] == metrics["semantic"]["miou"]
  terms = {k for x in logged for k in x if k.startswith("loss/")}
  names = "tags", "mil", "refinement_1", "refinement_2", "instance", "semantic"
  assert terms == {f"loss/{name}" for name in (*names, "total")}
  assert all(np.isfinite(x[k]) for x in logged for k in x)


def test_the_console_ends_with_the_results(finished):
  _, out, err = finished
  assert progress_only(err), err
  for stage in ("prepare", "propose", "train", "calibrate", "evaluate"):
    assert f"\n{stage}" in f"\n{err}"
  ending = out[out.rindex("mIoU") :].split()
  assert [x for x in ending if x in ("figures", "pictures", "next")] == [
    "figures",
    "pictures",
    "next",
  ]
  paths = [x for x in ending if x.startswith("/")]
  assert len(paths) >= 2
  assert all(pathlib.Path(x).exists() for x in paths)
  assert ending[-1] == "--input=FOLDER_OF_IMAGES"


def test_the_same_command_again_only_evaluates(finished, run):
  workdir, out, _ = finished
  before = (workdir / "metrics.jsonl").read_text()
  checkpoint = workdir / "checkpoints" / str(LAST_STEP)
  written = checkpoint.stat().st_mtime_ns
  out_again, err = run(workdir)
  table = out[out.rindex("  PQ") :].splitlines()
  assert out_again[out_again.rindex("  PQ") :].splitlines() == table
  assert (workdir / "metrics.jsonl").read_text() == before
  assert checkpoint.stat().st_mtime_ns == written
  assert "prepare" not in err
  assert "propose" not in err
  assert progress_only(err), err


# Prediction.


def test_quality_of_the_proposals(finished, run):
  out, _ = run(finished[0], "--mode=proposal_quality")
  folder = finished[0] / "proposal_quality"
  found = json.loads((folder / "quality.json").read_text())
  things = found["groups"]["things"]
  assert things["segments"] > 0
  assert 0.3 < things["J_i"][-1] <= 1
  assert sorted(things["J_i"]) == things["J_i"]  # more proposals cover more
  assert (folder / "quality.png").is_file()
  assert list((folder / "images").glob("*.jpg"))
  assert f"{things['J_i'][-1]:.3f}" in out


def test_report(finished, run):
  out, err = run(finished[0], "--mode=report", "--config.report.images=4")
  assert progress_only(err), err
  page = finished[0] / "report" / "index.html"
  assert out.split()[-2:] == ["report", str(page)]
  content = report_content(page)
  metrics = json.loads((finished[0] / "evaluation/metrics.json").read_text())
  assert content["metrics"] == metrics
  shown = {s["key"]: s["images"] for s in content["sections"]}
  assert {k: len(images) for k, images in shown.items()} == {
    "val": 4,
    "train": 12,
  }
  assert all(0 <= image["pq"] <= 100 for image in shown["val"])
  assert "4 of 6 images" in content["sections"][0]["note"]
  for image in [*shown["val"], *shown["train"]]:
    for group in image["groups"]:
      for picture in group["pictures"]:
        assert np.asarray(Image.open(page.parent / picture["file"])).std() > 0


def report_content(page):
  """What the page of a report shows."""
  data = r'<script type="application/json" id="data">(.*?)</script>'
  return json.loads(re.search(data, page.read_text(), re.DOTALL).group(1))


def test_shards_of_the_proposals(run, fault, tmp_path):
  for shard in (1, 0):
    run(
      tmp_path / "run", "--mode=propose", "--num_shards=2", f"--shard={shard}"
    )
  stores = list((tmp_path / "run" / "proposals").glob("*/*"))
  assert len(stores) == 1
  files = sorted(f.name for f in stores[0].glob("*.array_record"))
  assert {name[:14] for name in files} == {"proposals-0000", "proposals-0001"}


def test_flags_of_shards(fault, tmp_path):
  for flags, message in {
    ("--mode=train", "--num_shards=2"): "--num_shards is for",
    ("--mode=train", "--beam=--runner=X"): "--beam is for",
    ("--mode=prepare", "--beam=--runner=X"): "give --num_shards=N",
    ("--mode=prepare", "--num_shards=2", "--beam=x", "--shard=0"): "no --shard",
  }.items():
    assert message in fault(tmp_path / "run", *flags)
  assert "must be a folder of this machine" in fault("gs://bucket/run")
  assert not (tmp_path / "run").exists()


def test_data_at_a_url(run, fault, tmp_path):
  data = f"--config.data.prepared=file://{tmp_path}/data"
  run(tmp_path / "run", "--mode=prepare", data)
  assert (tmp_path / "data" / "prepared.json").is_file()
  assert not (tmp_path / "run" / "data").exists()
  run(tmp_path / "run", "--mode=verify", data)
  assert "no such kind of URL" in fault(
    tmp_path / "run", "--config.data.prepared=nope://b/data"
  )


def test_audit_and_verify(finished, run):
  out, _ = run(finished[0], "--mode=audit")
  assert out.splitlines()[1].split() == [
    *("train", "images", "12", "image,", "image_id,", "tags")
  ]
  assert "train" not in " ".join(out.splitlines()[2:-1])
  assert out.splitlines()[-1].startswith("training records hold image, id")
  out, _ = run(finished[0], "--mode=verify")
  assert out.endswith("data: every record is as it was prepared\n")


def test_data_prepared_in_shards(run, fault, tmp_path):
  workdir = tmp_path / "run"
  shards = ["--mode=prepare", "--num_shards=2"]
  out, _ = run(workdir, *shards, "--shard=1")
  assert "shard 1 of 2 is written" in out
  assert "prepared.json is missing" in fault(workdir, "--mode=audit")
  out, _ = run(workdir, *shards, "--shard=0")
  assert "images of 'train' by number of tags" in out
  # Damage of one byte in an image is found and named.
  (file,) = (workdir / "data" / "images").glob("data-train*")
  data = bytearray(file.read_bytes())
  data[data.rindex(b"\xff\xd8\xff\xe0") + 300] ^= 64
  file.write_bytes(data)
  message = fault(workdir, "--mode=verify")
  assert "data: 1 bad records" in message
  assert "below --num_shards" in fault(workdir, *shards, "--shard=2")


def test_predict_a_folder(finished, run, tmp_path):
  images = tmp_path / "holiday"
  images.mkdir()
  random = np.random.default_rng(0)
  sizes = {"a.jpg": (50, 70), "b c.png": (90, 40), "d.JPEG": (64, 64)}
  for name, size in sizes.items():
    pixels = random.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(images / name)
  whole = (images / "a.jpg").read_bytes()
  (images / "broken.jpg").write_bytes(whole[: len(whole) // 2])
  (images / "notes.txt").write_text("no image")
  out, err = run(finished[0], "--mode=predict", f"--input={images}")
  assert "broken.jpg" in err
  assert "notes.txt" not in err
  results = finished[0] / "predictions" / "holiday"
  content = check_panoptic(results, sizes)
  last = [line.split()[0] for line in out.splitlines() if line]
  assert last == [
    "predict:", "left", "panoptic", "classes", "instances", "boxes", "overlays"
  ]  # fmt: skip

  # Again, with another picture in the place of one of them.
  Image.new("RGB", (30, 20)).save(images / "a.jpg")
  _, err = run(finished[0], "--mode=predict", f"--input={images}")
  again = check_panoptic(results, sizes | {"a.jpg": (20, 30)})
  assert again["annotations"][1:] == content["annotations"][1:]
  assert "propose: 1/3" not in err  # the others were not proposed again
  assert "propose" in err

  # Once more: nothing is left to do, and nothing changes.
  before = {p: p.stat().st_mtime_ns for p in results.rglob("*.*")}
  (images / "broken.jpg").unlink()
  out, err = run(
    finished[0],
    "--mode=predict",
    f"--input={images}",
    "--config.evaluation.batch_size=1",
    "--config.evaluation.pictures=2",
    "--config.evaluation.proposal_block=8",
    "--config.evaluation.voc_metric=11point",
  )
  assert "predict: 3 images, 3 of them done" in out
  assert "propose" not in err
  after = {p: p.stat().st_mtime_ns for p in results.rglob("*.*")}
  assert {p for p in after if after[p] != before.get(p)} == {
    results / f"{name}.json"
    for name in ("panoptic", "instances", "detections", "classes")
  }


def test_other_weights_of_the_same_step(finished, run, fault, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  Image.new("RGB", (40, 30), (80, 90, 20)).save(tmp_path / "a.png")
  predict = "--mode=predict", f"--input={tmp_path / 'a.png'}"
  run(workdir, *predict)
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "metrics.jsonl").unlink()
  run(workdir, "--mode=train", "--config.seed=1", NEVER)
  assert last_checkpoint(workdir) == LAST_STEP
  seed = "--config.seed=1"
  assert "calibration.json was made with" in fault(workdir, *predict, seed)
  shutil.copy(workdir / "evaluation" / "metrics.json", tmp_path)
  run(workdir, "--mode=evaluate", seed)
  out, _ = run(workdir, *predict, seed)
  assert "predict: 1 images, 0 of them done" in out
  shutil.copy(tmp_path / "metrics.json", workdir / "evaluation")
  assert "other weights of step" in fault(workdir, "--mode=report", seed)


def test_predict_a_pattern_or_an_image(finished, run, tmp_path):
  for n in range(3):
    Image.new("RGB", (40, 30), (80 * n, 90, 20)).save(tmp_path / f"p{n}.png")
  run(finished[0], "--mode=predict", f"--input={tmp_path}/p[01].png")
  results = finished[0] / "predictions" / tmp_path.name
  assert len(list((results / "records").iterdir())) == 2
  out, _ = run(finished[0], "--mode=predict", f"--input={tmp_path}/p1.png")
  assert "predict: 1 images, 1 of them done" in out
  # What was predicted before stays in the JSON; a folder counts as it is.
  content = json.loads((results / "panoptic.json").read_text())
  assert [x["file_name"] for x in content["images"]] == ["p1.png", "p0.png"]
  (tmp_path / "p0.png").unlink()
  run(finished[0], "--mode=predict", f"--input={tmp_path}")
  content = json.loads((results / "panoptic.json").read_text())
  names = [x["file_name"] for x in content["images"]]
  assert names == ["p1.png", "p2.png"]


def test_a_folder_that_has_changed(run, fault, folder, tmp_path):
  mine_too = tmp_path / "mine"
  shutil.copytree(folder, mine_too)
  workdir = tmp_path / "run"
  run(workdir, *mine(mine_too), "--mode=prepare")
  run(workdir, *mine(mine_too), "--mode=prepare")
  image = next((mine_too / "images").iterdir())
  with image.open("ab") as file:
    file.write(b"x")
  message = fault(workdir, *mine(mine_too), "--mode=prepare")
  assert f"{mine_too}: has changed since {workdir / 'data'}" in message
  shutil.rmtree(workdir / "data")
  run(workdir, *mine(mine_too), "--mode=prepare")


def check_panoptic(results, sizes):
  """The JSON, the PNG files and the overlays tell of the same segments."""
  content = json.loads((results / "panoptic.json").read_text())
  images = {x["id"]: x for x in content["images"]}
  assert {x["file_name"] for x in content["images"]} == sizes.keys()
  assert {x["image_id"] for x in content["annotations"]} == images.keys()
  classes = {x["id"] for x in content["categories"]}
  for annotation in content["annotations"]:
    image = images[annotation["image_id"]]
    with Image.open(results / "panoptic" / annotation["file_name"]) as file:
      ids = decode_ids(np.asarray(file.convert("RGB")))
    assert ids.shape == sizes[image["file_name"]]
    assert ids.shape == (image["height"], image["width"])
    found, areas = np.unique(ids[ids > 0], return_counts=True)
    listed = {x["id"]: x["area"] for x in annotation["segments_info"]}
    assert listed == dict(zip(found.tolist(), areas.tolist(), strict=True))
    assert {x["category_id"] for x in annotation["segments_info"]} <= classes
  assert len(list((results / "overlays").glob("*.jpg"))) == len(sizes)
  return content


# A run that is killed.


def kill_at(process, workdir, step):
  """Kills a run as soon as the checkpoint of a step is complete."""
  checkpoint = workdir / "checkpoints" / str(step)
  limit = time.monotonic() + 200
  while not checkpoint.is_dir():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < limit
    time.sleep(0.005)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  return last_checkpoint(workdir)


def last_checkpoint(workdir):
  names = (x.name for x in (workdir / "checkpoints").iterdir())
  return max(int(name) for name in names if name.isdigit())


def kill_in_a_save(process, workdir):
  """Kills a run as soon as it writes a checkpoint: the last complete one."""
  limit = time.monotonic() + 200
  while not any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < limit
    time.sleep(0.001)
  process.kill()
  process.communicate()
  return last_checkpoint(workdir)


def interrupt_at(process, number, *, line, skip=0):
  """Sends a signal when stdout or stderr has a line: (stdout, exit code).

  The other one of the two must fit into a pipe until then. The first `skip`
  lines that begin so are passed over.
  """
  stream = process.stderr if ": 0/" in line else process.stdout
  found = (x for x in stream if x.startswith(line))
  if not next(itertools.islice(found, skip, None), None):
    pytest.fail(f"ended without {line!r}: {process.communicate()}")
  process.send_signal(number)
  sent = time.monotonic()
  out, err = process.communicate()
  assert time.monotonic() - sent < 30
  assert "Traceback" not in out + err
  return out + err, process.returncode


def everything_in(checkpoint):
  """All arrays of a checkpoint by name."""
  arrays = {}
  for item in ("state", "in_flight"):
    with ocp.PyTreeCheckpointer() as checkpointer:
      shapes = checkpointer.metadata(checkpoint / item).item_metadata.tree
      tree = checkpointer.restore(
        checkpoint / item,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
        ),
      )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  return arrays


def assert_same_end(workdir, other):
  """Two runs have the same last checkpoint and logged the same losses."""
  a, b = (
    everything_in(x / "checkpoints" / str(LAST_STEP)) for x in (workdir, other)
  )
  assert a.keys() == b.keys()
  assert any("opt_state" in name for name in a)
  assert all(np.isfinite(x).all() for x in a.values())
  assert [n for n in a if a[n].tobytes() != b[n].tobytes()] == []
  losses = [
    {x["step"]: x["loss/total"] for x in lines(y) if "loss/total" in x}
    for y in (workdir, other)
  ]
  shared = losses[0].keys() & losses[1].keys()
  assert LAST_STEP in shared
  # The mean of an interval that a kill has cut is that of its second part.
  assert losses[0][LAST_STEP] == losses[1][LAST_STEP]
  return a


def test_a_killed_run_ends_like_one_that_was_not(
  finished, prepared, start, run, tmp_path
):
  workdir = tmp_path / "killed"
  # It saves after each step and evaluates elsewhere: that must not matter.
  often = "--config.train.checkpoint_every=1", "--config.train.evaluate_every=9"
  process = start(workdir, "--mode=train", *often, *prepared)
  stopped = kill_at(process, workdir, 8)
  assert 8 <= stopped < LAST_STEP
  out, err = run(workdir, "--mode=train", *often, *prepared)
  assert f"going on from step {stopped} of {LAST_STEP}" in out
  assert f"train: {stopped}/{LAST_STEP}" in err
  arrays = assert_same_end(workdir, finished[0])
  assert arrays["in_flight['count']"] == 0
  steps = [x["step"] for x in lines(workdir) if "loss/total" in x]
  assert steps == list(range(2, LAST_STEP + 1, 2))


def test_kills_in_the_warm_up_and_with_masks_in_flight(
  finished, prepared, start, run, tmp_path
):
  config = f"{TINY}:frozen"
  whole, workdir = tmp_path / "whole", tmp_path / "killed"
  average = "--config.train.ema_decay=0.9"
  run(whole, "--mode=train", NEVER, average, *prepared, config=config)
  # The killed one never has the masks of the validation images.
  data = tmp_path / "data"
  shutil.copytree(finished[0] / "data", data)
  shutil.rmtree(data / "panoptic")
  flags = (
    "--mode=train",
    NEVER,
    average,
    "--config.train.checkpoint_every=1",
    f"--config.data.prepared={data}",
    prepared[1],
  )
  process = start(workdir, *flags, config=config)
  assert 1 <= kill_at(process, workdir, 1) <= 2
  # Stopped in the calibration between the warm-up and the mining.
  process = start(workdir, *flags, config=config)
  said, code = interrupt_at(process, signal.SIGTERM, line="set up: 0/")
  assert code == 0
  assert "stopped and saved; the same command goes on from here" in said
  assert last_checkpoint(workdir) == 2
  process = start(workdir, *flags, config=config)
  stopped = kill_at(process, workdir, 4)
  assert 4 <= stopped < LAST_STEP
  at_kill = everything_in(workdir / "checkpoints" / str(stopped))
  assert at_kill["in_flight['count']"] == 2
  assert at_kill["in_flight['mined'][1]['valid']"].any()
  # Again, while a checkpoint is being written, and by SIGTERM.
  process = start(workdir, *flags, config=config)
  again = kill_in_a_save(process, workdir)
  assert stopped <= again <= LAST_STEP
  process = start(workdir, *flags, config=config)
  said, code = interrupt_at(
    process, signal.SIGTERM, line="train: going on from step"
  )
  assert code == 0
  assert "stopped and saved; the same command goes on from here" in said
  stopped = last_checkpoint(workdir)
  assert again <= stopped < LAST_STEP
  out, _ = run(workdir, *flags, config=config)
  assert f"going on from step {stopped} of {LAST_STEP}" in out
  arrays = assert_same_end(workdir, whole)
  assert any("['ema']" in name for name in arrays)
  assert list((workdir / "features").rglob("*.f16"))


def test_signals_at_any_moment_lose_nothing(
  finished, prepared, start, run, tmp_path
):
  workdir = tmp_path / "stopped"
  # The second evaluation is that of the last step.
  flags = "--mode=train", "--config.train.evaluate_every=7", *prepared

  def interrupt(number, line, **options):
    return interrupt_at(start(workdir, *flags), number, line=line, **options)

  # Before the first step.
  said, code = interrupt(signal.SIGTERM, "data: shapes")
  assert code == 0
  assert "stopped" in said
  # In a step, which is finished.
  said, code = interrupt(signal.SIGINT, "train: from step 2 on")
  assert code == 130
  assert "SIGINT: stops after this step" in said
  assert "stopped and saved" in said
  assert last_checkpoint(workdir) >= 3
  # In the evaluation of step 7, which the next one does again; then in the one
  # of the last step.
  for skip, step, before in ((0, 7, []), (1, LAST_STEP, [7])):
    said, code = interrupt(signal.SIGINT, "evaluate: 0/", skip=skip)
    assert code == 130
    assert last_checkpoint(workdir) == step
    assert evaluated_steps(workdir) == before
  out, _ = run(workdir, *flags)
  assert f"going on from step {LAST_STEP} of {LAST_STEP}" in out
  assert evaluated_steps(workdir) == [7, LAST_STEP]
  found = {x["step"]: x["val/pq"] for x in lines(workdir) if "val/pq" in x}
  best = max(found, key=found.get)  # of equal ones the first
  assert [p.name for p in (workdir / "best").iterdir()] == [str(best)]
  assert_same_end(workdir, finished[0])
  # Nothing is left to do.
  out, err = run(workdir, *flags)
  assert "going on" not in out
  assert "evaluate" not in err
  assert evaluated_steps(workdir) == [7, LAST_STEP]


def evaluated_steps(workdir):
  """The steps whose evaluation was logged."""
  return [x["step"] for x in lines(workdir) if "val/pq" in x]


def test_numbers_that_are_not_finite_stop_a_run(prepared, start, tmp_path):
  workdir = tmp_path / "spoilt"
  flags = "--mode=train", NEVER, "--config.train.learning_rate=1e4", *prepared
  for _ in range(2):  # the second one goes on from the last good checkpoint
    process = start(workdir, *flags, "--config.train.checkpoint_every=1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    step, images = re.search(
      r"error: step (\d+) gave no finite loss/.* its images were (.*?)\. Its",
      err,
    ).groups()
    kept = last_checkpoint(workdir)
    assert kept == int(step) - 1
    arrays = everything_in(workdir / "checkpoints" / str(kept))
    assert all(np.isfinite(x).all() for x in arrays.values())
    path = workdir / f"nonfinite_step_{step}.npz"
    assert str(path) in err
    with np.load(path) as batch:
      assert batch["batch/tags"].shape == (2, 12)
    report = json.loads(path.with_suffix(".json").read_text())
    assert str(report["images"]) == images
    assert "train_000" in images
    assert report["step"] == int(step)
  assert f"going on from step {kept} of" in out


def test_a_disk_that_fills_up_stops_a_run(
  finished, prepared, start, run, tmp_path
):
  workdir = tmp_path / "full"
  flags = "--mode=train", NEVER, "--config.train.checkpoint_every=1", *prepared
  process = start(workdir, *flags)
  limit = time.monotonic() + 200
  while not (workdir / "checkpoints" / "3").is_dir():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < limit
    time.sleep(0.005)
  # From now on no file can be longer than its first block.
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
  out, err = process.communicate(timeout=300)
  assert process.returncode == 2, out + err
  [message] = [x for x in err.splitlines() if x.startswith("error: ")]
  assert "File too large" in message
  assert "Free some space" in message
  assert str(workdir) in message
  kept = last_checkpoint(workdir)
  assert kept >= 3
  out, _ = run(workdir, *flags)
  assert f"going on from step {kept} of {LAST_STEP}" in out
  assert_same_end(workdir, finished[0])


def test_data_that_vanish(finished, folder, fault, start, run, tmp_path):
  # What is open can be read on; this run goes to its end.
  root, workdir, data, proposals = (
    tmp_path / name for name in ("mine", "run", "data", "proposals")
  )
  shutil.copytree(folder, root)
  flags = (
    *mine(root),
    NEVER,
    f"--config.data.prepared={data}",
    f"--config.proposals.store={proposals}",
  )
  process = start(workdir, "--mode=train", *flags)
  limit = time.monotonic() + 200
  while not (workdir / "checkpoints" / "5").is_dir():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < limit
    time.sleep(0.005)
  for path in (root, data, proposals):
    shutil.rmtree(path)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, out + err
  # But nothing can start without; the run itself is as it was.
  for mode in ("train", "evaluate"):
    assert f"{root}: no such folder" in fault(workdir, f"--mode={mode}", *flags)
  arrays = everything_in(workdir / "checkpoints" / str(LAST_STEP))
  assert all(np.isfinite(x).all() for x in arrays.values())


def test_damaged_proposals_are_named(finished, prepared, fault, tmp_path):
  # The record is read by a thread of the input pipeline.
  store = tmp_path / "proposals"
  shutil.copytree(finished[0] / "proposals", store)
  for file in store.rglob("*.array_record"):
    content = bytearray(file.read_bytes())
    content[200:300] = bytes(255 - x for x in content[200:300])
    file.write_bytes(content)  # the first record; the index is whole
  message = fault(
    tmp_path / "run",
    "--mode=train",
    NEVER,
    prepared[0],
    f"--config.proposals.store={store}",
  )
  assert re.match(
    r"error: proposal store .*: the record of image .* is dam", (message)
  )
  assert len(message.strip().splitlines()) == 1


def test_a_clock_that_jumps_and_a_trace(
  finished, prepared, environment, run, tmp_path
):
  workdir = tmp_path / "run"
  # After each line of metrics; not within a save, which Orbax would give up.
  jumping = """
import itertools, pathlib, runpy, sys, time
from jtsm_jax.train.metrics import MetricWriter
true, ahead, hours = time.time, 0, itertools.cycle([9, -30, 2])
time.time = lambda: true() + 3600 * ahead
write = MetricWriter.write
def write_and_jump(self, *args):
  global ahead
  write(self, *args)
  if not any(self._directory.glob("checkpoints/*tmp*")):
    ahead = next(hours)
    print("the clock jumps")
MetricWriter.write = write_and_jump
sys.argv = sys.argv[1:]
runpy.run_path("main.py", run_name="__main__")
"""
  flags = f"--config={TINY}", f"--workdir={workdir}", "--mode=train", NEVER
  ended = subprocess.run(
    [
      sys.executable,
      "-c",
      jumping,
      "main.py",
      *flags,
      *prepared,
      "--profile=4:6",
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ended.returncode == 0, ended.stderr
  assert_same_end(workdir, finished[0])
  assert last_checkpoint(workdir) == LAST_STEP
  assert ended.stdout.count("the clock jumps") > 2
  for line in lines(workdir):
    assert 0 < line["speed/images_per_second"] < 1000
    assert 0 <= line["speed/input_wait"] <= 1
  # The trace can be read as the message says.
  [said] = [x for x in ended.stdout.splitlines() if x.startswith("profile ")]
  assert "https://ui.perfetto.dev" in said
  pattern = said.split()[1].rstrip(":")
  [trace] = workdir.glob(os.path.relpath(pattern, workdir))
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert any("branch_gradients" in str(event.get("name")) for event in events)
  # One of steps that are not run any more does no harm.
  out, _ = run(workdir, *flags[2:], *prepared, "--profile=4:6")
  assert "profile " not in out


def test_a_run_needs_its_first_weights_only_once(
  finished, prepared, start, run, fault, tmp_path
):
  weights, workdir = tmp_path / "weights", tmp_path / "run"
  shutil.copytree(finished[0] / "checkpoints" / str(LAST_STEP), weights)
  flags = "--mode=train", NEVER, f"--init_from={weights}", *prepared
  often = "--config.train.checkpoint_every=1"
  assert 1 <= kill_at(start(workdir, *flags, often), workdir, 1) < LAST_STEP
  shutil.rmtree(weights)
  out, _ = run(workdir, *flags)
  assert "train: going on from step" in out
  assert "there is no checkpoint" in fault(tmp_path / "new", *flags)


def test_a_damaged_checkpoint_is_passed_over(finished, run, tmp_path):
  workdir = tmp_path / "damaged"
  shutil.copytree(finished[0], workdir)
  for file in (workdir / "checkpoints" / str(LAST_STEP) / "state").rglob("*"):
    if file.is_file():
      os.truncate(file, file.stat().st_size // 2)
  out, err = run(workdir)
  assert f"checkpoint {LAST_STEP} in {workdir / 'checkpoints'} is damaged" in (
    err
  )
  assert f"going on from step 10 of {LAST_STEP}" in out
  assert_same_end(workdir, finished[0])
  kept = {x.name for x in (workdir / "checkpoints").iterdir()}
  assert kept == {"10", str(LAST_STEP)}
  assert (workdir / "best" / "8").is_dir()  # with the best PQ
  assert (workdir / f"damaged_checkpoint_{LAST_STEP}").is_dir()


def test_only_damaged_checkpoints(finished, fault, tmp_path):
  workdir = tmp_path / "damaged"
  shutil.copytree(finished[0], workdir)
  for file in (workdir / "checkpoints").rglob("*"):
    if file.is_file() and "state" in file.parts:
      os.truncate(file, 0)
  for mode in ("train", "evaluate"):
    message = fault(workdir, f"--mode={mode}")
    assert f"{workdir / 'checkpoints'}: " in message
    assert "can be read" in message


# One's own folder, and what training reads of it.


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """The drawn pictures as a folder of one's own. Only to be read."""
  root = tmp_path_factory.mktemp("mine") / "pictures"
  (root / "images").mkdir(parents=True)
  (root / "classes.json").write_text(json.dumps(SHAPES_CATEGORIES.to_list()))
  source = shapes_source(seed=0, side=64, num_train=12, num_val=6)
  targets = []
  for split, records in source.splits.items():
    rows = ["image,tags"]
    for record in records:
      name = f"{record.image_id}.jpg"
      (root / "images" / name).write_bytes(record.image)
      tags = ";".join(SHAPES_CATEGORIES.names[t] for t in record.tags)
      rows.append(f"{name},{tags}")
      if record.target is not None:
        targets.append((record.image_id, name, record.target))
    (root / f"{split}_tags.csv").write_text("\n".join(rows) + "\n")
  write_panoptic(
    root / "panoptic_val.json",
    root / "panoptic_val",
    targets,
    source.categories,
  )
  return root


def mine(root):
  return "--config.data.name=folder", f"--config.data.root={root}"


@contextlib.contextmanager
def watch(*paths):
  """Yields a function that counts how often the paths were opened since."""
  libc = ctypes.CDLL(None, use_errno=True)
  if not hasattr(libc, "inotify_init1"):
    pytest.skip("the system has no inotify")
  descriptor = libc.inotify_init1(os.O_NONBLOCK)
  if descriptor < 0:
    pytest.skip("the kernel has no inotify")
  for path in paths:
    opened = 0x20  # IN_OPEN
    assert libc.inotify_add_watch(descriptor, os.fsencode(path), opened) >= 0

  def count():
    data = b""
    with contextlib.suppress(BlockingIOError):
      while True:
        data += os.read(descriptor, 1 << 16)
    number = 0
    while data:
      (length,) = struct.unpack_from("I", data, 12)
      data = data[16 + length :]
      number += 1
    return number

  try:
    yield count
  finally:
    os.close(descriptor)


def test_training_opens_no_mask(folder, run, tmp_path):
  workdir = tmp_path / "run"
  with watch(folder / "panoptic_val", folder / "panoptic_val.json") as opened:
    run(workdir, "--mode=propose", *mine(folder))
    assert opened() > 6  # preparing reads them: the watch sees it
    with watch(workdir / "data" / "panoptic") as opened_prepared:
      run(workdir, "--mode=train", NEVER, *mine(folder))
      assert opened() == 0
      assert opened_prepared() == 0
      run(workdir, "--mode=evaluate", NEVER, *mine(folder))
      assert opened() == 0
      assert opened_prepared() > 0


def test_a_broken_picture_is_reported_and_left_out(folder, run, tmp_path):
  root = tmp_path / "mine"
  shutil.copytree(folder, root)
  (root / "images" / "train_00003.jpg").write_bytes(b"\xff\xd8 no picture")
  (root / "val_tags.csv").unlink()  # and nothing to evaluate
  workdir = tmp_path / "run"
  flags = "--config.train.steps=1", "--config.train.images_every=0"
  out, err = run(workdir, *mine(root), *flags)
  assert "left out of train: train_00003: cannot be decoded" in err
  assert "train_00003" in (workdir / "data" / "quarantine.txt").read_text()
  assert "11 train images" in out
  assert "no ground truth" in out
  assert not (workdir / "mining").exists()
  # What prediction needs is there all the same.
  run(workdir, *mine(root), "--config.train.steps=1", "--mode=predict",
      f"--input={root / 'images'}")  # fmt: skip
  run(workdir, *mine(root), "--config.train.steps=1", "--mode=report")
  content = report_content(workdir / "report" / "index.html")
  assert content["metrics"] is None
  assert [len(s["images"]) for s in content["sections"]] == [11]


def test_instances_alone_as_ground_truth(folder, run, tmp_path):
  root, workdir = tmp_path / "mine", tmp_path / "run"
  shutil.copytree(folder, root)
  shutil.rmtree(root / "panoptic_val")
  (root / "panoptic_val.json").unlink()
  records = shapes_source(seed=0, side=64, num_train=12, num_val=6)
  images, annotations = [], []
  for n, record in enumerate(records.splits["val"]):
    size, found = record.target.ids.shape, instances_of(record.target)
    name = f"{record.image_id}.jpg"
    images.append(
      {"id": n, "file_name": name, "height": size[0], "width": size[1]}
    )
    for k, area, rle in zip(
      found.category, found.area, found.rles, strict=True
    ):
      mask = {"size": list(size), "counts": rle.decode()}
      annotations.append(
        {
          "id": len(annotations),
          "image_id": n,
          "category_id": SHAPES_CATEGORIES.items[k].id,
          "bbox": mask_utils.toBbox(mask).tolist(),
          "area": area,
          "segmentation": mask,
        }
      )
  truth = {
    "images": images,
    "annotations": annotations,
    "categories": SHAPES_CATEGORIES.to_list(),
  }
  (root / "instances_val.json").write_text(json.dumps(truth))
  flags = *mine(root), "--config.train.steps=2", "--config.warm_up.steps=0"
  out, _ = run(workdir, *flags, "--config.train.evaluate_every=2")
  assert "measured as 'instance': for 'panoptic' val lacks" in out
  assert out.count("masks of things, COCO: AP") == 2  # once while it trains
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  assert metrics["task"] == "instance"
  assert metrics["coco"]["objects"]["all"] == len(annotations) > 6
  assert "val/map50" in lines(workdir)[-1]
  run(workdir, *flags, "--mode=report")
  content = report_content(workdir / "report" / "index.html")
  assert content["metrics"] == metrics
  assert [len(s["images"]) for s in content["sections"]] == [6, 12]


def test_voc_without_public_ground_truth(run, tmp_path):
  """VOC 2012: CorLoc of the training images, and boxes for the server."""
  voc, workdir = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "run"
  for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
    (voc / name).mkdir(parents=True)
  source = shapes_source(seed=0, side=64, num_train=3, num_val=6)
  listed = {"train": "test", "val": "trainval"}  # only "val" has boxes
  for split, records in source.splits.items():
    ids = [record.image_id for record in records]
    (voc / "ImageSets" / "Main" / f"{listed[split]}.txt").write_text(
      "\n".join(ids)
    )
    for record in records:
      name = record.image_id
      (voc / "JPEGImages" / f"{name}.jpg").write_bytes(record.image)
      if record.target is None:
        continue
      found = instances_of(record.target)
      objects = [
        f"<object><name>{VOC_NAMES[k]}</name><bndbox><xmin>{x0 + 1}</xmin>"
        f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        "</object>"
        for k, (y0, x0, y1, x1) in zip(found.category, found.boxes, strict=True)
      ]
      (voc / "Annotations" / f"{name}.xml").write_text(
        f"<annotation>{''.join(objects)}</annotation>"
      )
  flags = (
    "--config.task=detection",
    "--config.data.name=voc_detection",
    "--config.data.year=2012",
    f"--config.data.root={voc.parent}",
    "--config.train.steps=2",
    "--config.warm_up.steps=0",
    "--config.reestimation.start=0",
  )
  run(workdir, "--mode=propose", *flags)
  with watch(workdir / "data" / "instances") as opened:
    run(workdir, "--mode=train", *flags)
    assert opened() == 0
    out, _ = run(workdir, "--mode=evaluate", *flags)
    assert opened() > 0
  assert "there is no ground truth of validation images" in out
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  assert metrics["split"] == "corloc"
  assert 0 <= metrics["corloc"]["corloc"] <= 100
  seen = [v["images"] for v in metrics["corloc"]["per_class"].values()]
  assert sum(seen) >= 6
  assert f"{metrics['corloc']['corloc']:.1f}" in out
  files = workdir / "evaluation" / "results" / "VOC2012" / "Main"
  assert f"server     {files}" in out
  rows = []
  for name in VOC_NAMES:
    text = (files / f"comp4_det_test_{name}.txt").read_text()
    rows += [line.split() for line in text.splitlines()]
  test = [record.image_id for record in source.splits["train"]]
  assert {row[0] for row in rows} == set(test)
  for _, _, x0, y0, x1, y1 in rows:
    assert 1 <= float(x0) <= float(x1) <= 64
    assert 1 <= float(y0) <= float(y1) <= 64
  run(workdir, "--mode=report", *flags)
  content = report_content(workdir / "report" / "index.html")
  assert content["metrics"] == metrics
  assert [s["key"] for s in content["sections"]] == ["train"]


def test_an_image_that_the_store_lacks_is_proposed(
  finished, prepared, run, tmp_path
):
  store = tmp_path / "proposals"
  shutil.copytree(finished[0] / "proposals", store)
  (settings,) = store.glob("*/*")
  opened = stores.open_store(settings)
  assert len(opened) == 18
  kept = []
  for shard in sorted(settings.glob("*.array_record")):
    reader = array_record_module.ArrayRecordReader(str(shard))
    records = reader.read_all()
    kept += zip(json.loads(records[-1]), records[:-1], strict=True)
    reader.close()
    shard.unlink()
  kept = [pair for pair in kept if pair[0] != "train_00005"]
  stores.write_shard(settings / "proposals-00000.array_record", kept)
  _, err = run(
    tmp_path / "run",
    "--mode=propose",
    prepared[0],
    f"--config.proposals.store={store}",
  )
  assert "propose: 12/12" in err
  assert len(stores.open_store(settings)) == 18


# Faults of the user: one message each.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--workdir=w"], "--config is missing"),
    ([f"--config={TINY}"], "--workdir is missing"),
    (["--config=no.py", "--workdir=w"], "No such file or directory: 'no.py'"),
    (
      ["--config=no.py", "--config.seed=1", "--workdir=w"],
      "No such file or directory: 'no.py'",
    ),
    (["--config=tests", "--workdir=w"], "Is a directory: 'tests'"),
    (["--config.nope=1"], "no such field: 'nope'"),
    (["--config.train.stepz=1"], 'Did you mean "steps"'),
    (["--config.train.steps=abc"], "--config.train.steps=abc: invalid literal"),
    (["--config.data.flip=perhaps"], "--config.data.flip=perhaps"),
    (["--config.train=7"], "--config.train=7"),
    (["--speed=9"], "Unknown command line flag 'speed'"),
    (["--mode=fly"], "value should be one of <all|prepare|"),
    (["fly"], "unknown argument 'fly'"),
    (
      ["--mode=predict"],
      "--mode=predict needs --input=FOLDER, an image or a pattern",
    ),
  ],
)
def test_wrong_flags(flags, message, tmp_path):
  if not any(x.startswith(("--workdir", "--config=")) for x in flags):
    flags = [f"--config={TINY}", f"--workdir={tmp_path}/w", *flags]
  began = time.monotonic()
  ended = subprocess.run(
    [sys.executable, "main.py", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2
  assert ended.stdout == ""
  (line,) = ended.stderr.strip().splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert time.monotonic() - began < 20
  assert not (tmp_path / "w").exists()


def test_flags_are_checked_before_jax_is_loaded():
  ended = subprocess.run(
    [sys.executable, "-X", "importtime", "main.py", f"--config={TINY}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  loaded = {x.split("|")[-1].strip() for x in ended.stderr.splitlines()}
  assert "--workdir is missing" in ended.stderr
  assert "ml_collections" in loaded
  assert not {"jax", "numpy", "jtsm_jax.types"} & loaded


def spoil(change):
  """A test case of a folder of one's own that `change` has spoilt."""

  def flags(folder, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(folder, root)
    change(root)
    return mine(root)

  return flags


def write(name, text):
  return spoil(lambda root: (root / name).write_text(text))


def break_pictures(root):
  for i in range(3):
    (root / "images" / f"train_{i:05d}.jpg").write_bytes(b"no picture")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (lambda *_: mine("no/where"), "no/where: no such folder"),
    (lambda *_: mine(""), "config.data.root is empty"),
    (lambda *_: ("--config.data.name=voc",), "config.data.name is 'voc'"),
    (write("train_tags.csv", "a,b\n"), "must name the columns image,tags"),
    (
      write("train_tags.csv", "image,tags\ntrain_00000.jpg,zebra\n"),
      "line 2: tag 'zebra' is no class",
    ),
    (
      write("train_tags.csv", "image,tags\nabsent.jpg,waves\n"),
      "line 2: image 'absent.jpg' is not in",
    ),
    (spoil(break_pictures), "3 of 18 images cannot be decoded"),
  ],
)
def test_wrong_data(flags, message, folder, fault, tmp_path):
  workdir = tmp_path / "run"
  assert message in fault(workdir, *flags(folder, tmp_path))


def test_a_failed_first_try_does_not_spoil_the_workdir(
  folder, fault, run, tmp_path
):
  workdir = tmp_path / "run"
  fault(workdir, *mine("no/where"))
  run(workdir, "--mode=prepare", *mine(folder))
  message = fault(workdir, "--mode=prepare", *mine("no/where"))
  found = f"config.data.root = '{ROOT / 'no' / 'where'}', there '{folder}'"
  assert found in message


def test_a_workdir_of_other_settings(finished, fault):
  message = fault(finished[0], "--config.train.learning_rate=0.5")
  assert "config.train.learning_rate = 0.5, there 0.001" in message


def test_nothing_is_trained_yet(prepared, fault, tmp_path):
  workdir = tmp_path / "run"
  (tmp_path / "images").mkdir()
  for flags in (
    ["--mode=evaluate"],
    ["--mode=report"],
    ["--mode=predict", f"--input={tmp_path / 'images'}"],
  ):
    assert "train first" in fault(workdir, *flags, *prepared)
  assert not workdir.exists()  # a mistyped name leaves nothing behind


def test_nothing_to_predict(finished, fault, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  for images, message in (
    (empty, "there is no image"),
    (tmp_path / "nowhere", "no such file or folder"),
  ):
    got = fault(finished[0], "--mode=predict", f"--input={images}")
    assert f"{images}: {message}" in got
