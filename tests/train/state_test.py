"""The first state of a run."""

import jax
import numpy as np
import optax
import pytest

from jtsm_jax.train.state import create_state, initial_variables
from jtsm_jax.types import InputError
from tests import tiny

BATCH = tiny.make_batch(1)
MODEL = tiny.make_model(
  projection=4, instance=False, semantic=False, num_refinements=1
)
GIVEN = tiny.make_variables(MODEL, BATCH, seed=7)


@pytest.fixture(scope="module")
def state():
  # One for all tests: compiling the initialisers takes seconds.
  pretrained = {
    name: {"extractor": {"backbone": GIVEN[name]["extractor"]["backbone"]}}
    for name in ("params", "batch_stats")
  }
  pretrained["params"]["neck"] = {
    "fc1": {"kernel": GIVEN["params"]["neck"]["fc1"]["kernel"]}
  }
  optimizer = optax.sgd(0.1, momentum=0.9)
  variables = initial_variables(
    jax.random.key(3), MODEL, BATCH, pretrained=pretrained
  )
  return create_state(variables, optimizer)


def test_state_holds_every_variable_and_starts_at_zero(state):
  assert int(state.step) == 0
  shapes = {path: x.shape for path, x in tiny.paths(dict(GIVEN)).items()}
  found = {path: x.shape for path, x in tiny.paths(state.variables).items()}
  assert found == shapes
  assert set(state.model_state) == {"batch_stats", "constants"}
  momenta = jax.tree.leaves(state.opt_state)
  assert sum(m.size for m in momenta) == sum(
    p.size for p in jax.tree.leaves(state.params)
  )
  assert not any(m.any() for m in momenta)


def test_pretrained_replaces_what_it_names_and_nothing_else(state):
  given = tiny.paths(dict(GIVEN))
  for path, value in tiny.paths(state.variables).items():
    is_named = "extractor/backbone/" in path or "neck/fc1/kernel" in path
    assert np.array_equal(value, given[path]) == is_named, path


def test_every_misfit_of_pretrained_is_listed():
  kernel = GIVEN["params"]["neck"]["fc1"]["kernel"]
  pretrained = {
    "params": {
      "neck": {
        "fc1": {"kernel": kernel[:, :3], "bias": np.zeros(16, np.float16)},
        "fc2": {"bias": np.zeros(2, np.float32)},
      }
    },
    "batch_stats": {"neck": {"mean": np.zeros(2, np.float32)}},
  }
  with pytest.raises(InputError) as error:
    initial_variables(jax.random.key(3), MODEL, BATCH, pretrained=pretrained)
  assert str(error.value).split("\n  ")[1:] == [
    "batch_stats/neck/mean is not part of the model",
    "params/neck/fc1/bias is float16 (16,), the model has float32 (16,)",
    "params/neck/fc1/kernel is float32 (16, 3), the model has float32 (16, 16)",
    "params/neck/fc2/bias is not part of the model",
  ]
