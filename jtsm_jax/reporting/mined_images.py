"""Mines single images with the last weights, to look at what is mined."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jtsm_jax.console import progress
from jtsm_jax.data.pipeline import ProposalSource, inference_batches
from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.data.sampling import fitting_canvases
from jtsm_jax.mining import cells, labels
from jtsm_jax.models import proposal_blocks
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.train.objectives import MiningSettings, last_scores
from jtsm_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class MinedImage:
  """What is mined of one training image.

  Attributes:
    index: its position in the split.
    scores: [P, K] float32 in [0, 1], of the proposals, by which they are mined;
      up to the last one that can be seen on the canvas, and 0 for those before
      it that cannot.
    segments: (class index, proposal, score) of the mined segments, the
      first of each class before all others.
  """

  index: int
  scores: np.ndarray
  segments: list[tuple[int, int, float]]


def mine_images(
  model: JTSM,
  variables: Any,
  source: RecordSource,
  *,
  store: ProposalSource,
  settings: MiningSettings,
  tag_advantage: float,
  canvases: tuple[tuple[int, int], ...],
  batch_size: int,
  max_proposals: int,
  max_superpixels: int,
  proposal_block: int = 0,
) -> Iterator[MinedImage]:
  """Mines images as the training does, but whole and without dropout.

  Args:
    model: the model.
    variables: its weights.
    source: the images.
    store: their proposals.
    settings: of the mining.
    tag_advantage: see `LossSettings`.
    canvases: (H, W) of the training; each image is seen on the middle one of
      its orientation.
    batch_size: images at a time.
    max_proposals: P.
    max_superpixels: S.
    proposal_block: proposals that are pooled at a time, see
      `models.proposal_blocks`; 0 for all.

  Yields:
    What is mined of each image, with a progress line; all of an orientation
    before the others.
  """

  @jax.jit
  def mine(variables: Any, batch: Batch):
    features = model.apply(variables, batch, method="features")
    described = proposal_blocks.describe(
      model, variables, features, batch, proposal_block=proposal_block
    )
    outputs = model.apply(variables, described, batch.valid, method="judge")
    overlap = None
    if model.cells is not None:
      logits = model.apply(variables, features, method="cell_logits")
      overlap = cells.tagged_overlap(
        logits, batch, model.inside(batch), advantage=tag_advantage
      )
    scores = last_scores(outputs, overlap)
    return scores, labels.mine(
      scores, outputs.image_scores, batch, **dataclasses.asdict(settings)
    )

  middle = set()
  for portrait in (False, True):
    fitting = sorted(fitting_canvases(canvases, portrait=portrait))
    middle.add(fitting[len(fitting) // 2])  # a square one may serve both
  batches = inference_batches(
    source,
    store,
    canvases=tuple(middle),
    batch_size=batch_size,
    max_proposals=max_proposals,
    max_superpixels=max_superpixels,
  )
  with progress(description="mine", total=len(source), unit="image") as bar:
    for _, views in itertools.groupby(
      batches, key=lambda batch: batch.image_index.tobytes()
    ):
      batch = next(views)
      scores, mined = jax.device_get(mine(variables, batch))
      for i, index in enumerate(batch.image_index):
        if index < 0:
          continue
        slots = np.flatnonzero(mined.valid[i])
        valid = batch.valid[i]
        count = 1 + np.flatnonzero(valid).max(initial=-1)
        yield MinedImage(
          int(index),
          np.where(valid[:, None], scores[i], 0)[:count],
          [
            (
              int(mined.category[i, m]),
              int(mined.proposal[i, m]),
              float(mined.score[i, m]),
            )
            for m in slots
          ],
        )
        bar.update()
