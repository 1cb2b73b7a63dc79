"""Signals that this process sends to itself."""

import gc
import os
import signal
import sys
import threading
import time

import pytest

from jtsm_jax.train.stopping import Stopped, Stopping

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_it_stops_at_once(number):
  with Stopping(), pytest.raises(Stopped) as stopped:
    send(number)
  assert stopped.value.signal == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_step_is_finished_first(number, capsys):
  with Stopping() as stopping:
    stopping.defer()
    assert stopping.asked(1) is None
    send(number)
    assert stopping.asked(2) == number
  assert "stops after this step" in capsys.readouterr().out


def test_a_second_signal_does_not_wait():
  with Stopping() as stopping:
    stopping.defer()
    send(signal.SIGTERM)
    with pytest.raises(Stopped):
      send(signal.SIGINT)


def test_where_nothing_can_be_lost_it_stops_at_once():
  with Stopping() as stopping:
    stopping.defer()
    with pytest.raises(Stopped), stopping.at_once():
      send(signal.SIGTERM)
  # And nothing is begun when one has come before.
  with Stopping() as stopping:
    stopping.defer()
    send(signal.SIGTERM)
    with pytest.raises(Stopped), stopping.at_once():
      pytest.fail("begun")


def test_after_it_signals_wait_again():
  with Stopping() as stopping:
    stopping.defer()
    with stopping.at_once():
      pass
    send(signal.SIGTERM)
    assert stopping.asked(1) == signal.SIGTERM


def drop():
  """Sends a SIGTERM in a callback: Python drops what is raised there.

  JAX has such a callback.
  """

  def callback(phase, info):
    if phase == "stop":
      send(signal.SIGTERM)

  gc.callbacks.append(callback)
  gc.collect()
  gc.callbacks.remove(callback)


# Also of an exception that was dropped pytest would tell, as Python does.


def test_one_within_a_callback_is_not_lost():
  with Stopping() as stopping:
    drop()
    with pytest.raises(Stopped):
      stopping.defer()
  with Stopping() as stopping:
    stopping.defer()
    with pytest.raises(Stopped), stopping.at_once():
      drop()


def test_one_within_a_callback_is_raised_again():
  with Stopping():
    drop()
    with pytest.raises(Stopped):
      time.sleep(60)


def test_what_is_being_saved_is_not_interrupted_again(monkeypatch):
  alarms = []
  monkeypatch.setattr(signal, "alarm", alarms.append)
  with Stopping() as stopping:
    stopping.defer()
    with pytest.raises(Stopped), stopping.at_once():
      send(signal.SIGTERM)
    assert alarms == [3]
    send(signal.SIGALRM)  # in the cleaning up
  assert alarms == [3, 0]


def test_an_alarm_from_before_is_for_a_sigterm(capsys):
  with Stopping() as stopping:
    stopping.defer()
    send(signal.SIGALRM)
    assert stopping.asked(1) == signal.SIGTERM
  assert "SIGTERM: stops after this step" in capsys.readouterr().out


def test_other_faults_in_callbacks_are_told(monkeypatch):
  told = []
  monkeypatch.setattr(sys, "unraisablehook", told.append)

  def callback(phase, info):
    if phase == "stop":
      raise ValueError

  with Stopping():
    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)
  assert [x.exc_type for x in told] == [ValueError]


def test_handlers_are_put_back():
  before = [signal.getsignal(number) for number in SIGNALS]
  with Stopping():
    assert [signal.getsignal(number) for number in SIGNALS] != before
  assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_may_use_it_without_signals():
  found = []

  def use():
    with Stopping() as stopping:
      stopping.defer()
      found.append(stopping.asked(1))

  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  assert found == [None]
