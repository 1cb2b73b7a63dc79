"""Panoptic maps of images: scores, detections, masks and fusion in one pass."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import cv2
import jax
import numpy as np

from jtsm_jax.console import progress
from jtsm_jax.data.pipeline import (
  ProposalSource,
  inference_batches,
  with_fallback,
)
from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.data.run_lengths import encode_mask
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.class_calibration import (
  NEVER,
  ClassCalibration,
  calibrate_classes,
)
from jtsm_jax.evaluation.fusion import FusionSettings, fuse
from jtsm_jax.evaluation.inference import (
  DetectionSettings,
  Steps,
  detect,
  superpixel_votes,
)
from jtsm_jax.evaluation.outlines import follow_colours
from jtsm_jax.train.feature_cache import FeatureCache
from jtsm_jax.types import Batch, Detections, PanopticMap, Proposals

_PIXELS_AT_A_TIME = 1 << 17  # of an image, with the scores of all classes
_REMAP_SIDE = 1 << 14  # longest result of one cv2.remap, which has a limit


@dataclasses.dataclass(frozen=True)
class PredictionSettings:
  """Everything between the model and the panoptic map.

  Attributes:
    canvases: (H, W) on which images are seen; the scores are averaged over
      those of an image's orientation.
    batch_size: images at a time.
    max_proposals: P.
    max_superpixels: S.
    flip: average over the mirrored images, too.
    mask_share: weight of the instance branch's mask against the proposal's own;
      1 takes the branch alone (paper).
    semantic_share: weight of the semantic branch against the votes of the
      proposals; 1 takes the branch alone (paper).
    thing_channel: where the semantic branch finds a thing likelier than any
      stuff there is no stuff; what no detection covers there is void.
    show_present: the scores of a thing that the image shows, by the threshold
      of its image score, are raised so that the best one reaches
      `fusion.instance_score`. What covers it can still keep it out of the
      panoptic map, and so can a mask that is below 0.5 everywhere.
    outline_rounds: of GrabCut, which makes the outlines of detections follow
      the colours of the image; of those that reach `fusion.instance_score`.
      0 = none (paper).
    detection: see there.
    fusion: see there.
  """

  canvases: tuple[tuple[int, int], ...]
  batch_size: int
  max_proposals: int
  max_superpixels: int
  flip: bool = False
  mask_share: float = 1.0
  semantic_share: float = 1.0
  thing_channel: bool = True
  show_present: bool = False
  outline_rounds: int = 0
  detection: DetectionSettings = dataclasses.field(
    default_factory=DetectionSettings
  )
  fusion: FusionSettings = dataclasses.field(default_factory=FusionSettings)


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What is predicted of one image.

  Attributes:
    index: its position in the split.
    panoptic: the panoptic map.
    detections: before the fusion, best first.
    best: the best proposal of each thing, whatever its score and whether the
      image seems to show it or not, as CorLoc wants it; without masks.
    scores: [P, K] float32 of the proposals, calibrated.
    image_scores: [K] float32, see `inference.Scores.image`.
  """

  index: int
  panoptic: PanopticMap
  detections: Detections
  best: Detections
  scores: np.ndarray
  image_scores: np.ndarray


def predict(
  steps: Steps,
  source: RecordSource,
  store: ProposalSource,
  *,
  calibration: ClassCalibration,
  num_things: int,
  settings: PredictionSettings,
  cache: FeatureCache | None = None,
  description: str = "predict",
) -> Iterator[Prediction]:
  """Predicts every image of a split, with a progress line.

  Args:
    steps: the trained model.
    source: the images.
    store: their proposals.
    calibration: from `learn_calibration`.
    num_things: T.
    settings: see there.
    cache: of the split's features, or None to compute them.
    description: of the progress line.

  Yields:
    One prediction per image, all of an orientation before the others.
  """
  get_proposals = with_fallback(store)
  with progress(
    description=description, total=len(source), unit="image"
  ) as bar:
    for views, scores, image_scores in _score(
      steps.score, source, store, settings, cache
    ):
      found = []
      for i, index in enumerate(views[0].batch.image_index):
        if index < 0:
          continue
        size = tuple(int(side) for side in source.sizes[index])
        proposals = get_proposals(source.image_ids[index], size)
        proposals = proposals.best(settings.max_proposals)
        found.append(
          _find(
            i,
            int(index),
            proposals,
            scores[i, : len(proposals)],
            image_scores[i],
            calibration=calibration,
            num_things=num_things,
            settings=settings,
          )
        )
      box_masks = {}
      if steps.masks is not None and settings.mask_share > 0:
        box_masks = _mean_box_masks(
          steps.masks,
          views,
          found,
          limit=settings.detection.max_detections,
        )
      for image in found:
        detections = _with_masks(
          image, box_masks.get(image.row), source, settings
        )
        stuff, stuff_score = _stuff_map(
          image, views, num_things=num_things, settings=settings
        )
        panoptic = fuse(
          detections,
          stuff,
          stuff_score,
          num_things=num_things,
          settings=settings.fusion,
        )
        yield Prediction(
          image.index,
          panoptic,
          detections,
          image.best,
          image.scores,
          image.image_scores,
        )
        bar.update()


@dataclasses.dataclass(frozen=True)
class _Found:
  """What the scores tell of an image; its detections have no masks yet.

  Attributes:
    row: its place in the views' batches.
    index: its position in the split.
    proposals: the P ones that have scores.
    scores: [P, K] float32, calibrated; 0 for classes that are absent.
    image_scores: [K] float32, see `inference.Scores.image`.
    present: [K] bool.
    detections: best first.
    best: see `Prediction`.
  """

  row: int
  index: int
  proposals: Proposals
  scores: np.ndarray
  image_scores: np.ndarray
  present: np.ndarray
  detections: Detections
  best: Detections


def _find(
  row: int,
  index: int,
  proposals: Proposals,
  scores: np.ndarray,
  image_scores: np.ndarray,
  *,
  calibration: ClassCalibration,
  num_things: int,
  settings: PredictionSettings,
) -> _Found:
  shown = image_scores >= calibration.tag_threshold
  present = shown.copy()
  # Every image shows something: what comes nearest to its threshold.
  nearest = image_scores / np.maximum(calibration.tag_threshold, 1e-12)
  nearest[calibration.tag_threshold >= NEVER] = -1
  present[nearest.argmax()] = True
  # Before scores end at 1 together.
  best = _best(scores[:, :num_things], proposals)
  scores = np.minimum(scores / calibration.score_scale, 1.0) * present
  things = scores[:, :num_things]
  if settings.show_present:
    raised = raise_to(things, settings.fusion.instance_score)
    things = np.where(shown[:num_things], raised, things)
  detections = detect(things, proposals, settings=settings.detection)
  return _Found(
    row, index, proposals, scores, image_scores, present, detections, best
  )


def _best(scores: np.ndarray, proposals: Proposals) -> Detections:
  best = scores.argmax(0)
  category = np.arange(scores.shape[1])
  return Detections(
    proposal=best.astype(np.int32),
    category=category.astype(np.int32),
    score=scores[best, category],
    boxes=proposals.boxes[best],
    size=proposals.superpixels.shape,
  )


def raise_to(scores: np.ndarray, least: float) -> np.ndarray:
  """Multiplies the scores of each class so that its best one reaches `least`.

  Args:
    scores: [P, T] float32. Classes whose best score is 0, or is enough, keep
      theirs.
    least: in [0, 1].
  """
  best = scores.max(0, initial=0)
  # A little more, so that rounding does not take it below.
  factor = least * (1 + 1e-6) / np.maximum(best, 1e-12)
  return scores * np.where((best > 0) & (best < least), factor, 1)


def learn_calibration(
  steps: Steps,
  source: RecordSource,
  store: ProposalSource,
  *,
  settings: PredictionSettings,
  cache: FeatureCache | None = None,
) -> ClassCalibration:
  """Compares the scores of the training images with their tags.

  Args:
    steps: the trained model.
    source: the training split.
    store: its proposals.
    settings: as for `predict`.
    cache: of the split's features, or None to compute them.
  """
  image = np.zeros_like(source.tags)
  best = np.zeros_like(source.tags)
  with progress(
    description="calibrate", total=len(source), unit="image"
  ) as bar:
    for views, scores, image_scores in _score(
      steps.score, source, store, settings, cache
    ):
      index = views[0].batch.image_index
      real = index >= 0
      image[index[real]] = image_scores[real]
      best[index[real]] = scores[real].max(1)
      bar.update(int(real.sum()))
  return calibrate_classes(image, best, source.tags)


@dataclasses.dataclass(frozen=True)
class _View:
  """Some images on one canvas, plain or mirrored, and what the model says.

  Attributes:
    batch: on the host, without images.
    semantic: [B, Hf, Wf, 1 + stuff] float32 probabilities on the host, or None.
    features: [B, Hf, Wf, C] on the device.
  """

  batch: Batch
  semantic: np.ndarray | None
  features: jax.Array


def _score(score, source, store, settings, cache):
  """Yields the views of some images and the mean of their scores.

  The scores are those of the proposals [B, P, K], and of the images [B, K].
  """
  batches = inference_batches(
    source,
    store,
    canvases=settings.canvases,
    batch_size=settings.batch_size,
    max_proposals=settings.max_proposals,
    max_superpixels=settings.max_superpixels,
    load_images=cache is None,
    flips=(False, True) if settings.flip else (False,),
  )
  for _, group in itertools.groupby(
    batches, key=lambda batch: batch.image_index.tobytes()
  ):
    views, proposals, images = [], [], []
    for batch in group:
      batch = batch if cache is None else cache.attach(batch)
      found = score(batch)
      features = found.features
      found = jax.device_get(found.replace(features=None))
      proposals.append(found.proposals)
      images.append(found.image)
      batch = batch.replace(images=None, features=None)
      views.append(_View(batch, found.semantic, features))
    yield views, np.mean(proposals, axis=0), np.mean(images, axis=0)


def _mean_box_masks(
  find_masks, views: list[_View], images: list[_Found], *, limit: int
) -> dict[int, np.ndarray]:
  """The instance branch's masks [N, m, m] of each row, over all views."""
  batch_size = len(views[0].batch.image_index)
  category = np.zeros((batch_size, limit), np.int32)
  for image in images:
    category[image.row, : len(image.detections.score)] = (
      image.detections.category
    )
  total = 0
  for view in views:
    boxes = np.zeros((batch_size, limit, 4), np.float32)
    for image in images:
      chosen = image.detections.proposal
      boxes[image.row, : len(chosen)] = view.batch.boxes[image.row][chosen]
    masks = np.asarray(find_masks(view.features, boxes, category))
    flip = view.batch.flip[:, None, None, None]
    total = total + np.where(flip, masks[..., ::-1], masks)
  return {
    image.row: total[image.row, : len(image.detections.score)] / len(views)
    for image in images
  }


def _with_masks(
  found: _Found,
  box_masks: np.ndarray | None,
  source: RecordSource,
  settings: PredictionSettings,
) -> Detections:
  """Detections with their final masks, made one at a time in their boxes."""
  detections, proposals = found.detections, found.proposals
  follows = (detections.score >= settings.fusion.instance_score) & bool(
    settings.outline_rounds
  )
  if follows.any():
    record = source[found.index]
    image = decode_image(record.image, name=record.image_id)
  rles = []
  for n, (y0, x0, y1, x1) in enumerate(detections.boxes):
    members = proposals.membership[detections.proposal[n]]
    inside = members[proposals.superpixels[y0:y1, x0:x1]].astype(np.float32)
    if box_masks is not None:
      pasted = cv2.resize(
        box_masks[n], inside.shape[::-1], interpolation=cv2.INTER_LINEAR
      )
      inside += settings.mask_share * (pasted - inside)
    mask, box = inside >= 0.5, detections.boxes[n]
    if follows[n]:
      whole = np.zeros(detections.size, np.float32)
      whole[y0:y1, x0:x1] = inside
      mask = follow_colours(image, whole, rounds=settings.outline_rounds)
      box = (0, 0, *detections.size)
    rles.append(encode_mask(mask, box, detections.size))
  return dataclasses.replace(detections, rles=tuple(rles))


def _stuff_map(
  found: _Found,
  views: list[_View],
  *,
  num_things: int,
  settings: PredictionSettings,
) -> tuple[np.ndarray, np.ndarray]:
  """The best stuff class of each pixel, -1 for none, and its score.

  [H, W] int32 and float32.
  """
  proposals, share = found.proposals, settings.semantic_share
  votes = superpixel_votes(found.scores, proposals)
  votes = votes / np.maximum(votes.sum(1, keepdims=True), 1e-9)
  chosen = np.flatnonzero(found.present[num_things:])
  # A class of its own for no stuff, which the proposals do not vote for.
  classes = np.concatenate([[-1], num_things + chosen]).astype(np.int32)
  votes = np.pad(votes[:, num_things + chosen], ((0, 0), (1, 0)))
  grids = []
  if views[0].semantic is not None and share > 0:
    channels = np.concatenate([[0], 1 + chosen])
    grids = [view.semantic[found.row][..., channels] for view in views]
  height, width = shape = proposals.superpixels.shape
  label, score = np.empty(shape, np.int32), np.empty(shape, np.float32)
  # All classes of a whole photograph would fill the memory.
  step = max(_PIXELS_AT_A_TIME // width, 1)
  for top in range(0, height, step):
    rows = slice(top, min(top + step, height))
    stuff = votes[proposals.superpixels[rows]]
    if grids:
      probability = np.zeros(stuff.shape, np.float32)
      for view, grid in zip(views, grids, strict=True):
        shown = _to_image(
          grid,
          view.batch.size[found.row],
          shape,
          view.batch.superpixels.shape[1:],
          rows,
        )
        mirrored = shown[:, ::-1] if view.batch.flip[found.row] else shown
        probability += mirrored / len(views)
      if not settings.thing_channel:
        probability[..., 0] = 0
      stuff = share * probability + (1 - share) * stuff
    label[rows] = classes[stuff.argmax(-1)]
    score[rows] = stuff.max(-1)
  return label, score


def _to_image(grid, size, shape, canvas, rows):
  """Resizes the image's part of a canvas map [h, w, C] to rows of the image."""
  stride = canvas[0] / grid.shape[0]
  # Without the cells that show no pixel of the image.
  grid = grid[: math.ceil(size[0] / stride), : math.ceil(size[1] / stride)]
  # Pixel centres of the image, in cells of the map.
  y = np.arange(rows.start, rows.stop) + 0.5
  y = y * (size[0] / shape[0]) / stride - 0.5
  x = (np.arange(shape[1]) + 0.5) * (size[1] / shape[1]) / stride - 0.5
  x, y = x.astype(np.float32), y.astype(np.float32)
  layers = np.ascontiguousarray(np.moveaxis(grid, -1, 0))
  image = np.empty((len(y), len(x), len(layers)), np.float32)
  starts = (range(0, len(line), _REMAP_SIDE) for line in (y, x))
  for top, left in itertools.product(*starts):
    block = slice(top, top + _REMAP_SIDE), slice(left, left + _REMAP_SIDE)
    mesh = np.meshgrid(x[block[1]], y[block[0]])
    for k, layer in enumerate(layers):
      image[*block, k] = cv2.remap(
        layer, *mesh, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
      )
  return image
