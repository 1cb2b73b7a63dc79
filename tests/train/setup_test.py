"""What a run begins with: weights of another one, and constants for them."""

import functools

import jax
import numpy as np
import pytest

from jtsm_jax import run
from jtsm_jax.data import pipeline
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.data.shapes import SHAPES_CATEGORIES, shapes_source
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.train import checkpoints, origin, setup
from jtsm_jax.types import Categories, InputError
from tests.configs import tiny
from tests.tiny import paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A function that sets up a run, on data of its own."""
  root = tmp_path_factory.mktemp("setup")
  prepare(shapes_source(seed=0, num_train=6, num_val=1, side=64), root / "data")
  data = open_prepared(root / "data")

  def function(**fields):
    config = tiny.get_config("frozen")
    config.data.prepared = str(root / "data")
    config.proposals.store = str(root / "proposals")
    config.warm_up.steps = 0
    config.backbone.freeze = "none"
    config.train.calibration_images = 4
    config.update_from_flattened_dict(fields)
    store = run.propose(config, root / "workdir", data)
    return setup.set_up(config, root / "workdir", data=data, store=store)

  return function


def first_variables(first, categories=SHAPES_CATEGORIES):
  return setup.first_variables(first, categories)


@pytest.fixture(scope="module")
def other(made, tmp_path_factory):
  """(checkpoints, their arrays by path) of a run that others begin with."""
  folder = tmp_path_factory.mktemp("other") / "checkpoints"
  first = made()
  state = jax.device_get(setup.begin(first, first_variables(first), 0))
  # No calibration gives these.
  state.model_state["constants"] = jax.tree.map(
    lambda x: x + np.float32(0.1), state.model_state["constants"]
  )
  with checkpoints.open_checkpoints(folder) as manager:
    data = open_prepared(first.config.data.prepared)
    told = origin.describe(data, first.store)
    checkpoints.save(manager, state, [], config={}, data=told)
  return folder, paths(state.variables)


def test_all_hosts_begin_with_the_constants_of_the_first(made, monkeypatch):
  def of_the_first(tree):
    return jax.tree.map(lambda x: np.full_like(x, 0.25), tree)

  monkeypatch.setattr(setup, "broadcast_one_to_all", of_the_first)
  first = made()
  found = paths(setup.begin(first, first_variables(first), 0).variables)
  constants = {k: v for k, v in found.items() if k.startswith("constants/")}
  assert constants
  assert all((np.asarray(v) == 0.25).all() for v in constants.values())


def test_no_image_is_read_in_vain(made, monkeypatch):
  """The shapes are one image's, and a batch may be of many hosts."""
  made()  # with the proposals
  read = []

  def decode(*args, **kwargs):
    read.append(args)
    return decode_image(*args, **kwargs)

  monkeypatch.setattr(pipeline, "decode_image", decode)
  first = made(**{"train.batch_size": 4, "train.calibration_images": 5})
  assert len(read) == len(first.example.images) == 1
  setup.begin(first, first_variables(first), 0)
  assert len(read) == 1 + 5


CENTER = ("constants/proposal_features/",)
PROJECTION = ("constants/extractor/",)


@pytest.mark.parametrize(
  ("fields", "kept"),
  [
    ({}, PROJECTION + CENTER),
    (
      {
        "pooling.output_size": (3, 3),
        "train.init_skip": ("params/neck/fc1/", *CENTER),
      },
      PROJECTION,
    ),
    # The mean of the proposals is that of the projected features.
    ({"train.init_skip": PROJECTION}, ()),
    ({"train.init_skip": ("params/extractor/backbone/res5_1/",)}, ()),
    ({"warm_up.steps": 2}, ()),
  ],
)
def test_constants_are_the_other_runs_or_computed(made, other, fields, kept):
  folder, theirs = other
  first = made(**{"train.init_from": str(folder), **fields})
  step = first.warm_up_steps
  state = setup.begin(first, first_variables(first), step)
  found = paths(state.variables)
  for part in (*PROJECTION, *CENTER):
    for name in found:
      if name.startswith(part):
        same = np.array_equal(found[name], theirs[name])
        assert same == (part in kept), name
  if CENTER[0] in kept:
    return
  pool = jax.jit(
    functools.partial(
      first.model.apply, method=lambda m, b: m.pool(m.features(b), b)
    )
  )
  batches = setup.batches_from(first, step)
  described = []
  for batch in (next(batches), next(batches)):  # 4 images
    (part,) = pool(state.variables, batch)
    described.append(np.asarray(part)[batch.valid])
  described = np.concatenate(described)
  assert described.std() > 0  # the projection is not all zero
  constants = state.variables["constants"]["proposal_features"]
  np.testing.assert_allclose(
    constants["mean_0"], described.mean(0), rtol=1e-4, atol=1e-4
  )
  spread = np.sqrt(described.var(0).mean())
  np.testing.assert_allclose(constants["scale_0"], spread, rtol=1e-3)


def test_a_backbone_of_another_run_does_not_stay_random(made, other):
  fields = {"train.init_from": str(other[0]), "backbone.freeze": "all"}
  found = paths(first_variables(made(**fields)))
  for name, value in other[1].items():
    np.testing.assert_array_equal(found[name], value)
  skips = {"train.init_skip": ("params/extractor/backbone/",)}
  with pytest.raises(InputError, match="stays random"):
    first_variables(made(**fields, **skips))


def test_weights_of_other_classes(made, other):
  folder, theirs = other
  items = SHAPES_CATEGORIES.items
  first = made(**{"train.init_from": str(folder)})
  with pytest.raises(InputError) as error:  # though all of them would fit
    first_variables(first, Categories((*items[:8], *items[:7:-1])))
  said = str(error.value)
  assert f"stuff[0] is {items[8].name!r} there and {items[11].name!r}" in said
  named = [x.strip() for x in said.splitlines() if x.startswith("  ")]
  parts = {x.split("/")[1] for x in named}
  assert parts == {"heads", "tag_head", "semantic", "cells"}
  assert named == [x for x in named if x in theirs]
  # The output of the semantic branch, and not what leads to it.
  assert (
    0
    < sum("semantic" in x for x in named)
    < (sum("semantic" in x for x in theirs))
  )
  things = Categories((*items[7::-1], *items[8:]))
  with pytest.raises(InputError, match=r"things\[0\](.|\n)* params/instance/"):
    first_variables(first, things)
  first = made(
    **{"train.init_from": str(folder), "train.init_skip": tuple(named)}
  )
  found = paths(first_variables(first, Categories((*items[:8], *items[:7:-1]))))
  for name, value in theirs.items():
    same = np.array_equal(found[name], value)
    assert same or name in named, name


def test_calibration_takes_what_a_device_has_in_a_step(made, monkeypatch):
  taken = []

  def calibrate(model, variables, batches, **_):
    taken[:] = batches
    return variables

  monkeypatch.setattr(setup, "calibrate", calibrate)
  monkeypatch.setattr(setup, "_new_state", lambda run, variables, step: ())
  monkeypatch.setattr(setup, "shardings", lambda run, step: ())

  def shown(**fields):
    first = made(**fields)
    setup.begin(first, {"constants": {}}, 0)
    wanted = [i for b in setup.batches_from(first, 0) for i in b.image_index]
    found = [i for batch in taken for i in batch.image_index]
    assert found == wanted[: len(found)]
    assert all(
      len(x) == len(b.valid) for b in taken for x in jax.tree.leaves(b)
    )
    return [len(batch.valid) for batch in taken]

  # As many as before where that many fill whole batches.
  assert shown(**{"train.calibration_images": 6}) == [2, 2, 2]
  # 5 of 16 images, 2 at a time.
  sizes = {"train.batch_size": 16, "train.accumulation": 8}
  assert shown(**sizes, **{"train.calibration_images": 5}) == [2, 2, 1]
  # No more than there are.
  assert shown(**{"train.calibration_images": 64, "train.steps": 4}) == [2] * 4
