"""What main.py does around a run."""

import errno
import os
import subprocess
import sys
import textwrap
import types

import pytest
from absl import flags
from absl.testing import flagsaver

import main
from jtsm_jax import run


def test_a_signal_dropped_before_training_is_raised_again():
  """Python drops what is raised in a callback of the garbage collector."""
  program = textwrap.dedent("""
    import gc, os, signal, time
    import main

    def callback(phase, info):
      if phase == "stop":
        os.kill(os.getpid(), signal.SIGTERM)

    received = main._terminate_as_interrupt()
    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)
    try:
      time.sleep(60)
    except KeyboardInterrupt:
      print("raised again:", received == [signal.SIGTERM])
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
