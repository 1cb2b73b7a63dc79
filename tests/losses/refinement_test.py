"""Eq. 3 worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.losses.refinement import refinement_loss
from tests import tiny

# K = 2 classes and the background, one image of three proposals; the logits are
# logarithms, so that the softmax is read off:
#   p   odds       label   probability   y     y * -ln
#   0   1 : 2 : 1    1         1/2      0.5   0.5 * 0.693147 = 0.346574
#   1   4 : 3 : 1    2         1/8      0.9   0.9 * 2.079442 = 1.871497
#   2   1 : 1 : 2    0         1/4      0.2   0.2 * 1.386294 = 0.277259
ODDS = np.array([[1, 2, 1], [4, 3, 1], [1, 1, 2]])
LABEL = [1, 2, 0]
WEIGHT = [0.5, 0.9, 0.2]
TERMS = (0.346574, 1.871497, 0.277259)


def _mined(label, weight):
  return tiny.make_mined([[0]] * len(label), [[1]] * len(label)).replace(
    label=jnp.array(label, jnp.int32), weight=jnp.array(weight, jnp.float32)
  )


def _loss(logits, label, weight, valid, **options):
  found = refinement_loss(
    jnp.array(logits, jnp.float32),
    _mined(label, weight),
    valid=jnp.array(valid),
    **options,
  )
  return float(found)


@pytest.mark.parametrize(
  ("valid", "total", "count"),
  [
    ((True, True, True), sum(TERMS), 3),
    ((True, False, True), TERMS[0] + TERMS[2], 2),
    ((False, False, False), 0.0, 1),
  ],
)
def test_equation_3_by_hand(valid, total, count):
  arguments = np.log(ODDS)[None], [LABEL], [WEIGHT], [valid]
  assert _loss(*arguments, reduction="sum") == pytest.approx(total, abs=1e-5)
  assert _loss(*arguments) == pytest.approx(total / count, abs=1e-5)


def test_images_are_averaged_and_empty_ones_do_not_count():
  # Image 1 has the first proposal alone, image 2 none.
  valid = [[True] * 3, [True, False, False], [False] * 3]
  found = _loss(np.stack([np.log(ODDS)] * 3), [LABEL] * 3, [WEIGHT] * 3, valid)
  assert found == pytest.approx((sum(TERMS) / 3 + TERMS[0]) / 2, abs=1e-5)


def test_gradient_is_softmax_minus_label_and_weights_have_none():
  logits = jnp.log(jnp.array(ODDS, jnp.float32))[None]
  valid = jnp.ones((1, 3), bool)

  def loss(logits, weight):
    mined = _mined([LABEL], [WEIGHT]).replace(weight=weight)
    return refinement_loss(logits, mined, valid=valid)

  weight = jnp.array([WEIGHT])
  by_logits, by_weight = jax.grad(loss, argnums=(0, 1))(logits, weight)
  softmax = ODDS / ODDS.sum(1, keepdims=True)
  expected = np.array(WEIGHT)[:, None] * (softmax - np.eye(3)[LABEL]) / 3
  np.testing.assert_allclose(by_logits[0], expected, atol=1e-6)
  np.testing.assert_array_equal(by_weight, np.zeros((1, 3)))


def test_unknown_reduction_is_named():
  with pytest.raises(ValueError, match="'none'"):
    _loss(np.log(ODDS)[None], [LABEL], [WEIGHT], [[True] * 3], reduction="none")
