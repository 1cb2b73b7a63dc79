"""Console helpers, on a stderr that is no terminal."""

import re

from jtsm_jax import console


def test_log_has_few_whole_lines(capsys):
  seen = list(console.progress(range(1000), "evaluate", unit="images"))
  assert seen == list(range(1000))
  log = capsys.readouterr().err
  lines = log.split("\n")
  assert "\r" not in log
  # The first and the last; nothing in between, for less than 10 s passed.
  assert [re.sub(r" \[.*", "", line) for line in lines if line] == [
    "evaluate: 0/1000",
    "evaluate: 1000/1000",
  ]
  assert "images/s" in lines[1]


def test_counting_by_update_goes_on_from_initial(capsys):
  with console.progress(
    description="train", total=10, initial=4, unit="steps"
  ) as bar:
    bar.update(6)
  log = capsys.readouterr().err
  assert "train: 4/10" in log
  assert "train: 10/10" in log


def test_progress_writes_nothing_on_stdout(capsys):
  list(console.progress([1, 2], "x"))
  captured = capsys.readouterr()
  assert captured.out == ""
  assert "x: 2/2" in captured.err
