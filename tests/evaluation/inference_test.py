"""From scores to detections, worked by hand."""

import jax
import numpy as np
import pytest

from jtsm_jax.evaluation.inference import (
  DetectionSettings,
  detect,
  make_mask_step,
  make_score_step,
  superpixel_votes,
)
from jtsm_jax.mining import cells
from jtsm_jax.types import Proposals, pack_members
from tests import tiny

# Superpixels of 1, 2, 3 and 4 pixels in one row. Proposals and their pixels:
#   0: {2}     3
#   1: {1, 2}  5, IoU 3/5 with 0
#   2: {2, 3}  7, IoU 3/7 with 0 and 3/9 with 1
#   3: {0, 2}  4, IoU 3/4 with 0
MEMBERSHIP = np.array(
  [[0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0]], bool
)
PROPOSALS = Proposals(
  superpixels=np.repeat(np.arange(4), [1, 2, 3, 4])[None].astype(np.int32),
  member_bits=pack_members(MEMBERSHIP),
  boxes=np.array([[0, 3, 1, 6], [0, 1, 1, 6], [0, 3, 1, 10], [0, 0, 1, 6]]),
  scores=np.ones(4, np.float32),
)


def _detect(scores, **settings):
  found = detect(
    np.array(scores, np.float32),
    PROPOSALS,
    settings=DetectionSettings(**settings),
  )
  return found, list(zip(found.proposal, found.category, strict=True))


def test_suppression_by_mask_iou_class_by_class():
  # Class 0: proposal 0 suppresses 1 (0.6) and 3 (0.75) but not 2 (3/7).
  # Class 1: nothing of class 0 counts; 1 is better than 0 and suppresses it.
  scores = [[0.9, 0.3], [0.8, 0.7], [0.5, 0.0], [0.4, 0.0]]
  found, kept = _detect(scores)
  assert kept == [(0, 0), (1, 1), (2, 0)]
  np.testing.assert_allclose(found.score, [0.9, 0.7, 0.5], rtol=1e-6)
  np.testing.assert_array_equal(found.boxes, PROPOSALS.boxes[[0, 1, 2]])
  assert found.size == (1, 10)
  # At 0.6 the IoU of 0.6 is not above the threshold.
  kept = _detect(scores, nms_iou=0.6)[1]
  assert kept == [(0, 0), (1, 0), (1, 1), (2, 0), (0, 1)]


def test_of_equal_scores_the_better_proposal_is_kept():
  count = 100  # of one superpixel each; numpy's other sorts mix up so many
  proposals = Proposals(
    superpixels=np.arange(count, dtype=np.int32)[None],
    member_bits=pack_members(np.eye(count, dtype=bool)),
    boxes=np.array([[0, i, 1, i + 1] for i in range(count)]),
    scores=np.ones(count, np.float32),
  )
  scores = np.ones((count, 2), np.float32)
  scores[::3] = 0.5
  found = detect(scores, proposals)
  wanted = [i for i in range(count) if i % 3]
  assert found.proposal.tolist() == (wanted + wanted)[:100]
  assert (np.diff(found.category) >= 0).all()


def test_suppression_by_box_iou():
  # Boxes of columns 3-6, 1-6, 3-10, 0-6: IoU of 0 with 1 is 3/5, with 2 3/7,
  # with 3 3/6; of 2 with 3 it is 3/10, though they share more than half of 3.
  scores = [[0.9], [0.0], [0.5], [0.4]]
  assert _detect(scores, nms_kind="boxes")[1] == [(0, 0), (2, 0), (3, 0)]
  kept = _detect(scores, nms_kind="boxes", nms_iou=0.45)[1]
  assert kept == [(0, 0), (2, 0)]
  assert _detect(scores)[1] == [(0, 0), (2, 0)]


def test_what_is_suppressed_suppresses_nobody():
  # 1 falls to 0 (0.6 > 0.4); 2 overlaps 1 by 1/3 and 0 by 3/7.
  scores = [[0.9], [0.8], [0.7], [0.0]]
  assert _detect(scores, nms_iou=0.45)[1] == [(0, 0), (2, 0)]
  scores = [[0.0], [0.8], [0.7], [0.6]]
  # 3 overlaps 1 by 3/6 and 2 by 3/8.
  assert _detect(scores, nms_iou=0.4)[1] == [(1, 0), (2, 0)]


def test_limits_of_score_and_number():
  scores = [[0.9, 0.3], [0.0, 0.7], [0.5, 0.2], [0.0, 0.0]]
  assert _detect(scores, min_score=0.25)[1] == [(0, 0), (1, 1), (2, 0)]
  assert _detect(scores, max_detections=2)[1] == [(0, 0), (1, 1)]
  found, kept = _detect(np.zeros((4, 2)))
  assert kept == []
  assert found.boxes.shape == (0, 4)


def test_superpixels_take_the_mean_of_the_proposals_that_hold_them():
  members = np.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool)
  proposals = Proposals(
    # Areas 2, 1, 3, 4: both proposals, of 3 and of 1 pixels.
    superpixels=np.repeat(np.arange(4), [2, 1, 3, 4])[None],
    member_bits=pack_members(members),
    boxes=np.zeros((2, 4), np.int32),
    scores=np.ones(2, np.float32),
  )
  scores = np.array([[0.2, 1.0], [0.8, 0.5]], np.float32)
  found = superpixel_votes(scores, proposals)
  np.testing.assert_allclose(found[0], scores[0], rtol=1e-6)
  # The smaller one has the larger say.
  assert 0.5 < found[1, 0] < 0.8
  assert 0.5 < found[1, 1] < 0.75
  np.testing.assert_array_equal(found[2:], np.zeros((2, 2)))


@pytest.mark.parametrize("num_refinements", [0, 2])
def test_scores_are_the_mean_of_the_heads_or_the_scaled_mil_scores(
  num_refinements,
):
  model = tiny.make_model(num_refinements=num_refinements, instance=False)
  batch = tiny.make_batch()
  batch.valid[0, 9:] = False
  variables = tiny.make_variables(model, batch)
  found = jax.device_get(make_score_step(model)(variables, batch))
  features = model.apply(variables, batch, method="features")
  outputs = model.apply(variables, features, batch, method="mine")
  if num_refinements:
    heads = np.stack(outputs.refinement_logits).astype(np.float64)
    heads = np.exp(heads) / np.exp(heads).sum(-1, keepdims=True)
    expected = heads.mean(0)[..., : tiny.K]
    expected = np.where(batch.valid[..., None], expected, 0)
    np.testing.assert_allclose(found.proposals, expected, atol=1e-5)
  else:
    # The best proposal of a class has the image's score of the class.
    np.testing.assert_allclose(found.proposals.max(1), found.image, rtol=1e-5)
    mil = np.asarray(outputs.mil_scores)
    np.testing.assert_array_equal(found.proposals.argmax(1), mil.argmax(1))
  assert not found.proposals[0, 9:].any()
  np.testing.assert_allclose(found.image, outputs.image_scores, rtol=1e-5)
  np.testing.assert_allclose(found.semantic.sum(-1), 1, rtol=1e-5)


def test_maps_of_cells_have_a_say():
  model, batch = tiny.make_model(cells=True), tiny.make_batch()
  variables = tiny.make_variables(model, batch)
  found = make_score_step(model)(variables, batch)
  without = make_score_step(model.clone(cells=None))(variables, batch)
  features = model.apply(variables, batch, method="features")
  logits = model.apply(variables, features, method="cell_logits")
  inside = model.inside(batch)
  maps = cells.class_maps(logits, inside)
  np.testing.assert_allclose(
    found.proposals,
    without.proposals * cells.map_overlap(maps, batch),
    rtol=1e-4,
    atol=1e-7,
  )
  things = tiny.NUM_THINGS
  np.testing.assert_allclose(
    found.image[:, :things], without.image[:, :things], rtol=1e-4
  )
  np.testing.assert_allclose(
    found.image[:, things:],
    cells.map_presence(found.semantic[..., 1:], inside),
    rtol=1e-4,
  )
  stuff = (without.semantic[..., 1:] + maps[..., things:]) / 2
  np.testing.assert_allclose(found.semantic[..., 1:], stuff, atol=1e-5)
  np.testing.assert_allclose(
    found.semantic.sum(-1), np.where(inside, 1, 0.5), rtol=1e-5
  )


@pytest.mark.parametrize("block", [8, 16, 400])
def test_blocks_of_proposals_change_nothing(block):
  model = tiny.make_model(center=True, average=True)
  batch = tiny.make_batch()  # 12 proposals: one block and a half of 8
  batch.valid[0, 9:] = False
  variables = tiny.make_variables(model, batch)
  wanted = make_score_step(model)(variables, batch)
  found = make_score_step(model, proposal_block=block)(variables, batch)
  np.testing.assert_allclose(found.proposals, wanted.proposals, atol=1e-6)
  np.testing.assert_allclose(found.image, wanted.image, rtol=1e-6)


@pytest.mark.parametrize("block", [4, -8])
def test_impossible_blocks(block):
  model, batch = tiny.make_model(), tiny.make_batch()
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)
  score = make_score_step(model, proposal_block=block)
  with pytest.raises(ValueError, match=f"proposal_block is {block}"):
    jax.eval_shape(score, variables, batch)


def test_mask_step_takes_the_channel_of_the_class():
  model = tiny.make_model(semantic=False)
  batch = tiny.make_batch(1)
  variables = tiny.make_variables(model, batch)
  features = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype("f")
  boxes = batch.boxes[:, :3]
  category = np.array([[2, 0, 1]])
  found = make_mask_step(model)(variables, features, boxes, category)
  logits = np.asarray(
    model.apply(variables, features, boxes, method="instance_logits")
  )
  for n, c in enumerate(category[0]):
    expected = 1 / (1 + np.exp(-logits[0, n, :, :, c]))
    np.testing.assert_allclose(found[0, n], expected, atol=1e-4)
