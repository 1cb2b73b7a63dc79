"""Two processes, one workdir."""

import subprocess
import sys

import pytest

from jtsm_jax.train.claim import alone_in
from jtsm_jax.types import InputError

SCRIPT = """
import pathlib, sys
from jtsm_jax.train.claim import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
  print("claimed", flush=True)
  sys.stdin.read()
"""


def test_a_second_one_is_refused_until_the_first_has_gone(tmp_path):
  first = subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert first.stdout.readline() == "claimed\n"
  refused = pytest.raises(InputError, match="another process trains there")
  with refused, alone_in(tmp_path):
    pytest.fail("claimed twice")
  first.kill()  # it cannot take its claim back itself
  first.communicate()
  with alone_in(tmp_path):
    pass
