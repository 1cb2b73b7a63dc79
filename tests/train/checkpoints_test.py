"""Checkpoints: exact, and robust against damaged files."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jtsm_jax.train import checkpoints
from jtsm_jax.train.state import TrainState
from jtsm_jax.train.stopping import Stopped
from jtsm_jax.types import InputError
from tests import tiny

OPTIMIZER = optax.adam(0.1)


def _state(step):
  rng = np.random.default_rng(step)
  params = {"neck": {"kernel": jnp.array(rng.normal(size=(3, 2)), "float32")}}
  opt_state = OPTIMIZER.init(params)
  return TrainState(
    step=jnp.int32(step),
    params=params,
    model_state={"constants": {"mean": jnp.array(rng.normal(size=3))}},
    opt_state=jax.tree.map(lambda x: x + x.dtype.type(step), opt_state),
  )


def _mined(seed, *, slots=3):
  rng = np.random.default_rng(seed)
  return tiny.make_mined(rng.integers(0, 5, (2, slots)), rng.random((2, slots)))


def _save(manager, step, *, in_flight=(), score=None, measured_by=None):
  checkpoints.save(
    manager,
    _state(step),
    list(in_flight),
    config={"seed": 3},
    data={},
    score=score,
    measured_by=measured_by,
  )
  manager.wait_until_finished()


def _template(*in_flight):
  def shapes(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )

  return lambda step: (
    shapes(_state(0)),
    [shapes(m) for m in in_flight],
  )


def _assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def _damage(directory, step):
  """Cuts every file of the state, as a full disk would."""
  files = [p for p in (directory / str(step) / "state").rglob("*")]
  files = [p for p in files if p.is_file() and p.stat().st_size]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def tmp_path(tmp_path):
  """A run's folder of checkpoints; damaged ones are moved beside it."""
  (tmp_path / "checkpoints").mkdir()
  return tmp_path / "checkpoints"


def test_state_segments_and_position_come_back(tmp_path):
  in_flight = [_mined(1), _mined(2)]
  with checkpoints.open_checkpoints(tmp_path) as manager:
    assert checkpoints.restore_latest(manager, _template()) is None
    _save(manager, 3)
    _save(manager, 7, in_flight=in_flight)
  with checkpoints.open_checkpoints(tmp_path) as manager:
    state, mined = checkpoints.restore_latest(manager, _template(*in_flight))
  _assert_equal(state, _state(7))
  _assert_equal(mined, in_flight)


def test_variables_for_evaluation(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
    _save(manager, 4)
  step, variables = checkpoints.restore_variables(tmp_path)
  assert step == 4
  _assert_equal(variables, _state(4).variables)
  # On the host, so that any number of devices can take them.
  leaves = jax.tree.leaves(variables)
  assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


def test_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, caplog):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
    _save(manager, 4)
  _damage(tmp_path, 4)
  step, variables = checkpoints.restore_variables(tmp_path)
  assert step == 2
  _assert_equal(variables, _state(2).variables)
  with checkpoints.open_checkpoints(tmp_path) as manager:
    state, _ = checkpoints.restore_latest(manager, _template())
    _assert_equal(state, _state(2))
    # The run comes to the same step again and can save it.
    _save(manager, 4)
  message = f"checkpoint 4 in {tmp_path} is damaged"
  warned = [r for r in caplog.records if message in r.getMessage()]
  assert len(warned) == 2  # one for each of the two that looked
  assert checkpoints.restore_variables(tmp_path)[0] == 4


def test_all_damaged_is_an_input_error(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
    _save(manager, 4)
  for step in (2, 4):
    _damage(tmp_path, step)
  with (
    checkpoints.open_checkpoints(tmp_path) as manager,
    pytest.raises(InputError, match=r"checkpoints \[2, 4\].*--workdir"),
  ):
    checkpoints.restore_latest(manager, _template())
  with pytest.raises(InputError, match="no checkpoint can be read"):
    checkpoints.restore_variables(tmp_path)


def test_no_checkpoints_is_an_input_error(tmp_path):
  with pytest.raises(InputError, match="--mode=train"):
    checkpoints.restore_variables(tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_the_last_two_are_kept(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    for step in range(1, 6):
      _save(manager, step)
    assert sorted(manager.all_steps()) == [4, 5]


def test_the_best_score_is_on_disk(tmp_path):
  pq = {"measure": "pq", "evaluation": {"canvases": [[8, 8]]}}
  with checkpoints.open_checkpoints(tmp_path, keep_last=1) as manager:
    assert checkpoints.best_score(manager, pq) == -np.inf
    _save(manager, 2, score=0.25, measured_by=pq)
  with checkpoints.open_checkpoints(tmp_path, keep_last=1) as manager:
    assert checkpoints.best_score(manager, pq) == 0.25
    _save(manager, 4, score=0.5, measured_by=pq)
    assert manager.all_steps() == [4]
    assert checkpoints.best_score(manager, pq) == 0.5
    # What was measured otherwise is not compared.
    assert checkpoints.best_score(manager, {"measure": "map"}) == -np.inf


def test_a_step_is_saved_once_more(tmp_path):
  """Where the run was killed before it had noted the score of the best."""
  measured = {"measure": "pq"}
  with checkpoints.open_checkpoints(tmp_path, keep_last=1) as manager:
    _save(manager, 4, score=0.5, measured_by=measured)
  with checkpoints.open_checkpoints(tmp_path, keep_last=1) as manager:
    _save(manager, 4, in_flight=[_mined(1)], score=0.75, measured_by=measured)
    assert checkpoints.best_score(manager, measured) == 0.75
  assert checkpoints.steps_in(tmp_path) == [4]
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _, mined = checkpoints.restore_latest(manager, _template(_mined(1)))
  _assert_equal(mined, [_mined(1)])


def test_unfinished_write_is_not_a_checkpoint(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
    _save(manager, 4)
  # What a killed process leaves: a folder without its last rename.
  shutil.move(tmp_path / "4", tmp_path / "4.orbax-checkpoint-tmp")
  with checkpoints.open_checkpoints(tmp_path) as manager:
    state, _ = checkpoints.restore_latest(manager, _template())
  assert int(state.step) == 2


def test_every_misfit_is_named(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
  other = _state(0)
  other.params["neck"]["kernel"] = jnp.zeros((3, 5))
  other.params["neck"]["bias"] = jnp.zeros(5)
  del other.model_state["constants"]["mean"]
  shapes = jax.eval_shape(lambda: other)
  with (
    checkpoints.open_checkpoints(tmp_path) as manager,
    pytest.raises(InputError) as error,
  ):
    checkpoints.restore_latest(manager, lambda step: (shapes, []))
  message = str(error.value)
  assert "params/neck/kernel is (3, 2), wanted (3, 5)" in message
  assert "params/neck/bias (5,) is missing" in message
  assert "model_state/constants/mean (3,) has no place" in message
  assert "--workdir" in message
  assert (tmp_path / "2").is_dir()  # it is not damaged


@pytest.mark.parametrize(
  "wanted", [[_mined(5, slots=4)] * 2, [_mined(5)], [_mined(5)] * 3, []]
)
def test_segments_that_do_not_fit_are_left_out(tmp_path, caplog, wanted):
  # Photos were added since: more classes in an image make more slots.
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 3)
    _save(manager, 7, in_flight=[_mined(1), _mined(2)])
  with checkpoints.open_checkpoints(tmp_path) as manager:
    state, mined = checkpoints.restore_latest(manager, _template(*wanted))
    assert sorted(manager.all_steps()) == [3, 7]
  _assert_equal(state, _state(7))
  assert mined == []
  told = [
    r.getMessage() for r in caplog.records if "left out" in r.getMessage()
  ]
  assert len(told) == 1
  assert str(tmp_path / "7") in told[0]
  assert "damaged" not in caplog.text


@pytest.mark.parametrize(
  "error",
  [
    MemoryError(),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."),
    Stopped(signal.SIGTERM),
  ],
)
def test_what_is_no_damage_is_raised(tmp_path, monkeypatch, error):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
    _save(manager, 4)
  mine = _state(0).variables

  def fail(*args, **kwargs):
    raise error

  with checkpoints.open_checkpoints(tmp_path) as manager:
    monkeypatch.setattr(manager, "restore", fail)
    with pytest.raises(type(error)) as found:
      checkpoints.restore_latest(manager, _template())
    assert found.value is error
  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
  for read in (
    checkpoints.restore_variables,
    lambda path: checkpoints.weights_from(path, mine, skip=()),
  ):
    with pytest.raises(type(error)) as found:
      read(tmp_path)
    assert found.value is error
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]
  assert [p.name for p in tmp_path.parent.iterdir()] == ["checkpoints"]


def test_weights_of_another_run(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
    _save(manager, 4)
  mine = jax.tree.map(np.zeros_like, _state(0).variables)
  for path in (tmp_path, tmp_path.parent, tmp_path / "4"):
    found = checkpoints.weights_from(path, mine, skip=())
    _assert_equal(found, _state(4).variables)
  found = checkpoints.weights_from(
    tmp_path / "2", mine, skip=("params/neck/", "params/other")
  )
  _assert_equal(found["params"], mine["params"])
  _assert_equal(found["constants"], _state(2).variables["constants"])


def test_weights_that_do_not_fit(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 2)
  mine = {
    "params": {"neck": {"kernel": np.zeros((3, 7)), "bias": np.zeros(7)}},
    "constants": {"mean": np.zeros(3, np.float32)},
  }
  with pytest.raises(InputError) as error:
    checkpoints.weights_from(tmp_path, mine, skip=())
  message = str(error.value)
  assert "params/neck/kernel is (3, 2), wanted (3, 7)" in message
  assert "params/neck/bias (7,) is missing" in message
  assert "constants" not in message
  assert "init_skip" in message
  found = checkpoints.weights_from(tmp_path, mine, skip=("params/neck/",))
  _assert_equal(found["params"], mine["params"])
  with pytest.raises(InputError, match="there is no checkpoint"):
    checkpoints.weights_from(tmp_path / "nowhere", mine, skip=())


FULL = """
import os, pathlib, resource, sys
from jtsm_jax.train import checkpoints
from jtsm_jax.types import InputError
from tests.train.checkpoints_test import _save, _state

try:
  with checkpoints.open_checkpoints(pathlib.Path(sys.argv[1])) as manager:
    _save(manager, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90, 90))  # no file is longer
    if sys.argv[2] == "wait":
      _save(manager, 2)
    checkpoints.save(manager, _state(2), [], config={}, data={})  # on its own
    while sys.argv[2] == "check":  # as after each step
      checkpoints.check_saved(manager)
except InputError as error:
  print(error, flush=True)
os._exit(0)  # as main.py does: Orbax's threads may wait for one another
"""


@pytest.mark.parametrize("how", ["wait", "check", "leave"])
def test_a_disk_that_fills_up_is_told_in_one_message(tmp_path, how):
  ended = subprocess.run(
    [sys.executable, "-c", FULL, str(tmp_path), how],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
  )
  assert ended.returncode == 0, ended.stderr
  [line] = ended.stdout.splitlines()
  assert f"{tmp_path}: a checkpoint cannot be written" in line
  assert "File too large). Those of the steps [1] are whole. Free" in line
  assert "orbax" not in ended.stderr
  with checkpoints.open_checkpoints(tmp_path) as manager:
    state, _ = checkpoints.restore_latest(manager, _template())
    end = time.monotonic() + 30  # Orbax tidies up beside the rest
    while len([*tmp_path.iterdir()]) > 1 and time.monotonic() < end:
      time.sleep(0.05)
  _assert_equal(state, _state(1))
  assert [p.name for p in tmp_path.iterdir()] == ["1"]  # room again


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 1)
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    with pytest.raises(InputError, match=r"takes \d+ bytes, and 50 are free"):
      _save(manager, 2)
  assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_reading_does_not_disturb_a_run_that_is_saving(tmp_path):
  with checkpoints.open_checkpoints(tmp_path) as manager:
    _save(manager, 1)
  unfinished = tmp_path / "2.orbax-checkpoint-tmp"
  unfinished.mkdir()
  assert checkpoints.restore_variables(tmp_path)[0] == 1
  assert unfinished.is_dir()
