"""The whole prediction on a toy model, against what its scores say."""

import numpy as np

from jtsm_jax.evaluation import predict as predict_lib
from jtsm_jax.evaluation.predict import PredictionSettings
from jtsm_jax.types import Proposals, pack_members

SETTINGS = PredictionSettings(
  canvases=((32, 64), (64, 32)),
  batch_size=2,
  max_proposals=4,
  max_superpixels=4,
  flip=True,
)


def _halves(height, width):
  """Two superpixels, left and right; a proposal of each."""
  superpixels = (np.arange(width) >= width // 2).astype(np.int32)
  return Proposals(
    superpixels=np.tile(superpixels, (height, 1)),
    member_bits=pack_members(np.eye(2, dtype=bool)),
    boxes=np.array(
      [[0, 0, height, width // 2], [0, width // 2, height, width]], np.int32
    ),
    scores=np.array([2.0, 1.0], np.float32),
  )


def test_maps_of_a_canvas_come_back_to_the_image():
  # An image of 20 x 30 lies on 42 of 64 columns and 28 of 32 rows; the value of
  # each cell is its own position, so the image must show a ramp.
  cells = np.mgrid[0:4, 0:8].transpose(1, 2, 0).astype(np.float32)
  found = predict_lib._to_image(cells, np.array([28, 42]), (20, 30), (32, 64))
  y = (np.arange(20) + 0.5) * 28 / 20 / 8 - 0.5
  x = (np.arange(30) + 0.5) * 42 / 30 / 8 - 0.5
  np.testing.assert_allclose(found[:, 7, 0], y.clip(0, 3), atol=0.05)
  np.testing.assert_allclose(found[7, :, 1], x.clip(0, 7), atol=0.05)


def test_a_mirrored_view_is_mirrored_back():
  proposals = _halves(16, 32)
  scores = np.zeros((2, 3), np.float32)  # 1 thing, 2 stuff: no votes
  left = np.zeros((4, 8, 3), np.float32)
  left[:, :4, 1], left[:, 4:, 2] = 1, 1
  views = [(left, False), (left[:, ::-1], True)]
  label, score = predict_lib._stuff_map(
    scores,
    proposals,
    views,
    np.array([32, 64]),
    (32, 64),
    np.ones(3, bool),
    1,
    SETTINGS,
  )
  assert (label[:, :14] == 1).all()
  assert (label[:, 18:] == 2).all()
  assert score[:, 0].min() > 0.9


def test_votes_decide_where_there_is_no_semantic_branch():
  proposals = _halves(16, 32)
  scores = np.array([[0.1, 0.8, 0.2], [0.1, 0.2, 0.8]], np.float32)
  size = np.array([32, 64])
  label, _ = predict_lib._stuff_map(
    scores, proposals, [], size, (32, 64), np.ones(3, bool), 1, SETTINGS
  )
  np.testing.assert_array_equal(label, proposals.superpixels + 1)
  absent = np.array([True, False, True])
  label, _ = predict_lib._stuff_map(
    scores, proposals, [], size, (32, 64), absent, 1, SETTINGS
  )
  assert (label == 2).all()
