"""What checkpoints tell of their data, and what is made of it."""

import dataclasses
import pathlib
import shutil
import types

import jax.numpy as jnp
import pytest

from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.data.shapes import SHAPES_CATEGORIES, shapes_source
from jtsm_jax.train import checkpoints, origin
from jtsm_jax.train.state import TrainState
from jtsm_jax.types import Categories, InputError

NAMES = SHAPES_CATEGORIES.names
STORE = types.SimpleNamespace(path=pathlib.Path("proposals/data/v3-key"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  prepare(shapes_source(num_train=3, num_val=2, side=64), folder)
  return open_prepared(folder)


@pytest.fixture
def saved(data, tmp_path):
  """Checkpoints of the steps 1 and 2."""
  with checkpoints.open_checkpoints(tmp_path / "checkpoints") as manager:
    for step in (1, 2):
      state = TrainState(
        step=jnp.int32(step),
        params={"a": jnp.zeros(2)},
        model_state={},
        opt_state=(),
      )
      told = origin.describe(data, STORE)
      checkpoints.save(manager, state, [], config={}, data=told)
  return tmp_path / "checkpoints"


def swapped(*indices):
  """The classes of the shapes, two of them in the place of one another."""
  items = list(SHAPES_CATEGORIES.items)
  i, j = indices
  items[i], items[j] = items[j], items[i]
  return Categories(tuple(items))


def test_a_checkpoint_tells_its_data(data, saved):
  for path in (saved, saved / "1"):
    told = origin.told_by(path)
    assert told == origin.describe(data, STORE)
    assert told["things"] + told["stuff"] == list(NAMES)
    assert told["proposals"] == "v3-key"
  (saved / "2" / "data" / "metadata").write_text("{")  # damaged
  assert origin.told_by(saved) == origin.describe(data, STORE)
  assert origin.told_by(saved.parent / "none") == {}
  assert origin.classes_of(saved) == SHAPES_CATEGORIES


def test_the_key_is_of_the_training_images_and_their_tags(data, tmp_path):
  keys = [data.training_key]
  for n, options in enumerate(({"num_val": 1}, {"num_train": 2}, {"seed": 1})):
    options = {"num_train": 3, "num_val": 2, "side": 64} | options
    prepare(shapes_source(**options), tmp_path / str(n))
    keys.append(open_prepared(tmp_path / str(n)).training_key)
  assert keys[1] == keys[0]  # the validation images are others
  assert len(set(keys)) == 3
  retagged = open_prepared(tmp_path / "0")
  retagged.splits["train"].tags[0] = 1
  assert retagged.training_key != keys[0]


def test_other_classes_are_refused(saved):
  origin.check_classes(saved, SHAPES_CATEGORIES)
  with pytest.raises(InputError) as error:
    origin.check_classes(saved, swapped(1, 2))
  assert f"{saved}: the weights are of other classes" in str(error.value)
  assert f"things[1] is {NAMES[1]!r} there and {NAMES[2]!r} here" in (
    str(error.value)
  )
  assert "stuff[" not in str(error.value)
  with pytest.raises(InputError, match=r"stuff\[0\] is .* and .* here\."):
    origin.check_classes(saved, swapped(8, 9))
  fewer = Categories(SHAPES_CATEGORIES.items[:-1])
  with pytest.raises(InputError, match=r"stuff\[3\] is .* there and None here"):
    origin.check_classes(saved, fewer)
  renamed = dataclasses.replace(SHAPES_CATEGORIES.items[0], name="other")
  with pytest.raises(InputError, match="and 'other' here"):
    origin.check_classes(
      saved, Categories((renamed, *SHAPES_CATEGORIES.items[1:]))
    )


def test_older_checkpoints_tell_nothing_and_are_taken(saved):
  for step in (1, 2):
    shutil.rmtree(saved / str(step) / "data")
  assert origin.told_by(saved) == {}
  assert origin.classes_of(saved) is None
  origin.check_classes(saved, swapped(1, 2))
