"""The command on small files: panopticapi's values, and faults of its input."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.evaluation import panoptic_command
from jtsm_jax.types import InputError
from tests.evaluation import panopticapi_cases
from tests.evaluation.panoptic_quality_test import check_against_panopticapi

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("panoptic")
  panopticapi_cases.write_files(
    folder, panopticapi_cases.random_pairs(), panopticapi_cases.CATEGORIES
  )
  return folder


def run(*flags):
  return subprocess.run(
    [sys.executable, "-m", "jtsm_jax.evaluation.panoptic_quality", *flags],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
  )


def test_the_command_gives_the_values_of_panopticapi(files, tmp_path):
  # A file of results has annotations alone.
  content = json.loads((files / "pred.json").read_text())
  results = tmp_path / "results.json"
  results.write_text(json.dumps({"annotations": content["annotations"]}))
  done = run(
    f"--gt_json={files / 'gt.json'}",
    f"--gt_folder={files / 'gt'}",
    f"--pred_json={results}",
    f"--pred_folder={files / 'pred'}",
    f"--output={tmp_path / 'out.json'}",
    "--num_workers=2",
  )
  assert done.returncode == 0, done.stderr
  with np.load(panopticapi_cases.RANDOM_PAIRS) as stored:
    expected = json.loads(str(stored["result"]))
  check_against_panopticapi(
    json.loads((tmp_path / "out.json").read_text()),
    expected,
    panopticapi_cases.CATEGORIES,
  )
  lines = done.stdout.splitlines()
  rows = {line.split("|")[0].strip(): line for line in lines if "|" in line}
  assert rows[""].split() == ["|", "PQ", "SQ", "RQ", "N"]
  for name in ("All", "Things", "Stuff"):
    values = [f"{100 * expected[name][m]:.1f}" for m in ("pq", "sq", "rq")]
    assert rows[name].split("|")[1].split() == [
      *values,
      str(expected[name]["n"]),
    ]
  assert sum(line.startswith("class ") for line in lines) == 6


def test_folders_default_to_the_names_of_the_files(files, capsys):
  panoptic_command.main(
    [
      f"--gt_json_file={files / 'gt.json'}",
      f"--pred_json_file={files / 'pred.json'}",
      "--num_workers=0",
    ]
  )
  rows = [x for x in capsys.readouterr().out.splitlines() if "|" in x]
  pq = compare(files).result()["all"]["pq"]
  assert rows[1].split()[2] == f"{pq:.1f}"


def compare(folder, prediction="pred.json"):
  return panoptic_command.compare_files(
    folder / "gt.json",
    folder / "gt",
    folder / prediction,
    folder / "pred",
    num_workers=0,
  )


def edited(folder, edit):
  """The prediction's JSON after `edit(annotations)`, beside it."""
  content = json.loads((folder / "pred.json").read_text())
  edit(content["annotations"])
  (folder / "edited.json").write_text(json.dumps(content))
  return "edited.json"


def set_category(annotations):
  segments = next(a["segments_info"] for a in annotations if a["segments_info"])
  segments[0]["category_id"] = 999


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda a: a.pop(3), "no prediction for 1 of 500 images, e.g. image_id 4"),
    (set_category, "category_id 999, which is none of"),
    (lambda a: a.append(a[0]), "image_id 1 .*twice"),
    (lambda a: a[0]["segments_info"].pop(), r"only in the PNG \[\d+\]"),
    (lambda a: a[0].update(file_name="none.png"), "none.png: no such file"),
  ],
)
def test_a_fault_is_named(files, edit, message):
  with pytest.raises(InputError, match=message):
    compare(files, edited(files, edit))


def test_an_unlike_size_names_the_image(files, tmp_path):
  def to_one_pixel(annotations):
    annotations[0].update(file_name="one.png", segments_info=[])

  Image.new("RGB", (1, 1)).save(files / "pred" / "one.png")
  with pytest.raises(InputError, match=r"image_id 1: .*\(1, 1\).*resize"):
    compare(files, edited(files, to_one_pixel))


def test_further_predictions_are_left_out_with_a_word(files, capsys):
  def add(annotations):
    annotations.append(annotations[0] | {"image_id": 501})

  counts = compare(files, edited(files, add))
  np.testing.assert_array_equal(counts.tp, compare(files).tp)
  assert "1 predictions are not counted" in capsys.readouterr().err


def test_a_fault_exits_with_2_and_one_message(files):
  done = run(
    f"--gt_json_file={files / 'gt.json'}", "--pred_json_file=nowhere.json"
  )
  assert done.returncode == 2
  assert "error: nowhere: no such folder" in done.stderr
  assert "Traceback" not in done.stderr
