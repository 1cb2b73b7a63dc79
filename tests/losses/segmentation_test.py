"""Eq. 9 and Eq. 10 worked by hand, and the targets that they compare with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.losses.segmentation import (
  IGNORE,
  instance_loss,
  instance_targets,
  sample_instances,
  semantic_loss,
  semantic_targets,
)
from jtsm_jax.types import PseudoMasks
from tests import tiny

T = tiny.NUM_THINGS


def _keys(seed, count):
  return jax.random.split(jax.random.key(seed), count)


def _logit(probability):
  probability = np.asarray(probability, np.float64)
  return np.log(probability / (1 - probability))


def _instance_case():
  """Three boxes of 1 x 2 pixels and two classes; the third box is padding.

  Box 0, class 1, y = 0.5: probabilities 1/2 and 1/4 against 1 and 0:
    (ln 2 + ln 4/3) / 2 = (0.693147 + 0.287682) / 2 = 0.490415
  Box 1, class 0, y = 0.8: probabilities 1/4 and 1/2 against 1 and 1:
    (ln 4 + ln 2) / 2 = 1.039721
  Weighted: (0.5 * 0.490415 + 0.8 * 1.039721) / 2 = 0.538492
  """
  wrong = 0.999  # the channels of the other class must not matter
  probability = np.full((1, 3, 1, 2, 2), wrong)
  probability[0, 0, 0, :, 1] = 1 / 2, 1 / 4
  probability[0, 1, 0, :, 0] = 1 / 4, 1 / 2
  targets = np.array([[[[1, 0]], [[1, 1]], [[0, 0]]]], np.float32)
  category = np.array([[1, 0, 1]])
  weight = np.array([[0.5, 0.8, 0.7]], np.float32)
  valid = np.array([[True, True, False]])
  logits = jnp.array(_logit(probability), jnp.float32)
  return logits, targets, category, weight, valid


def test_equation_9_by_hand():
  logits, targets, category, weight, valid = _instance_case()
  found = instance_loss(logits, targets, category, weight, valid)
  assert float(found) == pytest.approx(0.538492, abs=1e-5)
  ones = np.ones_like(weight)
  found = instance_loss(logits, targets, category, ones, valid)
  assert float(found) == pytest.approx((0.490415 + 1.039721) / 2, abs=1e-5)
  nothing = instance_loss(logits, targets, category, weight, ~valid & valid)
  assert float(nothing) == 0


def test_equation_9_moves_the_channel_of_the_class_only():
  logits, *others = _instance_case()
  gradient = np.array(jax.grad(instance_loss)(logits, *others))
  assert np.all(gradient[0, 0, ..., 1] != 0)
  assert np.all(gradient[0, 1, ..., 0] != 0)
  gradient[0, 0, ..., 1] = gradient[0, 1, ..., 0] = 0
  np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_equation_10_by_hand():
  # Four cells of three labels (a thing, two stuff classes), odds again:
  #   1 : 1 : 2, label 0:  -ln 1/4 = 1.386294
  #   1 : 2 : 1, label 1:  -ln 1/2 = 0.693147
  #   5 : 2 : 1, label 2:  -ln 1/8 = 2.079442
  #   anything, not covered
  odds = np.array([[[[1, 1, 2], [1, 2, 1]], [[5, 2, 1], [1, 9, 9]]]])
  targets = np.array([[[0, 1], [2, IGNORE]]])
  found = semantic_loss(jnp.log(jnp.array(odds, jnp.float32)), targets)
  expected = (1.386294 + 0.693147 + 2.079442) / 3
  assert float(found) == pytest.approx(expected, abs=1e-5)
  nothing = semantic_loss(jnp.zeros((1, 2, 2, 3)), np.full((1, 2, 2), IGNORE))
  assert float(nothing) == 0


def test_equation_10_resizes_the_logits_linearly():
  # Twice as many columns: the middles lie at -1/4, 1/4, 3/4 and 5/4 cells,
  # which gives the first cell's logits, 3/4 and 1/4 of it, and the second's.
  cells = np.array([[2.0, 0.0], [-1.0, 1.0]])
  shares = np.array([1, 0.75, 0.25, 0])[:, None]
  logits = shares * cells[0] + (1 - shares) * cells[1]
  labels = [0, 1, 1, 0]
  log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  expected = -log_softmax[np.arange(4), labels].mean()
  found = semantic_loss(
    jnp.array(cells, jnp.float32)[None, None], np.array([[labels]])
  )
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_all_labelled_things_are_sampled_when_they_fit():
  # Classes 0 .. 2 are things, 3 and 4 stuff, 5 background; weight 0: ignored.
  label = [[0, 3, 2, 5, 1, 2], [5, 5, 4, 3, 5, 1]]
  weight = [[0.5, 0.5, 0.0, 0.5, 0.1, 0.9], [0.5] * 6]
  mined = tiny.make_mined([[0], [0]], [[1], [1]]).replace(
    label=jnp.array(label), weight=jnp.array(weight)
  )
  for seed in range(5):
    index, valid = sample_instances(
      _keys(seed, 2), mined, num_things=T, count=4
    )
    assert index.shape == valid.shape == (2, 4)
    chosen = [set(i[v].tolist()) for i, v in zip(index, valid, strict=True)]
    assert chosen == [{0, 4, 5}, {5}]


def test_samples_are_distinct_labelled_and_differ_with_the_key():
  rng = np.random.default_rng(0)
  label = rng.integers(0, tiny.K + 1, (3, 40))
  mined = tiny.make_mined([[0]] * 3, [[1]] * 3).replace(
    label=jnp.array(label), weight=jnp.ones((3, 40))
  )
  draws = []
  for seed in range(4):
    index, valid = sample_instances(
      _keys(seed, 3), mined, num_things=T, count=5
    )
    assert bool(valid.all())  # there are more than five of each
    assert all(len(set(row)) == 5 for row in index.tolist())
    assert (np.take_along_axis(label, np.asarray(index), 1) < T).all()
    draws.append(index.tolist())
  assert all(draw != draws[0] for draw in draws[1:])


def test_fewer_proposals_than_samples():
  mined = tiny.make_mined([[0]], [[1]]).replace(
    label=jnp.array([[0, 5]]), weight=jnp.ones((1, 2))
  )
  index, valid = sample_instances(_keys(0, 1), mined, num_things=T, count=64)
  assert index[valid].tolist() == [0]


def test_instance_targets_are_the_mask_at_the_cell_middles():
  rng = np.random.default_rng(1)
  masks = rng.random((2, 9, 11)) < 0.5
  boxes = np.array([[0, 0, 9, 11], [1.2, 2.3, 6.9, 9.4], [3, 4, 4, 5]])
  boxes = np.append(boxes, [[5, 7, 12, 14]], 0).astype(np.float32)
  slot = np.array([0, 1, 1, 0])
  found = instance_targets(masks, slot, boxes, size=5)
  expected = np.zeros((4, 5, 5))
  for n, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
    for i in range(5):
      for j in range(5):
        y = int(y0 + (i + 0.5) * (y1 - y0) / 5)
        x = int(x0 + (j + 0.5) * (x1 - x0) / 5)
        # A box that reaches over the border sees the border's pixels.
        expected[n, i, j] = masks[slot[n], min(y, 8), min(x, 10)]
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, expected)


def test_semantic_targets_are_painted_stuff_first_then_things():
  # Slots: stuff 3 with 0.9, thing 2 with 0.1, stuff 4 with 0.5, and an unused
  # one. Columns: what covers them, and what a painter leaves visible.
  #   0: stuff 3 and stuff 4 -> the better one, 3 -> label 1
  #   1: stuff 4 alone       -> label 2
  #   2: all three           -> the thing, though its score is the lowest: 0
  #   3: the thing alone     -> 0
  #   4: the unused slot     -> uncovered
  #   5: stuff 3 alone       -> 1
  covers = np.array(
    [
      [1, 0, 1, 0, 0, 1],
      [0, 0, 1, 1, 0, 0],
      [1, 1, 1, 0, 0, 0],
      [1, 1, 1, 1, 1, 1],
    ],
    bool,
  )
  mined = tiny.make_mined([[3, 2, 4, 0]], [[0.9, 0.1, 0.5, 1.0]])
  for unused in ("pseudo", "mined"):
    used = np.array([[True, True, True, False]])
    everything = np.ones_like(used)
    pseudo = PseudoMasks(
      covers[None, :, None], used if unused == "pseudo" else everything
    )
    found = semantic_targets(
      pseudo,
      mined.replace(valid=used if unused == "mined" else everything),
      num_things=T,
    )
    assert found.tolist() == [[[1, 2, 0, 0, IGNORE, 1]]]


def test_semantic_targets_against_a_painter():
  rng = np.random.default_rng(2)
  masks = rng.random((3, 6, 5, 7)) < 0.3
  valid = rng.random((3, 6)) < 0.8
  category = rng.integers(0, tiny.K, (3, 6))
  score = rng.random((3, 6)) * 20  # any order-preserving scores
  expected = np.full((3, 5, 7), IGNORE)
  for b in range(3):
    for m in np.argsort(score[b]):
      if valid[b, m] and category[b, m] >= T:
        expected[b][masks[b, m]] = category[b, m] - T + 1
    for m in range(6):
      if valid[b, m] and category[b, m] < T:
        expected[b][masks[b, m]] = 0
  found = semantic_targets(
    PseudoMasks(masks, valid), tiny.make_mined(category, score), num_things=T
  )
  np.testing.assert_array_equal(found, expected)
