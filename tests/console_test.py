"""Console helpers, on a stderr that is no terminal."""

import itertools
import re
import time

import jax
import tqdm

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


def test_a_clock_that_jumps_neither_silences_nor_speeds(capsys, monkeypatch):
  now, hours = [100.0], 3600.0
  walls = itertools.cycle([8 * hours, -9 * hours])
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  monkeypatch.setattr(tqdm.std, "time", lambda: now[0] + next(walls))
  monkeypatch.setattr(time, "time", lambda: now[0] + next(walls))
  with console.progress(description="train", total=8, unit="step") as bar:
    for _ in range(8):
      now[0] += 6  # so every second one is more than 10 s after a line
      bar.update()
  lines = capsys.readouterr().err.splitlines()
  assert [line.split()[1] for line in lines] == [
    "0/8",
    "2/8",
    "4/8",
    "6/8",
    "8/8",
  ]
  assert all("6.00s/step" in line for line in lines[1:])


def test_progress_writes_nothing_on_stdout(capsys):
  list(console.progress([1, 2], "x"))
  captured = capsys.readouterr()
  assert captured.out == ""
  assert "x: 2/2" in captured.err


def test_of_several_processes_the_first_one_shows_progress(capsys, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  for process, lines in enumerate([2, 0]):
    monkeypatch.setattr(jax, "process_index", lambda k=process: k)
    assert list(console.progress([7, 8], "x")) == [7, 8]
    with console.progress(description="y", total=1) as bar:
      bar.set_postfix_str("z", refresh=False)
      bar.update()
    err = capsys.readouterr().err
    assert err.count("x: ") == err.count("y: ") == lines


def test_progress_alone_does_not_start_the_devices(capsys, monkeypatch):
  monkeypatch.setattr(jax, "process_index", None)  # it would
  list(console.progress([1, 2], "x"))
  assert "x: 2/2" in capsys.readouterr().err
