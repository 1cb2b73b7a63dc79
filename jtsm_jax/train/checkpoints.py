"""Orbax checkpoints of a run: state, segments in flight, settings, data.

Random numbers and batches are pure functions of the seed and the step, so the
step is all that a resumed run needs to go on with both of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from jtsm_jax.train.state import TrainState
from jtsm_jax.types import InputError


@contextlib.contextmanager
def open_checkpoints(
  directory: pathlib.Path, *, keep_last: int = 2
) -> Iterator[ocp.CheckpointManager]:
  """The checkpoints in a folder, of which the last ones are kept.

  Only the run itself opens them so: what another one is just saving there
  would be taken for the rest of a killed run, and removed.

  Raises:
    InputError: the disk fails; also on leaving, for a save in the background.
  """
  logging.get_absl_logger().addFilter(_is_not_raised_too)
  with _disk_faults(directory):
    manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.LatestN(keep_last),
        cleanup_tmp_directories=True,
      ),
    )
  try:
    yield manager
  finally:
    with _disk_faults(directory):
      manager.close()


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  in_flight: list[Any],
  *,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  score: float | None = None,
  measured_by: Mapping[str, Any] | None = None,
) -> None:
  """Saves in the background; the write is atomic. See `check_saved`.

  Args:
    manager: from `open_checkpoints`.
    state: after `state.step` updates.
    in_flight: mined segments whose masks have not been learnt from yet.
    config: the settings of the run, for JSON.
    data: what it has learned from, see `origin.describe`.
    score: of this state, where it was evaluated; see `best_score`.
    measured_by: what the score depends on beside the state, for JSON.

  Raises:
    InputError: the disk fails, now or with the checkpoint before.
  """
  items = {
    "state": ocp.args.StandardSave(state),
    "in_flight": ocp.args.StandardSave(_in_flight_tree(in_flight)),
    "config": ocp.args.JsonSave(dict(config)),
    "data": ocp.args.JsonSave(dict(data)),
  }
  if score is not None:
    items["score"] = ocp.args.JsonSave(
      {"score": score, "measured_by": dict(measured_by or {})}
    )
  with _disk_faults(manager.directory):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state, in_flight)))
    free = shutil.disk_usage(manager.directory).free
    if free < size:  # before anything is begun
      reason = f"it takes {size} bytes, and {free} are free"
      raise OSError(errno.ENOSPC, reason)
    if int(state.step) in manager.all_steps():  # evaluated once more
      manager.delete(int(state.step))
    manager.save(int(state.step), args=ocp.args.Composite(**items), force=True)


def check_saved(manager: ocp.CheckpointManager, *, wait: bool = False) -> None:
  """Tells a failure of the last save, as soon as it is known.

  Args:
    manager: from `open_checkpoints`.
    wait: until the checkpoint is complete.

  Raises:
    InputError: the disk fails; the checkpoints before are whole.
  """
  if wait or not manager.is_saving_in_progress():
    with _disk_faults(manager.directory):
      manager.wait_until_finished()


def best_score(
  manager: ocp.CheckpointManager, measured_by: Mapping[str, Any]
) -> float:
  """The score of the newest checkpoint, which a better one has to exceed.

  It is -inf where there is none, and where it was measured by something else:
  mAP of other masks, or with other settings, says nothing about a PQ.
  """
  step = manager.latest_step()
  if step is None:
    return -np.inf
  args = ocp.args.Composite(score=ocp.args.JsonRestore())
  found = manager.restore(step, args=args)["score"]
  return found["score"] if found["measured_by"] == measured_by else -np.inf


def steps_in(directory: pathlib.Path) -> list[int]:
  """The steps of the complete checkpoints in a folder, which may be absent."""
  # The others have longer names.
  return [int(p.name) for p in directory.glob("[0-9]*") if p.name.isdigit()]


def restore_latest(
  manager: ocp.CheckpointManager,
  template_at: Callable[[int], tuple[TrainState, list[Any]]],
) -> tuple[TrainState, list[Any]] | None:
  """Restores the newest checkpoint that can be read.

  A damaged one is named in a warning and the one before it is taken. It is
  moved out of the folder, since the run will save the same step again. Segments
  in flight that do not fit are left out with a warning: the data were prepared
  anew, and the branches learn from the next ones.

  Args:
    manager: from `open_checkpoints`.
    template_at: from a step to what its checkpoint holds: the shapes of the
      state and those of the segments in flight.

  Returns:
    (state, in_flight), or None when there is no checkpoint.

  Raises:
    InputError: there are checkpoints and none of them can be read, or one does
      not fit the model; names every array that is missing or differs.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  for tried, step in enumerate(steps):
    state, in_flight = template_at(step)
    path = manager.directory / str(step)
    parts = {"state": state, "in_flight": _in_flight_tree(in_flight)}
    try:
      misfits = {
        name: _misfits(_saved_leaves(path / name), _leaves(tree))
        for name, tree in parts.items()
      }
      args = {
        name: ocp.args.StandardRestore(tree)
        for name, tree in parts.items()
        if not misfits[name]
      }
      restored = (
        None
        if misfits["state"]
        else manager.restore(step, args=ocp.args.Composite(**args))
      )
    except Exception as error:  # Orbax raises many kinds for damaged files.
      _raise_if_memory(error)
      _warn_damaged(path, error)
      continue
    if misfits["state"]:
      raise InputError(
        f"{path} does not fit the model of this configuration:\n  "
        + "\n  ".join(misfits["state"])
        + "\nGive another --workdir, or the settings that it was made with"
      )
    _set_aside(manager, steps[:tried])
    if misfits["in_flight"]:
      logging.warning(
        "%s: the segments that wait for their masks do not fit the data (%s); "
        "they are left out",
        path,
        misfits["in_flight"][0],
      )
      return restored["state"], []
    return restored["state"], restored["in_flight"]["mined"]
  if steps:
    raise InputError(
      f"{manager.directory}: none of the checkpoints {steps[::-1]} can be read;"
      " delete the folder to start again, or give another --workdir"
    )
  return None


def restore_variables(
  directory: pathlib.Path, *, averaged: bool = False
) -> tuple[int, dict[str, Any]]:
  """The newest readable weights, for evaluation and prediction.

  Args:
    directory: the checkpoints of a run.
    averaged: take the moving average of the parameters.

  Returns:
    The step and what `model.apply` takes, as numpy arrays.

  Raises:
    InputError: there is no checkpoint, or none can be read, or it has no
      average.
  """
  remedy = "train first (--mode=train), or check --workdir"
  if not directory.is_dir():
    raise InputError(f"{directory}: there are no checkpoints; {remedy}")
  params = "ema" if averaged else "params"
  # No manager: the run may be saving another one at this moment.
  for step in sorted(steps_in(directory), reverse=True):
    path = directory.absolute() / str(step)
    try:
      state = _restore_arrays(path, (params, "model_state"))
    except Exception as error:  # Orbax raises many kinds for damaged files.
      _raise_if_memory(error)
      _warn_damaged(path, error)
      continue
    if params not in state:
      raise InputError(
        f"{path}: there is no average of the weights yet; it begins with the "
        "mining"
      )
    return step, {"params": state[params], **state.get("model_state", {})}
  raise InputError(f"{directory}: no checkpoint can be read; {remedy}")


def is_skipped(name: str, skip: tuple[str, ...]) -> bool:
  """Whether a path, such as "params/heads/bias", begins like a pattern."""
  return any(re.match(pattern, name) for pattern in skip)


def checkpoint_at(path: pathlib.Path) -> pathlib.Path:
  """The newest checkpoint of another run.

  Args:
    path: a workdir, a folder of checkpoints, or one checkpoint.

  Raises:
    InputError: there is none.
  """
  directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  steps = steps_in(directory)
  if steps and not (directory / "state").is_dir():
    directory = directory / str(max(steps))
  if not (directory / "state").is_dir():
    raise InputError(
      f"--init_from={path}: there is no checkpoint; give the --workdir of a run"
      " that has trained, or one of its checkpoints"
    )
  return directory


def weights_from(
  path: pathlib.Path, variables: Mapping[str, Any], *, skip: tuple[str, ...]
) -> dict[str, Any]:
  """The weights of another run in the place of those of a new model.

  Args:
    path: see `checkpoint_at`.
    variables: of the new model, what `model.apply` takes.
    skip: patterns of paths ("params/heads/") that keep their values.

  Returns:
    Variables like the given ones.

  Raises:
    InputError: there is no checkpoint at `path`, it cannot be read, or arrays
      are missing or of other shapes; the message names every one of them.
  """
  directory = checkpoint_at(path)
  try:
    state = _restore_arrays(directory, ("params", "model_state"))
  except Exception as error:  # Orbax raises many kinds for damaged files.
    _raise_if_memory(error)
    raise InputError(
      f"--init_from: {directory} cannot be read ({error}); give another one"
    ) from error
  theirs = flatten_dict(
    {"params": state["params"], **state.get("model_state", {})}
  )
  mine = flatten_dict(dict(variables))

  wanted = {
    name: leaf
    for name, leaf in mine.items()
    if not is_skipped("/".join(name), skip)
  }
  misfits = _misfits(
    {"/".join(k): v for k, v in theirs.items() if k in wanted or k not in mine},
    {"/".join(k): v for k, v in wanted.items()},
    excess=False,
  )
  if misfits:
    raise InputError(
      f"--init_from: {directory} does not fit the model of this configuration:"
      "\n  " + "\n  ".join(misfits) + "\nTo start some of them anew, name them"
      " in config.train.init_skip, such as \"('params/heads/',)\""
    )
  return unflatten_dict(mine | {name: theirs[name] for name in wanted})


def _leaves(tree: Any) -> dict[str, Any]:
  """Arrays by path: {"params/neck/fc1/kernel": array}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _saved_leaves(path: pathlib.Path) -> dict[str, Any]:
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return _leaves(handler.metadata(path).tree)


def _misfits(
  saved: Mapping[str, Any], wanted: Mapping[str, Any], *, excess: bool = True
) -> list[str]:
  """What is missing, of another shape or type, or too much; a line each."""
  lines = []
  for name in sorted(saved.keys() | wanted.keys()):
    a, b = saved.get(name), wanted.get(name)
    if a is None:
      lines.append(f"{name} {tuple(b.shape)} is missing")
    elif b is None:
      if excess:
        lines.append(f"{name} {tuple(a.shape)} has no place")
    elif tuple(a.shape) != tuple(b.shape):
      lines.append(f"{name} is {tuple(a.shape)}, wanted {tuple(b.shape)}")
    elif np.dtype(a.dtype) != np.dtype(b.dtype):
      lines.append(f"{name} is {a.dtype}, wanted {b.dtype}")
  return lines


def _restore_arrays(path: pathlib.Path, fields: tuple[str, ...]) -> Any:
  """Some fields of a state as numpy arrays, whatever devices it was made on."""
  path = path / "state"
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    tree = handler.metadata(path).tree
    wanted = {name: tree[name] for name in fields if tree.get(name)}
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
    )
    args = ocp.args.PyTreeRestore(
      wanted, restore_args=as_numpy, partial_restore=True
    )
    return handler.restore(path, args=args)


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
  if not steps:
    return
  if jax.process_index() == 0:
    for step in steps:
      target = manager.directory.parent / f"damaged_checkpoint_{step}"
      if target.exists():
        target.rmtree()
      (manager.directory / str(step)).rename(target)
      logging.warning("checkpoint %d is now %s", step, target)
  multihost_utils.sync_global_devices("damaged checkpoints are set aside")
  manager.reload()


@contextlib.contextmanager
def _disk_faults(directory: Any) -> Iterator[None]:
  """Says in one message what TensorStore and the system say in pages."""
  try:
    yield
  except Exception as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if not isinstance(error, OSError) and not code:
      raise
    reason = os.strerror(int(code[1])) if code else error.strerror
    if isinstance(error, TimeoutError):  # Orbax waits by the wall clock
      reason = "it takes too long, or the clock was set while it was written"
    whole = sorted(steps_in(pathlib.Path(directory)))
    raise InputError(
      f"{directory}: a checkpoint cannot be written ({reason}). Those of the "
      f"steps {whole} are whole. Free some space, or see to the disk, and give "
      "the same command: it goes on from the last one"
    ) from error


def _is_not_raised_too(record: Any) -> bool:
  """False for the tracebacks that Orbax logs beside raising the error."""
  return not (record.exc_info and "orbax" in record.pathname)


def _raise_if_memory(error: Exception) -> None:
  """Raises what tells of the machine, and nothing of the files."""
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    raise error


def _warn_damaged(path: Any, error: Exception) -> None:
  logging.warning(
    "checkpoint %s in %s is damaged (%s: %s); taking the one before",
    path.name,
    path.parent,
    type(error).__name__,
    str(error).strip().split("\n")[0][:200],
  )


def _in_flight_tree(mined: list[Any]) -> dict[str, Any]:
  # The count is there because Orbax cannot store an empty tree. It is an array
  # because Orbax saves numpy scalars but refuses them as a template.
  return {"count": np.array(len(mined), np.int32), "mined": mined}
