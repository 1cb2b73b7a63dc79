"""The whole prediction on a toy model, against what its scores say."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import pipeline, sampling
from jtsm_jax.data.run_lengths import read_runs
from jtsm_jax.evaluation import predict as predict_lib
from jtsm_jax.evaluation.class_calibration import NEVER, ClassCalibration
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import make_steps, superpixel_votes
from jtsm_jax.evaluation.predict import PredictionSettings
from jtsm_jax.types import Detections, Proposals, Record, pack_members
from tests import tiny
from tests.run_lengths import pack, unpack


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
  found = predict_lib._to_image(
    cells, np.array([28, 42]), (20, 30), (32, 64), slice(0, 20)
  )
  y = (np.arange(20) + 0.5) * 28 / 20 / 8 - 0.5
  x = (np.arange(30) + 0.5) * 42 / 30 / 8 - 0.5
  np.testing.assert_allclose(found[:, 7, 0], y.clip(0, 3), atol=0.05)
  np.testing.assert_allclose(found[7, :, 1], x.clip(0, 7), atol=0.05)


@pytest.mark.parametrize("shape", [(3, 33_000), (33_000, 3)])
def test_maps_come_back_to_images_that_are_too_long_for_opencv(shape):
  ramp = np.random.default_rng(0).random(8, np.float32)
  cells = np.tile(ramp, (8, 1)) if shape[1] > 3 else np.tile(ramp[:, None], 8)
  size, canvas = np.array([64, 64]), (64, 64)
  found = predict_lib._to_image(
    cells[..., None], size, shape, canvas, slice(0, shape[0])
  )
  assert found.shape == (*shape, 1)
  place = (np.arange(33_000) + 0.5) * 8 / 33_000 - 0.5
  wanted = np.interp(place, np.arange(8), ramp)
  line = found[1, :, 0] if shape[1] > 3 else found[:, 1, 0]
  np.testing.assert_allclose(line, wanted, atol=0.02)


def _view(semantic, *, flip=False, size=(32, 64)):
  """One image on a canvas of 32 x 64; no features."""
  batch = tiny.make_batch(1, image=(32, 64), canvas=(32, 64))
  batch = batch.replace(size=np.array([size]), flip=np.array([flip]))
  return predict_lib._View(batch, semantic and semantic[0][None], None)


def _found(proposals, *, scores=None, present=None, detections=None, row=0):
  """What the scores tell of an image."""
  present = np.ones(scores.shape[1], bool) if present is None else present
  return predict_lib._Found(
    row, 0, proposals, scores, None, present, detections, None
  )


def _stuff_map(found, views, num_things, *, share=1.0, thing_channel=False):
  return predict_lib._stuff_map(
    found,
    views,
    num_things=num_things,
    settings=dataclasses.replace(
      SETTINGS, semantic_share=share, thing_channel=thing_channel
    ),
  )


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
  label, score = _stuff_map(_found(proposals, scores=scores), views, 1)
  assert (label[:, :14] == 1).all()
  assert (label[:, 18:] == 2).all()
  np.testing.assert_allclose(score[:, 0], 1, atol=0.05)
  np.testing.assert_allclose(score[:, -1], 2 / 3, atol=0.05)


def test_votes_decide_where_there_is_no_semantic_branch():
  proposals = _halves(16, 32)
  scores = np.array([[0.1, 0.8, 0.2], [0.1, 0.2, 0.8]], np.float32)
  views = [_view(None)]
  label, _ = _stuff_map(_found(proposals, scores=scores), views, 1)
  np.testing.assert_array_equal(label, proposals.superpixels + 1)
  absent = np.array([True, False, True])
  found = _found(proposals, scores=scores, present=absent)
  label, _ = _stuff_map(found, views, 1)
  assert (label == 2).all()


def test_no_stuff_at_all():
  scores = np.ones((2, 3), np.float32)
  found = _found(_halves(16, 32), scores=scores)
  label, score = _stuff_map(found, [_view(None)], 3)
  assert (label == -1).all()
  assert (score == 0).all()


def test_where_the_branch_finds_a_thing_there_is_no_stuff():
  # One kind of stuff, as VOC has: without the channel of things it is
  # everywhere.
  scores = np.full((2, 3), 0.5, np.float32)
  found = _found(_halves(16, 32), scores=scores)
  semantic = np.zeros((4, 8, 2), np.float32)
  semantic[:, :4], semantic[:, 4:] = (0.7, 0.3), (0.4, 0.6)
  args = found, [_view([semantic])], 2
  label, _ = _stuff_map(*args)
  assert (label == 2).all()
  label, score = _stuff_map(*args, thing_channel=True)
  assert (label[:, :14] == -1).all()
  assert (label[:, 18:] == 2).all()
  np.testing.assert_allclose(score[:, -1], 0.6, atol=1e-6)
  # The proposals vote for stuff, 1 / 3 of all their votes: .35 and .15 + .17.
  label, _ = _stuff_map(*args, share=0.5, thing_channel=True)
  assert (label[:, :14] == -1).all()
  label, _ = _stuff_map(*args, share=0.4, thing_channel=True)
  assert (label == 2).all()


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
  images = []
  for i, name in enumerate("ab"):
    detections = Detections(
      proposal=np.array([1, 0], np.int32)[: 2 - i],
      category=np.array([2, 0], np.int32)[: 2 - i],
      score=np.ones(2 - i, np.float32),
      boxes=store[name].boxes[[1, 0]][: 2 - i],
      size=(1, 1),
    )
    scores = np.ones((2, tiny.K), np.float32)
    images.append(
      _found(store[name], scores=scores, detections=detections, row=i)
    )
  found = predict_lib._mean_box_masks(steps.masks, views, images, limit=5)
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
  threshold = np.full(tiny.K, 1.9, np.float32)
  threshold[1] = 1.01 * image[:, 1].max()
  assert (image.argmax(1) != 1).any()
  calibration = ClassCalibration(threshold, np.full(tiny.K, 1e3, np.float32))
  settings = dataclasses.replace(SETTINGS, show_present=True)
  found = list(_predict(toy, settings=settings, calibration=calibration))
  for prediction in found:
    assert prediction.scores[:, 1].all()
    assert not np.delete(prediction.scores, 1, axis=1).any()
    assert not any(s.is_thing for s in prediction.panoptic.segments)


def test_a_class_that_no_image_was_tagged_with_is_never_present(toy):
  image = np.stack([p.image_scores for p in _predict(toy)])
  highest = image.argmax(1)[0]
  threshold = np.full(tiny.K, 1.9, np.float32)
  threshold[highest] = NEVER
  calibration = ClassCalibration(threshold, np.ones(tiny.K, np.float32))
  found = next(iter(_predict(toy, calibration=calibration)))
  others = np.delete(image[0], highest)
  assert image[0, highest] / NEVER > others.max() / 1.9
  assert not found.scores[:, highest].any()
  assert found.scores.any()


def test_the_best_of_each_thing_needs_no_score_that_suffices(toy):
  # Nothing is shown, and all scores end at 1.
  calibration = ClassCalibration(
    np.full(tiny.K, 2, np.float32), np.full(tiny.K, 1e-9, np.float32)
  )
  plain, found = _predict(toy), _predict(toy, calibration=calibration)
  for a, b in zip(plain, found, strict=True):
    things = a.scores[:, : tiny.NUM_THINGS]
    np.testing.assert_array_equal(b.best.proposal, things.argmax(0))
    np.testing.assert_array_equal(b.best.score, things.max(0))
    np.testing.assert_array_equal(b.best.category, np.arange(tiny.NUM_THINGS))
    assert b.best.boxes.shape == (tiny.NUM_THINGS, 4)


def test_each_image_is_predicted_once(toy):
  _, source, _ = toy
  found = list(_predict(toy))
  assert [p.index for p in found] == [0, 1, 2]
  for prediction in found:
    size = tuple(source.sizes[prediction.index])
    assert prediction.panoptic.ids.shape == size
    assert prediction.detections.size == size
    assert all(
      read_runs(c).sum() == size[0] * size[1]
      for c in prediction.detections.rles
    )
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
      assert not unpack(prediction.detections)[strong].any()
      assert not any(s.is_thing for s in prediction.panoptic.segments)
    else:
      assert not seen
      assert any(s.is_thing for s in prediction.panoptic.segments)
    seen.clear()
  assert shown


# The straightforward way: whole images, all detections and classes at once.


def _random_proposals(rng, size, *, cells=12, count=30):
  """Rectangles of superpixels, whose boxes are tight."""
  rows, columns = (np.arange(side) * cells // side for side in size)
  low = rng.integers(0, cells - 1, (count, 2))
  high = rng.integers(low + 1, cells + 1)
  cell = np.arange(cells)
  inside = [
    (low[:, i, None] <= cell) & (cell < high[:, i, None]) for i in (0, 1)
  ]
  members = inside[0][:, :, None] & inside[1][:, None]
  members &= rng.random(members.shape) < 0.7
  members[np.arange(count), low[:, 0], low[:, 1]] = True
  members = members.reshape(count, -1)
  superpixels = (cells * rows[:, None] + columns).astype(np.int32)
  boxes = []
  for row in members:
    y, x = np.nonzero(row[superpixels])
    boxes.append([y.min(), x.min(), y.max() + 1, x.max() + 1])
  return Proposals(
    superpixels=superpixels,
    member_bits=pack_members(members),
    boxes=np.array(boxes, np.int32),
    scores=np.linspace(1, 0, count, dtype=np.float32),
  )


def _whole_masks(detections, proposals, box_masks, share):
  masks = proposals.membership[detections.proposal][:, proposals.superpixels]
  probabilities = masks.astype(np.float32)
  if box_masks is not None:
    pasted = np.zeros_like(probabilities)
    for n, (y0, x0, y1, x1) in enumerate(detections.boxes):
      size = int(x1 - x0), int(y1 - y0)
      pasted[n, y0:y1, x0:x1] = cv2.resize(box_masks[n], size)
    probabilities += share * (pasted - probabilities)
  return probabilities


@pytest.mark.parametrize("share", [None, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("rounds", [0, 2])
def test_masks_are_those_of_the_straightforward_way(share, rounds, monkeypatch):
  rng = np.random.default_rng(0)
  size = 211, 307
  proposals = _random_proposals(rng, size)
  chosen = rng.permutation(len(proposals))
  detections = Detections(
    proposal=chosen,
    category=np.zeros(len(chosen), np.int32),
    score=np.linspace(1, 0, len(chosen), dtype=np.float32),
    boxes=proposals.boxes[chosen],
    size=size,
  )
  box_masks = None
  if share is not None:
    box_masks = rng.random((len(chosen), 28, 28), np.float32)
  probabilities = _whole_masks(detections, proposals, box_masks, share)
  wanted, given = probabilities >= 0.5, []

  def follow_colours(image, probability, *, rounds):
    given.append(probability)
    return probability[::-1, ::-1] >= 0.5

  monkeypatch.setattr(predict_lib, "follow_colours", follow_colours)
  sure = detections.score >= 0.5
  if rounds:
    wanted[sure] = wanted[sure][:, ::-1, ::-1]
  scores = np.ones((len(proposals), 1), np.float32)
  found = predict_lib._with_masks(
    _found(proposals, scores=scores, detections=detections),
    box_masks,
    _Images(),
    dataclasses.replace(SETTINGS, mask_share=share or 0, outline_rounds=rounds),
  )
  assert found.rles == pack(wanted)["rles"]
  assert wanted.any((1, 2)).sum() > 10
  if rounds:
    np.testing.assert_array_equal(given, probabilities[sure])


def test_pasted_masks_are_interpolated_between_cell_middles():
  # Two columns, 0.3 and 0.8, over four pixels: 0.3, 0.425, 0.675, 0.8.
  proposals = Proposals(
    superpixels=np.zeros((2, 6), np.int32),
    member_bits=pack_members(np.ones((1, 1), bool)),
    boxes=np.array([[0, 1, 2, 5]], np.int32),
    scores=np.ones(1, np.float32),
  )
  detections = Detections(
    proposal=np.array([0]),
    category=np.array([0]),
    score=np.ones(1, np.float32),
    boxes=proposals.boxes,
    size=(2, 6),
  )
  masks = np.array([[[0.3, 0.8], [0.3, 0.8]]], np.float32)
  scores = np.ones((1, 1), np.float32)
  image = _found(proposals, scores=scores, detections=detections)
  found = predict_lib._with_masks(image, masks, _Images(), SETTINGS)
  np.testing.assert_array_equal(unpack(found)[0], [[0, 0, 0, 1, 1, 0]] * 2)


def _whole_stuff_map(
  scores, proposals, views, present, num_things, share, thing_channel
):
  votes = superpixel_votes(scores, proposals)
  votes = votes / np.maximum(votes.sum(1, keepdims=True), 1e-9)
  votes[:, num_things - 1] = 0  # of no stuff
  stuff = votes[:, num_things - 1 :][proposals.superpixels]
  shape = proposals.superpixels.shape
  if views[0].semantic is not None and share > 0:
    probability = np.zeros(stuff.shape, np.float32)
    for view in views:
      grid = view.semantic[0]
      size, canvas = view.batch.size[0], view.batch.superpixels.shape[1:]
      stride = canvas[0] / grid.shape[0]
      grid = grid[: -(-size[0] // int(stride)), : -(-size[1] // int(stride))]
      y = (np.arange(shape[0]) + 0.5) * (size[0] / shape[0]) / stride - 0.5
      x = (np.arange(shape[1]) + 0.5) * (size[1] / shape[1]) / stride - 0.5
      x, y = (m.astype(np.float32) for m in np.meshgrid(x, y))
      layers = [
        cv2.remap(
          np.ascontiguousarray(grid[..., k]),
          x,
          y,
          cv2.INTER_LINEAR,
          borderMode=cv2.BORDER_REPLICATE,
        )
        for k in range(grid.shape[-1])
      ]
      shown = np.stack(layers, -1)
      probability += (shown[:, ::-1] if view.batch.flip[0] else shown) / len(
        views
      )
    stuff = share * probability + (1 - share) * stuff
  stuff = stuff * np.concatenate([[thing_channel], present[num_things:]])
  best = stuff.argmax(-1)
  return np.where(best > 0, best - 1 + num_things, -1), stuff.max(-1)


@pytest.mark.parametrize("side", [1, 50, 307])
def test_blocks_of_a_map_are_those_of_the_whole(side, monkeypatch):
  cells = np.random.default_rng(0).random((5, 7, 3), np.float32)
  args = cells, np.array([37, 50]), (211, 307), (40, 56), slice(11, 150)
  wanted = predict_lib._to_image(*args)
  monkeypatch.setattr(predict_lib, "_REMAP_SIDE", side)
  np.testing.assert_array_equal(predict_lib._to_image(*args), wanted)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("thing_channel", [False, True])
@pytest.mark.parametrize("absent", [(), (2,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("pixels", [1, 5000, 1 << 17])
def test_stuff_is_that_of_the_straightforward_way(
  share, thing_channel, absent, pixels, monkeypatch
):
  monkeypatch.setattr(predict_lib, "_PIXELS_AT_A_TIME", pixels)
  rng = np.random.default_rng(0)
  proposals = _random_proposals(rng, (211, 307), count=6)
  scores = rng.random((6, 6), np.float32)
  present = ~np.isin(np.arange(6), absent)

  def semantic():
    found = rng.random((4, 8, 5), np.float32) ** 3
    return [found / found.sum(-1, keepdims=True)]

  views = [
    _view(semantic(), size=(32, 47)),
    _view(semantic(), size=(32, 47), flip=True),
    _view(semantic(), size=(21, 30)),
  ]
  wanted = _whole_stuff_map(
    scores, proposals, views, present, 2, share, thing_channel
  )
  image = _found(proposals, scores=scores, present=present)
  found = _stuff_map(image, views, 2, share=share, thing_channel=thing_channel)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(a, b)
  assert found[0].dtype == np.int32
  assert found[1].dtype == np.float32
