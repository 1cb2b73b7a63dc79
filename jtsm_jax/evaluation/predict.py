"""Panoptic maps of images: scores, detections, masks and fusion in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

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
from jtsm_jax.evaluation.class_calibration import (
  ClassCalibration,
  calibrate_classes,
)
from jtsm_jax.evaluation.fusion import FusionSettings, fuse
from jtsm_jax.evaluation.inference import (
  DetectionSettings,
  detect,
  make_mask_step,
  make_score_step,
  paste_masks,
  superpixel_votes,
)
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.train.feature_cache import FeatureCache
from jtsm_jax.types import Batch, Detections, PanopticMap


@dataclasses.dataclass(frozen=True)
class PredictionSettings:
  """Everything between the model and the panoptic map.

  Attributes:
    canvases: (H, W) of the inference; each image takes the largest that fits.
    batch_size: images at a time.
    max_proposals: P.
    max_superpixels: S.
    flip: average the scores with those of the mirrored image.
    mil_share: see `inference.make_score_step`.
    mask_share: weight of the instance branch's mask against the proposal's own;
      1 takes the branch alone (paper).
    semantic_share: weight of the semantic branch against the votes of the
      proposals; 1 takes the branch alone (paper).
    detection: see there.
    fusion: see there.
  """

  canvases: tuple[tuple[int, int], ...]
  batch_size: int
  max_proposals: int
  max_superpixels: int
  flip: bool = False
  mil_share: float = 0.0
  mask_share: float = 1.0
  semantic_share: float = 1.0
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
    scores: [P, K] float32 of the proposals, calibrated.
    image_scores: [K] float32, y.
  """

  index: int
  panoptic: PanopticMap
  detections: Detections
  scores: np.ndarray
  image_scores: np.ndarray


def predict(
  model: JTSM,
  variables: Any,
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
    model: the model.
    variables: its weights.
    source: the images.
    store: their proposals.
    calibration: from `learn_calibration`.
    num_things: T.
    settings: see there.
    cache: of the split's features, or None to compute them.
    description: of the progress line.

  Yields:
    One prediction per image, canvas by canvas.
  """
  find_masks = make_mask_step(model) if model.instance is not None else None
  get_proposals = with_fallback(store)
  with progress(
    description=description, total=len(source), unit="image"
  ) as bar:
    for batch, scores, views in _score(
      model, variables, source, store, settings, cache
    ):
      for i, index in enumerate(batch.image_index):
        if index < 0:
          continue
        size = tuple(int(side) for side in source.sizes[index])
        proposals = get_proposals(source.image_ids[index], size)
        proposals = proposals.best(settings.max_proposals)
        y = scores.image[i]
        present = y >= calibration.tag_threshold
        present[y.argmax()] = True  # every image shows something
        calibrated = np.minimum(
          scores.proposals[i, : len(proposals)] / calibration.score_scale, 1.0
        )
        calibrated = calibrated * present
        detections = detect(
          calibrated[:, :num_things], proposals, settings=settings.detection
        )
        if find_masks is not None and settings.mask_share > 0:
          detections = _refine_masks(
            find_masks,
            variables,
            scores.features[i],
            batch,
            i,
            detections,
            settings,
          )
        stuff, stuff_score = _stuff_map(
          calibrated,
          proposals,
          [(semantic[i], flip) for semantic, flip in views],
          batch.size[i],
          batch.superpixels.shape[1:],
          present,
          num_things,
          settings,
        )
        panoptic = fuse(
          detections,
          stuff,
          stuff_score,
          num_things=num_things,
          settings=settings.fusion,
        )
        yield Prediction(int(index), panoptic, detections, calibrated, y)
        bar.update()


def learn_calibration(
  model: JTSM,
  variables: Any,
  source: RecordSource,
  store: ProposalSource,
  *,
  settings: PredictionSettings,
  cache: FeatureCache | None = None,
) -> ClassCalibration:
  """Compares the scores of the training images with their tags.

  Args:
    model: the model.
    variables: its weights.
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
    for batch, scores, _ in _score(
      model, variables, source, store, settings, cache
    ):
      real = batch.image_index >= 0
      image[batch.image_index[real]] = scores.image[real]
      best[batch.image_index[real]] = scores.proposals[real].max(1)
      bar.update(int(real.sum()))
  return calibrate_classes(image, best, source.tags)


def _score(model, variables, source, store, settings, cache):
  """Yields host batches, their scores averaged over the flips, and the views.

  A view is (semantic probabilities, whether it is mirrored); there is none
  without a semantic branch.
  """
  score = make_score_step(model, mil_share=settings.mil_share)
  flips = (False, True) if settings.flip else (False,)
  streams = [
    inference_batches(
      source,
      store,
      canvases=settings.canvases,
      batch_size=settings.batch_size,
      max_proposals=settings.max_proposals,
      max_superpixels=settings.max_superpixels,
      load_images=cache is None,
      flip=flip,
    )
    for flip in flips
  ]
  for batches in zip(*streams, strict=True):
    if cache is not None:
      batches = [cache.attach(batch) for batch in batches]
    found = [jax.device_get(score(variables, batch)) for batch in batches]
    scores = found[0].replace(
      proposals=sum(s.proposals for s in found) / len(found),
      image=sum(s.image for s in found) / len(found),
    )
    views = [
      (s.semantic, flip)
      for s, flip in zip(found, flips, strict=True)
      if s.semantic is not None
    ]
    yield batches[0], scores, views


def _refine_masks(
  find_masks, variables, features, batch: Batch, i, detections, settings
) -> Detections:
  """Masks of the detections from the instance branch."""
  count = len(detections.score)
  if not count:
    return detections
  limit = settings.detection.max_detections  # one shape, one compilation
  boxes = np.zeros((1, limit, 4), np.float32)
  boxes[0, :count] = batch.boxes[i][detections.proposal]
  category = np.zeros((1, limit), np.int32)
  category[0, :count] = detections.category
  small = np.asarray(find_masks(variables, features[None], boxes, category))
  pasted = paste_masks(
    small[0, :count], detections.boxes, detections.masks.shape[1:]
  )
  share = settings.mask_share
  return dataclasses.replace(
    detections, masks=share * pasted + (1 - share) * detections.masks >= 0.5
  )


def _stuff_map(
  scores, proposals, views, size, canvas, present, num_things, settings
):
  """The best stuff class of each pixel and its score."""
  votes = superpixel_votes(scores, proposals)
  votes = votes / np.maximum(votes.sum(1, keepdims=True), 1e-9)
  stuff = votes[:, num_things:][proposals.superpixels]  # [H, W, stuff]
  if views and settings.semantic_share > 0:
    share = settings.semantic_share
    shape = proposals.superpixels.shape
    probability = np.zeros(stuff.shape, np.float32)
    for semantic, flip in views:
      view = _to_image(semantic[..., 1:], size, shape, canvas)
      probability += (view[:, ::-1] if flip else view) / len(views)
    stuff = share * probability + (1 - share) * stuff
  stuff = stuff * present[num_things:]
  label = np.where(stuff.max(-1) > 0, stuff.argmax(-1) + num_things, -1)
  return label.astype(np.int32), stuff.max(-1)


def _to_image(grid, size, shape, canvas):
  """Resizes the image's part of a canvas map [h, w, C] to the image."""
  stride = canvas[0] / grid.shape[0]
  # Pixel centres of the image, in cells of the map.
  y = (np.arange(shape[0]) + 0.5) * (size[0] / shape[0]) / stride - 0.5
  x = (np.arange(shape[1]) + 0.5) * (size[1] / shape[1]) / stride - 0.5
  mesh = np.meshgrid(x, y)
  x, y = (m.astype(np.float32) for m in mesh)
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
  return np.stack(layers, -1)
