"""Tests of the order of candidates."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import generate, ranking
from jtsm_jax.proposals.candidates import NO_NODE, Candidates, Moments


def two_candidates(**changed):
  """Two candidates of 10 x 10 pixels that differ in the given values alone."""
  same = dict(
    tree=0,
    first=0,
    second=NO_NODE,
    rank=5.0,
    rank_of_coarser=5.0,
    consensus=1,
    node_consensus=1,
    area=100.0,
    boxes=(20, 20, 30, 30),
    perimeter=40.0,
    inner_length=30.0,
    outer=(1.0, 1.0),
    inner=(0.5, 0.5),
    joint_strength=0.0,
    joint_length=0.0,
    balance=0.0,
  )
  values = {k: np.array([v, v]) for k, v in same.items()}
  values |= {k: np.array(v) for k, v in changed.items()}
  moments = Moments(np.zeros((2, 3)), np.ones(2), np.ones(2))
  return Candidates(orders=[], colour=moments, deep=[], activity=None, **values)


@pytest.mark.parametrize(
  ("field", "better", "worse"),
  [
    ("rank", 2.0, 50.0),
    ("consensus", 4, 1),
    ("second", NO_NODE, 3),
    ("perimeter", 40.0, 90.0),
    ("outer", (2.0, 1.0), (0.5, 1.0)),
    ("boxes", (0, 0, 30, 30), (0, 0, 60, 80)),
  ],
)
def test_hand_set_weights_have_their_signs(field, better, worse):
  scores = ranking.score(
    two_candidates(**{field: [worse, better]}), (60, 80), ranker="unfitted"
  )
  assert np.isfinite(scores).all()
  assert scores[1] > scores[0]


def test_hand_set_score_by_hand():
  found = ranking.score(
    two_candidates(rank=[4.0, 1.0]), (60, 80), ranker="unfitted"
  )
  common = (
    np.log(1.05)
    + 0.3 * np.log(0.55)
    - 0.7 * np.log(41 / 10)
    + 0.2 * np.log(100 / 4800)
  )
  np.testing.assert_allclose(found, [common - np.log(4), common])


def test_cues_of_a_box():
  boxes = [(0, 10, 20, 30), (30, 0, 60, 80)]
  cues = ranking.ranking_cues(two_candidates(boxes=boxes), (60, 80))
  np.testing.assert_allclose(cues["fill"], np.log([100 / 400, 100 / 2400]))
  np.testing.assert_allclose(cues["elongation"], [0, np.log(80 / 30)])
  np.testing.assert_allclose(cues["y_centre"], [10 / 60 - 0.5, 0.25])
  np.testing.assert_allclose(cues["x_off_centre"], [0.25, 0])
  np.testing.assert_array_equal(cues["sides"], [1, 3])
  np.testing.assert_array_equal(cues["touches_top"], [1, 0])
  np.testing.assert_array_equal(cues["touches_bottom"], [0, 1])


def test_fitted_score_equals_a_loop():
  rng = np.random.default_rng(0)
  weights = ranking.RankingWeights(
    names=("b", "a"),
    mean=rng.normal(size=2),
    scale=rng.random(2) + 1,
    linear=rng.normal(size=2),
    hidden=rng.normal(size=(2, 3)),
    hidden_bias=rng.normal(size=3),
    output=rng.normal(size=3),
  )
  cues = {k: rng.normal(size=4) for k in "abc"}
  found = weights.score(cues)
  for n in range(4):
    x = [
      (cues[k][n] - m) / s
      for k, m, s in zip("ba", weights.mean, weights.scale, strict=True)
    ]
    expected = sum(w * v for w, v in zip(weights.linear, x, strict=True))
    for d in range(3):
      inner = sum(weights.hidden[f, d] * x[f] for f in range(2))
      expected += weights.output[d] * np.tanh(inner + weights.hidden_bias[d])
    assert found[n] == pytest.approx(expected)


@pytest.mark.parametrize("name", ranking.FITTED)
def test_fitted_weights_ask_for_cues_that_exist(name):
  weights = ranking.fitted_weights(name)
  count, hidden = weights.hidden.shape
  assert len(weights.names) == count == len(weights.linear)
  assert len(weights.output) == hidden
  deep = generate.PRESETS[name].network
  assert ("activity" in weights.names) == deep
  for values in (weights.linear, weights.hidden, weights.output):
    assert np.isfinite(values).all()


@pytest.mark.parametrize("preset", generate.PRESETS)
def test_object_outranks_random_unions(preset):
  """The square of an image against unions of some of its superpixels."""
  image = np.full((96, 96, 3), (70, 110, 70), np.float64)
  image[30:70, 20:60] = (190, 70, 50)
  rng = np.random.default_rng(0)
  image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255)
  proposals = generate.generate_proposals(
    image.astype(np.uint8), preset=preset, max_proposals=500
  )
  target = np.zeros((96, 96), bool)
  target[30:70, 20:60] = True
  masks = proposals.membership[:, proposals.superpixels]
  iou = (masks & target).sum((1, 2)) / (masks | target).sum((1, 2))
  assert iou.argmax() < 10
  assert iou.max() > 0.9
