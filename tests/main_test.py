"""What main.py does around a run."""

import subprocess
import sys
import textwrap


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
