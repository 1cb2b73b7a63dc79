"""Console helpers, on a stderr that is no terminal."""

import re

import pytest

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


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0.0 s"),
    (9.94, "9.9 s"),
    (9.96, "10 s"),
    (59.6, "1 min 00 s"),
    (185, "3 min 05 s"),
    (3599.7, "1 h 00 min"),
    (7620, "2 h 07 min"),
    (100800, "1 d 04 h"),
  ],
)
def test_format_duration(seconds, text):
  assert console.format_duration(seconds) == text
