"""Orbax checkpoints of a run: state, data position, segments in flight."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from jtsm_jax.train.state import TrainState
from jtsm_jax.types import InputError


def open_checkpoints(
  directory: pathlib.Path, *, keep_last: int = 2
) -> ocp.CheckpointManager:
  """The checkpoints of a run: the last ones and the best one."""
  return ocp.CheckpointManager(
    directory.absolute(),
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(keep_last),
          policies.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
      cleanup_tmp_directories=True,
    ),
  )


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  in_flight: list[Any],
  iterator: Any,
  *,
  score: float | None = None,
) -> None:
  """Saves in the background; the write is atomic.

  Args:
    manager: from `open_checkpoints`.
    state: after `state.step` updates.
    in_flight: mined segments whose masks have not been learnt from yet.
    iterator: the grain iterator of the training batches.
    score: the higher the better, when this state was evaluated.
  """
  items = {
    "state": ocp.args.StandardSave(state),
    "in_flight": ocp.args.StandardSave(_in_flight_tree(in_flight)),
    "data": grain.checkpoint.CheckpointSave(iterator),
  }
  metrics = None if score is None else {"score": score}
  if metrics is not None:
    # Orbax writes `metrics` only with `best_fn`, and then asks for them in
    # every save. Without this file a resumed run forgets which one is best.
    items["metrics"] = ocp.args.JsonSave(metrics)
  manager.save(
    int(state.step),
    args=ocp.args.Composite(**items),
    metrics=metrics,
    force=True,
  )


def restore_latest(
  manager: ocp.CheckpointManager,
  template_at: Callable[[int], tuple[TrainState, list[Any], Any]],
) -> tuple[TrainState, list[Any], Any] | None:
  """Restores the newest checkpoint that can be read.

  A damaged one is named in a warning and the one before it is taken. It is
  moved out of the folder, since the run will save the same step again.

  Args:
    manager: from `open_checkpoints`.
    template_at: from a step to what its checkpoint holds: the shapes of the
      state, those of the segments in flight, and an iterator, whose position
      is then set.

  Returns:
    (state, in_flight, iterator), or None when there is no checkpoint.

  Raises:
    InputError: there are checkpoints and none of them can be read.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  for tried, step in enumerate(steps):
    state, in_flight, iterator = template_at(step)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(state),
      in_flight=ocp.args.StandardRestore(_in_flight_tree(in_flight)),
      data=grain.checkpoint.CheckpointRestore(iterator),
    )
    try:
      restored = manager.restore(step, args=args)
    except Exception as error:  # Orbax raises many kinds for damaged files.
      _warn_damaged(manager, step, error)
      continue
    _set_aside(manager, steps[:tried])
    return restored["state"], restored["in_flight"]["mined"], restored["data"]
  if steps:
    raise InputError(
      f"{manager.directory}: none of the checkpoints {steps[::-1]} can be read;"
      " delete the folder to start again, or give another --workdir"
    )
  return None


def restore_variables(directory: pathlib.Path) -> tuple[int, dict[str, Any]]:
  """The newest readable weights, for evaluation and prediction.

  Args:
    directory: the checkpoints of a run.

  Returns:
    The step and what `model.apply` takes, as numpy arrays.

  Raises:
    InputError: there is no checkpoint, or none can be read.
  """
  remedy = "train first (--mode=train), or check --workdir"
  if not directory.is_dir():
    raise InputError(f"{directory}: there are no checkpoints; {remedy}")
  with open_checkpoints(directory) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        state = _restore_arrays(manager, step, ("params", "model_state"))
      except Exception as error:  # Orbax raises many kinds for damaged files.
        _warn_damaged(manager, step, error)
        continue
      return step, {"params": state["params"], **state["model_state"]}
  raise InputError(f"{directory}: no checkpoint can be read; {remedy}")


def _restore_arrays(
  manager: ocp.CheckpointManager, step: int, fields: tuple[str, ...]
) -> Any:
  """Some fields of a state as numpy arrays, whatever devices it was made on."""
  path = manager.directory / str(step) / "state"
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    tree = handler.metadata(path).tree
    wanted = {name: tree[name] for name in fields}
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


def _warn_damaged(manager, step, error) -> None:
  logging.warning(
    "checkpoint %d in %s is damaged (%s: %s); taking the one before",
    step,
    manager.directory,
    type(error).__name__,
    str(error).strip().split("\n")[0][:200],
  )


def _in_flight_tree(mined: list[Any]) -> dict[str, Any]:
  # The count is there because Orbax cannot store an empty tree. It is an array
  # because Orbax saves numpy scalars but refuses them as a template.
  return {"count": np.array(len(mined), np.int32), "mined": mined}
