"""What main.py does around a run."""

import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import types

import pytest
from absl import flags
from absl.testing import flagsaver

import main
from jtsm_jax import run


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_dropped_before_training_is_raised_again(name):
  """Python drops what is raised in a callback of the garbage collector."""
  program = textwrap.dedent(f"""
    import gc, os, signal, time
    import main

    def callback(phase, info):
      if phase == "stop":
        os.kill(os.getpid(), signal.{name})

    received = main._interrupt_at(signal.SIGINT, signal.SIGTERM)
    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)
    try:
      time.sleep(60)
    except KeyboardInterrupt:
      print("raised again:", received == [signal.{name}])
  """)
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
  )
  assert result.stdout.strip() == "raised again: True", result.stderr
  assert not result.stderr


@pytest.fixture
def fails(monkeypatch, tmp_path):
  """Calls main.py, whose run raises an error."""

  def function(error):
    def fail(*_, **__):
      raise error

    monkeypatch.setattr(run, "run", fail)
    with flagsaver.flagsaver():
      flags.FLAGS(["main.py", f"--workdir={tmp_path}", "--mode=prepare"])
      main.main(["main.py"])

  config = types.SimpleNamespace(name="config", value={"seed": 0})
  monkeypatch.setattr(main, "_CONFIG", config)
  monkeypatch.setattr(main, "_exit_at_once", sys.exit)
  monkeypatch.setattr(main, "_interrupt_at", lambda *_: [])
  yield function
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
  "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS]
)
def test_a_disk_that_cannot_be_written_is_one_message(
  fails, tmp_path, capsys, number
):
  reason = os.strerror(number)
  for error, place in [
    (OSError(number, reason, "DIR/train.lock"), "DIR/train.lock"),
    (OSError(number, reason), f"--workdir={tmp_path}"),
  ]:
    with pytest.raises(SystemExit) as exit:
      fails(error)
    assert exit.value.code == 2
    [message] = capsys.readouterr().err.strip().splitlines()
    assert message.startswith(f"error: {place}: {reason}; ")


def test_other_errors_keep_their_traceback(fails):
  with pytest.raises(FileNotFoundError, match="none"):
    fails(FileNotFoundError(errno.ENOENT, "there is none"))


@pytest.mark.parametrize(
  ("received", "code"),
  [([signal.SIGTERM], 0), ([signal.SIGINT], 130), ([], 130)],
)
def test_a_run_that_is_interrupted_says_by_what(
  fails, monkeypatch, capsys, received, code
):
  monkeypatch.setattr(main, "_interrupt_at", lambda *_: received)
  with pytest.raises(SystemExit) as end:
    fails(KeyboardInterrupt())
  assert end.value.code == code
  assert "the same command goes on" in capsys.readouterr().err


def test_what_is_not_installed_is_named(fails, monkeypatch, capsys):
  def fail(name):
    raise ImportError("No module named 'orbax'")

  monkeypatch.delattr("jtsm_jax.run")
  monkeypatch.delitem(sys.modules, "jtsm_jax.run")
  monkeypatch.setattr("jtsm_jax.__getattr__", fail, raising=False)
  with pytest.raises(SystemExit) as end:
    fails(None)
  assert end.value.code == 2
  assert "No module named 'orbax'; `make install`" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("def get_config(:", "cannot be loaded: invalid syntax"),
    ("import nothing_like_this", "cannot be loaded: No module named 'nothing"),
    (
      "from configs import folder\n\n\ndef get_config():\n"
      "  c = folder.get_config()\n  c.train.stepz = 3\n  return c\n",
      'no such field: .*stepz.*Did you mean "steps"',
    ),
    (
      "def get_config(row):\n  raise ValueError(f'row {row}: wanted a or b')\n",
      "error: --config: ValueError: row x: wanted a or b; see --help",
    ),
  ],
)
def test_a_file_of_settings_that_cannot_be_read_is_one_message(
  tmp_path, content, message
):
  path = tmp_path / "mine.py"
  path.write_text(content)
  result = _main(
    f"--config={path}:x" if "row" in content else f"--config={path}"
  )
  assert result.returncode == 2
  assert re.search(message, result.stderr), result.stderr
  assert "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) < 4


def test_a_field_of_several_values_is_given_once():
  canvases = "--config.evaluation.canvases=((160, 240),)"
  result = _main("--config=configs/folder.py", canvases, canvases)
  assert result.returncode == 2
  assert "--config.evaluation.canvases is given 2 times" in result.stderr
  steps = "--config.train.steps=3"
  result = _main("--config=configs/folder.py", steps, steps)
  assert "--workdir is missing" in result.stderr  # the last one counts


def _main(*flags):
  return subprocess.run(
    [sys.executable, "main.py", *flags],
    cwd=pathlib.Path(main.__file__).parent,
    capture_output=True,
    text=True,
    timeout=100,
  )
