"""Which data and proposals the weights of a checkpoint have learned from.

The arrays do not tell: classes in another order fit them as well.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.proposals.store import ProposalStore
from jtsm_jax.train.checkpoints import steps_in
from jtsm_jax.types import Categories, Category, InputError


def describe(data: PreparedData, store: ProposalStore) -> dict[str, Any]:
  """What a checkpoint tells of the data, as JSON has it.

  Args:
    data: the training split is learned from.
    store: its proposals; the folder's name says what has made them.

  Returns:
    {"things", "stuff": names in the order of their indices, "ids": those of all
    of them in the data set's files, "training_key", "proposals"}.
  """
  return _names(data.categories) | {
    "ids": [category.id for category in data.categories.items],
    "training_key": data.training_key,
    "proposals": store.path.name,
  }


def told_by(path: pathlib.Path) -> dict[str, Any]:
  """What the newest readable checkpoint tells of its data, see `describe`.

  Args:
    path: a folder of checkpoints, or one checkpoint.

  Returns:
    Nothing of what the program did not yet write when it made them.
  """
  steps = sorted(steps_in(path), reverse=True)
  with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
    for checkpoint in [path / str(step) for step in steps] or [path]:
      with contextlib.suppress(OSError, ValueError):
        return dict(handler.restore(checkpoint.absolute() / "data"))
  return {}


def classes_of(path: pathlib.Path) -> Categories | None:
  """The classes of a run, from its checkpoints; None if older ones tell none.

  Args:
    path: as of `told_by`.
  """
  told = told_by(path)
  if "ids" not in told:
    return None
  count = len(told["things"])
  names = told["things"] + told["stuff"]
  return Categories(
    tuple(
      Category(id_, name, n < count)
      for n, (id_, name) in enumerate(zip(told["ids"], names, strict=True))
    )
  )


def is_other(told: dict[str, Any], described: dict[str, Any]) -> bool:
  """Whether training images, tags or proposals are others than were.

  Args:
    told: of `told_by`; what it leaves out is taken for the same.
    described: of `describe`.
  """
  keys = ("training_key", "proposals")
  return any(told.get(key, described[key]) != described[key] for key in keys)


def other_classes(
  told: dict[str, Any], categories: Categories
) -> dict[str, str]:
  """The first difference of the "things" and of the "stuff", in words.

  Args:
    told: of `told_by`; what it leaves out is taken for the same.
    categories: the classes of the data.
  """
  found = {}
  for kind, here in _names(categories).items():
    pairs = itertools.zip_longest(told.get(kind, here), here)
    for n, (a, b) in enumerate(pairs):
      if a != b:
        found[kind] = f"{kind}[{n}] is {a!r} there and {b!r} here"
        break
  return found


def check_classes(path: pathlib.Path, categories: Categories) -> None:
  """Compares the classes of a run with those of its data.

  Args:
    path: the checkpoints of the run; there may be none.
    categories: the classes of the data.

  Raises:
    InputError: they differ, if in their order alone.
  """
  others = other_classes(told_by(path), categories)
  if others:
    raise InputError(
      f"{path}: the weights are of other classes than the data:"
      f" {', '.join(others.values())}. Prepare the data with the classes that"
      " the run began with, in their order, or give another --workdir; its"
      " --init_from with config.train.init_skip keeps what no class owns"
    )


def _names(categories: Categories) -> dict[str, list[str]]:
  names, count = list(categories.names), categories.num_things
  return {"things": names[:count], "stuff": names[count:]}
