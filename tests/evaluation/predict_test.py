"""The whole prediction on a toy model, against what its scores say."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import pipeline, sampling
from jtsm_jax.evaluation import predict as predict_lib
from jtsm_jax.evaluation.class_calibration import ClassCalibration
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import make_steps
from jtsm_jax.evaluation.predict import PredictionSettings
from jtsm_jax.types import Detections, Proposals, Record, pack_members
from tests import tiny


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


def _view(semantic, *, flip=False, size=(32, 64)):
  """One image on a canvas of 32 x 64; no features."""
  batch = tiny.make_batch(1, image=(32, 64), canvas=(32, 64))
  batch = batch.replace(size=np.array([size]), flip=np.array([flip]))
  return predict_lib._View(batch, semantic and semantic[0][None], None)


def test_views_come_back_to_the_image_and_are_averaged():
  proposals = _halves(16, 32)
  scores = np.zeros((2, 3), np.float32)  # 1 thing, 2 stuff: no votes
  left = np.zeros((4, 8, 3), np.float32)
  left[:, :4, 1], left[:, 4:, 2] = 1, 1
  views = [_view([left]), _view([left[:, ::-1]], flip=True)]
  # A smaller view that sees class 1 everywhere, with the weight of one.
  half = np.zeros((4, 8, 3), np.float32)
  half[:2, :4, 1] = 1
  views.append(_view([half], size=(16, 32)))
  label, score = predict_lib._stuff_map(
    scores, proposals, views, 0, np.ones(3, bool), 1, share=1.0
  )
  assert (label[:, :14] == 1).all()
  assert (label[:, 18:] == 2).all()
  np.testing.assert_allclose(score[:, 0], 1, atol=0.05)
  np.testing.assert_allclose(score[:, -1], 2 / 3, atol=0.05)


def test_votes_decide_where_there_is_no_semantic_branch():
  proposals = _halves(16, 32)
  scores = np.array([[0.1, 0.8, 0.2], [0.1, 0.2, 0.8]], np.float32)
  views = [_view(None)]
  label, _ = predict_lib._stuff_map(
    scores, proposals, views, 0, np.ones(3, bool), 1, share=1.0
  )
  np.testing.assert_array_equal(label, proposals.superpixels + 1)
  absent = np.array([True, False, True])
  label, _ = predict_lib._stuff_map(
    scores, proposals, views, 0, absent, 1, share=1.0
  )
  assert (label == 2).all()


def test_no_stuff_at_all():
  label, score = predict_lib._stuff_map(
    np.ones((2, 3), np.float32),
    _halves(16, 32),
    [_view(None)],
    0,
    np.ones(3, bool),
    3,
    share=1.0,
  )
  assert (label == -1).all()
  assert (score == 0).all()


class _Images:
  """A split of 3 random images, the last one upright."""

  sizes = np.array([[24, 40], [30, 60], [50, 30]], np.int32)
  image_ids = ("a", "b", "c")
  tags = np.zeros((3, tiny.K), np.float32)

  def __len__(self):
    return 3

  def __getitem__(self, i):
    pixels = np.random.default_rng(i).integers(0, 256, (*self.sizes[i], 3))
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, format="PNG")
    return Record(self.image_ids[i], data.getvalue(), *self.sizes[i], ())


SETTINGS = PredictionSettings(
  canvases=((32, 64), (64, 32), (48, 96)),
  batch_size=2,
  max_proposals=3,
  max_superpixels=4,
  flip=True,
)


@pytest.fixture(scope="module")
def toy():
  """A model, images and proposals."""
  model = tiny.make_model()
  steps = make_steps(model, tiny.make_variables(model, tiny.make_batch()))
  source = _Images()
  store = {
    name: _halves(*size)
    for name, size in zip(source.image_ids, source.sizes, strict=True)
  }
  return steps, source, store


def _predict(toy, *, settings=SETTINGS, calibration=None):
  steps, source, store = toy
  return predict_lib.predict(
    steps,
    source,
    store,
    calibration=calibration or ClassCalibration.neutral(tiny.K),
    num_things=tiny.NUM_THINGS,
    settings=settings,
  )


def test_scores_are_the_mean_of_all_views(toy):
  steps, source, store = toy
  groups = list(predict_lib._score(steps.score, source, store, SETTINGS, None))
  assert [g[0][0].batch.image_index.tolist() for g in groups] == [
    [0, 1],
    [2, -1],
  ]
  for (views, proposals, images), canvases in zip(
    groups, [[(32, 64), (48, 96)], [(64, 32)]], strict=True
  ):
    seen = []
    for canvas in canvases:
      for flip in (False, True):
        plan = sampling.BatchPlan(
          canvas,
          views[0].batch.image_index,
          np.full(2, flip),
          sampling.whole_windows(source.sizes, views[0].batch.image_index),
        )
        batch = pipeline.make_batch(
          plan,
          source,
          pipeline.with_fallback(store),
          max_proposals=3,
          max_superpixels=4,
        )
        seen.append(steps.score(batch))
    assert len(views) == len(seen)
    np.testing.assert_allclose(
      proposals, np.mean([s.proposals for s in seen], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
      images, np.mean([s.image for s in seen], 0), rtol=1e-5
    )
    assert not proposals[:, 2].any()  # padding


def test_box_masks_are_the_mean_of_all_views(toy):
  steps, source, store = toy
  views, _, _ = next(
    predict_lib._score(steps.score, source, store, SETTINGS, None)
  )
  detections = {
    i: Detections(
      proposal=np.array([1, 0], np.int32)[: 2 - i],
      category=np.array([2, 0], np.int32)[: 2 - i],
      score=np.ones(2 - i, np.float32),
      boxes=store[name].boxes[[1, 0]][: 2 - i],
      masks=np.zeros((2 - i, 1, 1), bool),
    )
    for i, name in enumerate("ab")
  }
  found = predict_lib._mean_box_masks(steps.masks, views, detections, limit=5)
  assert found[0].shape[0] == 2
  assert found[1].shape[0] == 1
  for i, n, category, proposal in ((0, 0, 2, 1), (0, 1, 0, 0), (1, 0, 2, 1)):
    wanted = []
    for view in views:
      boxes = view.batch.boxes[i][None, [proposal]]
      mask = steps.masks(
        view.features[i : i + 1], boxes, np.array([[category]])
      )[0, 0]
      wanted.append(mask[:, ::-1] if view.batch.flip[i] else mask)
    assert len(wanted) == 4
    np.testing.assert_allclose(found[i][n], np.mean(wanted, 0), atol=1e-5)


def test_scores_are_raised_to_what_is_shown():
  scores = np.array([[0.2, 0.0, 0.1, 0.7], [0.1, 0.0, 0.0, 0.2]], np.float32)
  found = predict_lib.raise_to(scores, 0.5)
  wanted = [[0.5, 0, 0.5, 0.7], [0.25, 0, 0, 0.2]]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert (found[0, [0, 2]] >= 0.5).all()
  assert predict_lib.raise_to(scores[:0], 0.5).shape == (0, 4)


def test_what_is_shown_has_a_segment(toy):
  # Scores of 1e-3 of the best: without help nothing is sure enough.
  neutral = ClassCalibration.neutral(tiny.K)
  image = np.stack([p.image_scores for p in _predict(toy)])
  calibration = dataclasses.replace(
    neutral,
    score_scale=np.full(tiny.K, 1e3, np.float32),
    tag_threshold=np.where(np.arange(tiny.K) == 1, image[:, 1].min(), 2).astype(
      np.float32
    ),
  )

  def predict(show_present):
    detection = dataclasses.replace(SETTINGS.detection, min_score=0)
    settings = dataclasses.replace(
      SETTINGS, show_present=show_present, mask_share=0, detection=detection
    )
    return list(_predict(toy, settings=settings, calibration=calibration))

  def things(prediction):
    segments = prediction.panoptic.segments
    return {s.category for s in segments if s.is_thing}

  assert [things(p) for p in predict(False)] == [set()] * 3
  # Nothing else: no other class reaches its threshold of 2.
  assert [things(p) for p in predict(True)] == [{1}] * 3


def test_what_is_nearest_to_its_threshold_is_present_but_not_raised(toy):
  # No class reaches its threshold; class 1 has the smaller y, and the nearer.
  image = np.stack([p.image_scores for p in _predict(toy)])
  threshold = np.full(tiny.K, 1e3, np.float32)
  threshold[1] = 2 * image[:, 1].max()
  assert (image.argmax(1) != 1).any()
  calibration = ClassCalibration(threshold, np.full(tiny.K, 1e3, np.float32))
  settings = dataclasses.replace(SETTINGS, show_present=True)
  found = list(_predict(toy, settings=settings, calibration=calibration))
  for prediction in found:
    assert prediction.scores[:, 1].all()
    assert not np.delete(prediction.scores, 1, axis=1).any()
    assert not any(s.is_thing for s in prediction.panoptic.segments)


def test_each_image_is_predicted_once(toy):
  _, source, _ = toy
  found = list(_predict(toy))
  assert [p.index for p in found] == [0, 1, 2]
  for prediction in found:
    size = tuple(source.sizes[prediction.index])
    assert prediction.panoptic.ids.shape == size
    assert prediction.detections.masks.shape[1:] == size
    assert prediction.scores.shape == (2, tiny.K)


@pytest.mark.parametrize("rounds", [0, 2])
def test_outlines_of_what_is_shown_follow_the_colours(toy, rounds, monkeypatch):
  _, source, _ = toy

  def follow_colours(image, probability, *, rounds):
    assert rounds == 2
    seen.append((image, probability))
    return np.zeros(probability.shape, bool)

  monkeypatch.setattr(predict_lib, "follow_colours", follow_colours)
  seen = []
  settings = dataclasses.replace(
    SETTINGS, outline_rounds=rounds, fusion=FusionSettings(instance_score=0.1)
  )
  shown = 0
  for prediction in _predict(toy, settings=settings):
    record = source[prediction.index]
    pixels = np.asarray(Image.open(io.BytesIO(record.image)))
    for image, probability in seen:
      np.testing.assert_array_equal(image, pixels)
      assert probability.shape == pixels.shape[:2]
    strong = prediction.detections.score >= 0.1
    shown += strong.sum()
    if rounds:
      assert len(seen) == strong.sum()
      assert not prediction.detections.masks[strong].any()
      assert not any(s.is_thing for s in prediction.panoptic.segments)
    else:
      assert not seen
      assert any(s.is_thing for s in prediction.panoptic.segments)
    seen.clear()
  assert shown
