"""Tests of the score and of the diverse choice."""

from __future__ import annotations

import numpy as np
import pytest

from jtsm_jax.proposals import generate, ranking
from jtsm_jax.proposals.candidates import Candidates


def two_candidates(**changed):
  """Two equal candidates but for the given pairs of values."""
  values = dict(
    rank=[5.0, 5.0],
    consensus=[1, 1],
    is_pair=[False, False],
    area=[100.0, 100.0],
    perimeter=[40.0, 40.0],
    outer=[1.0, 1.0],
    inner=[0.5, 0.5],
    borders=[0, 0],
  )
  values |= changed
  return Candidates(
    membership=np.eye(2, dtype=bool),
    **{k: np.array(v) for k, v in values.items()},
  )


@pytest.mark.parametrize(
  ("cue", "better", "worse"),
  [
    ("rank", 2.0, 50.0),
    ("consensus", 4, 1),
    ("is_pair", False, True),
    ("perimeter", 40.0, 90.0),
    ("outer", 2.0, 0.5),
    ("borders", 2, 4),
  ],
)
def test_each_cue_has_its_sign(cue, better, worse):
  scores = ranking.score(two_candidates(**{cue: [worse, better]}))
  assert np.isfinite(scores).all()
  assert scores[1] > scores[0]


def test_score_by_hand():
  found = ranking.score(
    two_candidates(rank=[4.0, 1.0], area=[25.0, 100.0]),
    ranking.RankingWeights(
      rank=-1, outer=0, inner=0, roughness=0, area=0.5, consensus=0
    ),
  )
  np.testing.assert_allclose(found, [-np.log(4) + 0.5 * np.log(0.25), 0])


def test_object_outranks_random_unions():
  """The square of an image against unions of some of its superpixels."""
  image = np.full((96, 96, 3), (70, 110, 70), np.float64)
  image[30:70, 20:60] = (190, 70, 50)
  rng = np.random.default_rng(0)
  image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255)
  proposals = generate.generate_proposals(image.astype(np.uint8))
  target = np.zeros((96, 96), bool)
  target[30:70, 20:60] = True
  masks = proposals.membership[:, proposals.superpixels]
  iou = (masks & target).sum((1, 2)) / (masks | target).sum((1, 2))
  assert iou.argmax() < 5
  assert iou.max() > 0.9


def greedy(membership, sizes, scores, count, levels):
  """The definition of `select`, as a plain loop."""
  taken = []
  order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
  for level in levels:
    for n in order:
      if n in taken or len(taken) == count:
        continue
      a = membership[n]
      overlaps = [
        sizes[a & membership[k]].sum() / sizes[a | membership[k]].sum()
        for k in taken
      ]
      if all(o <= level for o in overlaps):
        taken.append(n)
  return taken


@pytest.mark.parametrize("count", [3, 40, 1000])
@pytest.mark.parametrize("block", [7, 256])
def test_select_equals_the_loop(monkeypatch, count, block):
  monkeypatch.setattr(ranking, "BLOCK", block)
  rng = np.random.default_rng(2)
  membership = rng.random((150, 9)) < 0.7
  membership = membership[membership.any(1)]
  sizes = rng.integers(1, 50, 9).astype(np.float64)
  scores = rng.integers(0, 30, len(membership)).astype(np.float64)  # with ties
  levels = (0.5, 0.8)
  chosen = ranking.select(
    membership, sizes, scores, max_proposals=count, overlap_levels=levels
  )
  assert list(chosen) == greedy(membership, sizes, scores, count, levels)
