"""Optimizers against their update rules written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtsm_jax.train.schedule import make_optimizer, scaled_rate, step_decay


def test_step_decay_by_hand():
  rate = step_decay(learning_rate=0.01, boundaries=(70, 90))
  values = [float(rate(t)) for t in (0, 69, 70, 89, 90, 1000)]
  expected = [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  half = step_decay(learning_rate=1.0, boundaries=(1,), factor=0.5)
  assert [float(half(t)) for t in (0, 1)] == [1.0, 0.5]
  assert float(
    step_decay(learning_rate=0.3, boundaries=())(10**6)
  ) == pytest.approx(0.3)


def test_a_rate_that_rises_first():
  rate = step_decay(learning_rate=0.8, boundaries=(3, 6), rise=4)
  # Over the first boundary, too.
  expected = [0.2, 0.4, 0.6, 0.08, 0.08, 0.08, 0.008]
  np.testing.assert_allclose([rate(t) for t in range(7)], expected, rtol=1e-5)


def test_rates_grow_with_the_batch():
  def rate(reference):
    return scaled_rate(
      learning_rate=0.01, batch_size=64, reference_batch_size=reference
    )

  assert rate(4) == pytest.approx(0.16)
  assert rate(0) == 0.01


def _params():
  rng = np.random.default_rng(0)

  def layer():
    return {
      "kernel": jnp.array(rng.normal(size=(3, 2)), jnp.float32),
      "bias": jnp.array(rng.normal(size=2), jnp.float32),
    }

  return {
    "extractor": {"backbone": {"stem1": layer(), "res2_0": layer()}},
    "neck": {"fc1": layer()},
    "tag_head": {"Dense_0": layer()},
  }


def _run(optimizer, params, *, steps=3):
  """Steps with gradients of 1, 2, 3, ... everywhere."""
  state = optimizer.init(params)
  for t in range(steps):
    grads = jax.tree.map(lambda p, t=t: jnp.full_like(p, t + 1.0), params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _numpy_sgd(p, *, rate, decay, momentum, steps=3):
  p, velocity = np.asarray(p, np.float64), 0.0
  for t in range(steps):
    velocity = momentum * velocity + (t + 1.0) + decay * p
    p = p - rate * velocity
  return p


def _numpy_adamw(p, *, rate, decay, steps=3):
  p, m, v = np.asarray(p, np.float64), 0.0, 0.0
  for t in range(steps):
    m, v = 0.9 * m + 0.1 * (t + 1.0), 0.999 * v + 0.001 * (t + 1.0) ** 2
    unbiased = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
    p = p - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay * p)
  return p


@pytest.mark.parametrize("bias_lr_factor", [1.0, 2.0])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_update_rule_of_kernels_and_biases(name, bias_lr_factor):
  params = {"neck": _params()["neck"]}
  optimizer = make_optimizer(
    params,
    name=name,
    schedule=optax.constant_schedule(0.1),
    weight_decay=0.01,
    momentum=0.8,
    bias_lr_factor=bias_lr_factor,
    trained=("neck",),
  )
  found = _run(optimizer, params)["neck"]["fc1"]
  rule = _numpy_adamw if name == "adamw" else _numpy_sgd
  options = {} if name == "adamw" else {"momentum": 0.8}
  old = params["neck"]["fc1"]
  np.testing.assert_allclose(
    found["kernel"],
    rule(old["kernel"], rate=0.1, decay=0.01, **options),
    rtol=1e-4,
    atol=1e-5,
  )
  # Biases: no decay, and their own factor.
  np.testing.assert_allclose(
    found["bias"],
    rule(old["bias"], rate=0.1 * bias_lr_factor, decay=0.0, **options),
    rtol=1e-4,
    atol=1e-5,
  )


def test_rate_follows_the_schedule():
  params = {"neck": {"bias": jnp.zeros(1)}}
  optimizer = make_optimizer(
    params,
    name="sgd",
    schedule=step_decay(learning_rate=1.0, boundaries=(2,)),
    weight_decay=0.0,
    momentum=0.0,
    trained=("neck",),
  )
  # -(1 + 2 + 0.1 * 3)
  found = _run(optimizer, params)["neck"]["bias"]
  np.testing.assert_allclose(found, [-3.3], rtol=1e-5)


@pytest.mark.parametrize(
  ("trained", "frozen", "moving"),
  [
    (("extractor", "neck"), (), {"stem1", "res2_0", "fc1"}),
    (("extractor", "neck"), ("extractor/backbone/",), {"fc1"}),
    (
      ("extractor", "neck"),
      ("extractor/backbone/stem[123]",),
      {"res2_0", "fc1"},
    ),
    (("extractor/backbone", "tag_head"), (), {"stem1", "res2_0", "Dense_0"}),
    # From the start of the path: no layer begins with "fc1".
    (("fc1", "tag_head"), (), {"Dense_0"}),
  ],
)
def test_what_is_frozen_keeps_its_value(trained, frozen, moving):
  params = _params()
  optimizer = make_optimizer(
    params,
    name="sgd",
    schedule=optax.constant_schedule(0.1),
    weight_decay=0.5,  # would change a parameter without any gradient
    trained=trained,
    frozen=frozen,
  )
  after = jax.tree_util.tree_leaves_with_path(_run(optimizer, params))
  before = jax.tree.leaves(params)
  for (path, new), old in zip(after, before, strict=True):
    same = np.array_equal(new, old)
    assert same == (path[-2].key not in moving), path


def test_faults_are_named():
  options = {
    "schedule": optax.constant_schedule(0.1),
    "weight_decay": 0.0,
  }
  with pytest.raises(ValueError, match="'lion'"):
    make_optimizer(_params(), name="lion", trained=("neck",), **options)
  with pytest.raises(ValueError, match="no parameter is trained"):
    make_optimizer(_params(), name="sgd", trained=("nekc",), **options)
  with pytest.raises(ValueError, match="no parameter is trained"):
    make_optimizer(
      _params(), name="sgd", trained=("neck",), frozen=("neck",), **options
    )
