"""The first state of a run."""

import jax
import numpy as np
import optax
import pytest

from jtsm_jax.train.state import create_state, initial_variables
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
    name: GIVEN[name]["extractor"]["backbone"]
    for name in ("params", "batch_stats")
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


def test_pretrained_replaces_the_backbone_and_nothing_else(state):
  given = tiny.paths(dict(GIVEN))
  for path, value in tiny.paths(state.variables).items():
    in_backbone = "extractor/backbone/" in path
    assert np.array_equal(value, given[path]) == in_backbone, path
