"""Heads against numpy written from section 3.2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.models.neck_and_heads import (
  SCORE_EPSILON,
  MiningHeads,
  Neck,
  TagHead,
  image_scores,
  mil_scores,
)

KEY = jax.random.key(1)


def _softmax(x, axis):
  e = np.exp(x - x.max(axis, keepdims=True))
  return e / e.sum(axis, keepdims=True)


def _logits(seed=0, shape=(2, 6, 4)):
  rng = np.random.default_rng(seed)
  return rng.normal(0, 3, (2, *shape)).astype(np.float32)


def test_mil_scores_are_the_product_of_two_softmaxes():
  classify, detect = _logits()
  valid = np.ones((2, 6), bool)
  valid[1, 4:] = False
  found = np.asarray(mil_scores(classify, detect, valid))
  for b, count in enumerate([6, 4]):
    expected = _softmax(classify[b, :count], 1) * _softmax(detect[b, :count], 0)
    np.testing.assert_allclose(found[b, :count], expected, rtol=1e-5)
    assert not found[b, count:].any()
    y = image_scores(found)[b]
    np.testing.assert_allclose(y, expected.sum(0), rtol=1e-5)


def test_image_scores_stay_inside_zero_and_one():
  # The sum over proposals of shares that add up to 1 times probabilities.
  extreme = 100 * _logits(1)
  y = image_scores(mil_scores(*extreme, np.ones((2, 6), bool)))
  assert float(y.min()) == pytest.approx(SCORE_EPSILON)
  assert float(y.max()) == pytest.approx(1 - SCORE_EPSILON)


def test_image_of_padding_alone_is_finite_with_its_gradient():
  valid = np.zeros((2, 6), bool)

  def total(logits):
    scores = mil_scores(*logits, valid)
    return jnp.log(image_scores(scores)).sum()

  value, gradient = jax.value_and_grad(total)(jnp.array(_logits(2)))
  assert float(value) == pytest.approx(8 * np.log(SCORE_EPSILON), rel=1e-4)
  np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_heads_are_linear_and_parallel():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(2, 6, 5)).astype(np.float32)
  valid = np.ones((2, 6), bool)
  model = MiningHeads(num_classes=4, num_refinements=3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, valid)
  params = jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32), shapes
  )["params"]
  found = jax.jit(model.apply)({"params": params}, x, valid)

  def dense(name):
    return x @ params[name]["kernel"] + params[name]["bias"]

  expected = _softmax(dense("mil_classes"), 2) * _softmax(
    dense("mil_proposals"), 1
  )
  np.testing.assert_allclose(found.mil_scores, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.image_scores, expected.sum(1), rtol=1e-4)
  assert len(found.refinement_logits) == 3
  for r, logits in enumerate(found.refinement_logits, start=1):
    assert logits.shape == (2, 6, 5)  # the background is the last
    np.testing.assert_allclose(
      logits, dense(f"refinement_{r}"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("zero_init", [True, False])
def test_zero_init_starts_all_proposals_equal(zero_init):
  x = jnp.array(np.random.default_rng(4).normal(size=(1, 6, 5)), jnp.float32)
  heads = MiningHeads(num_classes=4, num_refinements=0, zero_init=zero_init)
  found, _ = heads.init_with_output(
    jax.random.key(0), x, jnp.ones((1, 6), bool)
  )
  equal = np.allclose(found.mil_scores, 1 / 4 / 6, rtol=1e-5)
  assert equal == zero_init
  assert found.refinement_logits == ()


def test_neck_is_relu_layers_and_nothing_without_widths():
  rng = np.random.default_rng(5)
  x = rng.normal(size=(1, 3, 4)).astype(np.float32)
  params = {
    f"fc{i}": {
      "kernel": rng.normal(size=shape).astype(np.float32),
      "bias": rng.normal(size=shape[1]).astype(np.float32),
    }
    for i, shape in ((1, (4, 6)), (2, (6, 5)))
  }
  expected = x
  for layer in params.values():
    expected = np.maximum(expected @ layer["kernel"] + layer["bias"], 0)
  found = Neck(widths=(6, 5)).apply({"params": params}, x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  found = Neck(widths=()).apply({}, x)
  np.testing.assert_array_equal(found, x)


def _dropped(neck, x):
  """Which outputs stayed; those that did are doubled to keep the mean."""
  variables = neck.init(jax.random.key(0), x)
  trained = neck.apply(variables, x, keys=jax.random.split(KEY, len(x)))
  plain = neck.apply(variables, x)
  kept = np.asarray(trained) != 0
  np.testing.assert_allclose(trained[kept], 2 * plain[kept], rtol=1e-6)
  return kept


def test_dropout_is_drawn_for_each_value():
  # The bias alone keeps every unit above 0.
  kept = _dropped(Neck(widths=(8,), dropout=0.5), jnp.zeros((4, 100, 8)))
  assert float(kept.mean()) == pytest.approx(0.5, abs=0.05)
  assert (kept[:, 0] != kept[:, 1]).any()


@pytest.mark.parametrize("share", [False, True])
def test_input_dropout_may_be_shared_by_the_proposals_of_an_image(share):
  neck = Neck(widths=(), input_dropout=0.5, share_input_dropout=share)
  kept = _dropped(neck, jnp.ones((400, 3, 8)))
  assert float(kept.mean()) == pytest.approx(0.5, abs=0.05)
  assert bool((kept == kept[:, :1]).all()) == share
  assert (kept[0] != kept[1]).any()


@pytest.mark.parametrize("share", [False, True])
def test_dropout_belongs_to_the_image_and_the_proposal(share):
  # However a batch and its proposals are divided, each loses the same values.
  neck = Neck(
    widths=(6,), dropout=0.5, input_dropout=0.25, share_input_dropout=share
  )
  x = jnp.asarray(np.random.default_rng(8).normal(size=(4, 7, 5)))
  variables = neck.init(jax.random.key(0), x)
  keys = jax.random.split(KEY, 4)
  whole = neck.apply(variables, x, keys=keys)
  part = neck.apply(variables, x[1:3, 4:], keys=keys[1:3], first=4)
  np.testing.assert_allclose(part, whole[1:3, 4:], rtol=1e-6)
  other = neck.apply(variables, x[1:3, 4:], keys=keys[1:3])
  assert (np.asarray(other) != np.asarray(part)).any()


def test_input_and_layers_lose_different_values():
  x = jnp.ones((50, 4, 8))
  streams = []
  for rates in ({"input_dropout": 0.5}, {"dropout": 0.5}):
    neck = Neck(widths=(8,), **({"dropout": 0.0} | rates))
    kernel = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    found = neck.apply(
      {"params": {"fc1": kernel}}, x, keys=jax.random.split(KEY, len(x))
    )
    streams.append(np.asarray(found) != 0)
  assert (streams[0] == streams[1]).mean() == pytest.approx(0.5, abs=0.05)


def test_tag_head_averages_the_cells_of_the_image():
  rng = np.random.default_rng(6)
  features = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  inside = np.zeros((2, 3, 4), bool)
  inside[0, :2, :3] = inside[1] = True
  kernel = rng.normal(size=(5, 2)).astype(np.float32)
  variables = {"params": {"Dense_0": {"kernel": kernel, "bias": np.zeros(2)}}}
  found = TagHead(num_classes=2).apply(variables, features, inside)
  mean = np.stack([features[0, :2, :3].mean((0, 1)), features[1].mean((0, 1))])
  np.testing.assert_allclose(found, mean @ kernel, rtol=1e-4, atol=1e-5)
