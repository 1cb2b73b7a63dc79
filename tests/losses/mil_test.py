"""Eq. 2 worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.losses.mil import masked_mean, mil_loss, tag_loss
from jtsm_jax.models.neck_and_heads import image_scores, mil_scores

# Two images of three classes. With sums over the classes:
#   first:  -(ln 0.8 + ln(1 - 0.5) + ln(1 - 0.1))
#         = 0.223144 + 0.693147 + 0.105361 = 1.021651
#   second: -(ln(1 - 0.2) + ln 0.25 + ln 0.5)
#         = 0.223144 + 1.386294 + 0.693147 = 2.302585 = ln 10
SCORES = jnp.array([[0.8, 0.5, 0.1], [0.2, 0.25, 0.5]])
TAGS = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


@pytest.mark.parametrize(
  ("valid", "reduction", "expected"),
  [
    ((True, True), "sum", (1.021651 + 2.302585) / 2),
    ((True, True), "mean", (1.021651 + 2.302585) / 6),
    ((True, False), "sum", 1.021651),
    ((False, True), "sum", 2.302585),
    ((False, False), "sum", 0.0),
  ],
)
def test_equation_2_by_hand(valid, reduction, expected):
  found = mil_loss(SCORES, TAGS, valid=jnp.array(valid), reduction=reduction)
  assert float(found) == pytest.approx(expected, abs=1e-5)


def test_unknown_reduction_is_named():
  with pytest.raises(ValueError, match="'max'"):
    mil_loss(SCORES, TAGS, valid=jnp.ones(2, bool), reduction="max")


@pytest.mark.parametrize("num_tags", [0, 1, 3, 5])
def test_zero_logits_say_one_over_k(num_tags):
  # Every proposal has the probability 1 / K of each class, and the shares of
  # the proposals add up to 1: y_c = 1 / K, whatever the number of proposals.
  K = 5
  zeros = jnp.zeros((1, 7, K))
  y = image_scores(mil_scores(zeros, zeros, jnp.ones((1, 7), bool)))
  np.testing.assert_allclose(y, np.full((1, K), 1 / K), rtol=1e-6)
  tags = (jnp.arange(K) < num_tags)[None].astype(jnp.float32)
  expected = -num_tags * np.log(1 / K) - (K - num_tags) * np.log(1 - 1 / K)
  found = mil_loss(y, tags, valid=jnp.array([True]))
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_loss_and_gradient_are_finite_for_certain_scores():
  # All the weight on one proposal and one class: y is 1 there and 0 elsewhere,
  # and the tags say the contrary.
  classify = jnp.zeros((1, 3, 2)).at[0, 0, 0].set(200.0)
  detect = jnp.zeros((1, 3, 2)).at[0, 0].set(200.0)
  tags = jnp.array([[0.0, 1.0]])

  def loss(classify, detect):
    y = image_scores(mil_scores(classify, detect, jnp.ones((1, 3), bool)))
    return mil_loss(y, tags, valid=jnp.array([True]))

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(classify, detect)
  # Both terms are -ln 1e-6, up to the float32 spacing at 1 - 1e-6.
  assert float(value) == pytest.approx(2 * -np.log(1e-6), rel=0.01)
  assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_tag_loss_by_hand():
  # Logit 0: ln 2 each. Logit ln 3 is the probability 3/4: -ln 3/4 where it is
  # tagged and -ln 1/4 where it is not.
  logits = jnp.array([[0.0, np.log(3.0)], [np.log(3.0), 0.0]])
  tags = jnp.array([[1.0, 1.0], [0.0, 0.0]])
  first, second = np.log(2) + np.log(4 / 3), np.log(4) + np.log(2)
  both = tag_loss(logits, tags, valid=jnp.array([True, True]))
  assert float(both) == pytest.approx((first + second) / 2, rel=1e-5)
  one = tag_loss(logits, tags, valid=jnp.array([False, True]))
  assert float(one) == pytest.approx(second, rel=1e-5)


def test_masked_mean_counts_only_the_valid():
  values = jnp.array([[1.0, 2.0], [10.0, 99.0]])
  valid = jnp.array([[True, True], [True, False]])
  assert float(masked_mean(values, valid)) == pytest.approx(13 / 3)
  assert float(masked_mean(values, jnp.zeros((2, 2), bool))) == 0
