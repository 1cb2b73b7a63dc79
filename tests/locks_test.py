"""Locks of one file, held twice; of processes in tests/train/claim_test.py."""

import errno
import fcntl
import threading

import pytest

from jtsm_jax.locks import exclusive
from jtsm_jax.types import InputError


def test_a_second_one_is_told_and_a_later_one_is_not(tmp_path):
  path = tmp_path / "lock"
  with (
    exclusive(path, busy="mine"),
    exclusive(tmp_path / "other", busy="?"),
    pytest.raises(InputError, match="yours"),
    exclusive(path, busy="yours"),
  ):
    pytest.fail("held twice")
  with exclusive(path, busy="free again"):
    pass


def test_without_a_message_a_second_one_waits(tmp_path):
  order = []

  def enter():
    with exclusive(tmp_path / "lock"):
      order.append("second")

  second = threading.Thread(target=enter)
  with exclusive(tmp_path / "lock"):
    second.start()
    second.join(timeout=0.2)
    order.append("first")
  second.join()
  assert order == ["first", "second"]


def test_where_nothing_can_be_locked_nobody_is_kept_out(tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.ENOLCK, "no locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  entered = []
  with exclusive(tmp_path / "lock", busy="?"):
    entered.append(1)
  assert entered
