"""From a trained model to scored segments: heads, suppression, pasted masks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jtsm_jax.evaluation.voc_detection import box_iou
from jtsm_jax.mining import cells
from jtsm_jax.models import proposal_blocks
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.types import Array, Batch, Detections, Proposals


@flax.struct.dataclass
class Scores:
  """What the model says of a batch.

  Attributes:
    proposals: [B, P, K] float32 in [0, 1].
    image: [B, K] float32 in [0, 1], the image-level scores y; with a cell head
      and a semantic branch those of stuff come from `semantic`.
    semantic: [B, Hf, Wf, 1 + stuff] float32 probabilities, 0 = a thing; None
      without a semantic branch.
    features: [B, Hf, Wf, C], for the instance branch.
  """

  proposals: Array
  image: Array
  semantic: Array | None
  features: Array


@dataclasses.dataclass(frozen=True)
class DetectionSettings:
  """How proposals become detections.

  Attributes:
    nms_iou: class-wise suppression threshold on the IoU.
    nms_kind: whose IoU it is: of "masks" or of "boxes".
    max_detections: kept per image.
    min_score: lower scores are dropped before the suppression.
  """

  nms_iou: float = 0.5
  nms_kind: str = "masks"
  max_detections: int = 100
  min_score: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Steps:
  """A trained model as two functions: what it says of images and of boxes.

  Attributes:
    score: of a batch.
    masks: from features [B, Hf, Wf, C], boxes [B, N, 4] on the canvas and
      categories [B, N] to masks [B, N, m, m] in [0, 1]; None without an
      instance branch.
  """

  score: Callable[[Batch], Scores]
  masks: Callable[[Array, Array, Array], Array] | None


def make_steps(
  model: JTSM,
  variables: Any,
  *,
  mil_share: float = 0.0,
  proposal_block: int = 0,
) -> Steps:
  """The jitted steps of a model with its weights; see `make_score_step`."""
  score = make_score_step(
    model, mil_share=mil_share, proposal_block=proposal_block
  )
  masks = make_mask_step(model) if model.instance is not None else None
  return Steps(
    functools.partial(score, variables),
    functools.partial(masks, variables) if masks else None,
  )


@functools.lru_cache(maxsize=8)  # an evaluation in training compiles once
def make_score_step(
  model: JTSM, *, mil_share: float = 0.0, proposal_block: int = 0
) -> Callable[[Any, Batch], Scores]:
  """The jitted forward pass.

  The refinement heads are averaged (section 3.2); without any, S^MIL is used,
  normalised so that the best proposal of a class has the class's image score.

  With a cell head the scores are multiplied by how well a proposal matches the
  map of the class. With a semantic branch, too, the semantic probabilities are
  the mean of the branch's and of the maps, and what they say of an image is its
  score for stuff (`cells.map_presence`).

  Args:
    model: the model.
    mil_share: weight of the normalised S^MIL in the average; the paper has 0.
    proposal_block: proposals that are pooled at a time, see
      `models.proposal_blocks`.
  """

  @jax.jit
  def score(variables: Any, batch: Batch) -> Scores:
    features = model.apply(variables, batch, method="features")
    outputs = model.apply(
      variables,
      proposal_blocks.describe(
        model, variables, features, batch, proposal_block=proposal_block
      ),
      batch.valid,
      method="judge",
    )
    mil = outputs.mil_scores
    top = jnp.maximum(mil.max(1, keepdims=True), 1e-12)
    mil = mil / top * outputs.image_scores[:, None, :]
    heads = [
      jax.nn.softmax(logits)[..., :-1] for logits in outputs.refinement_logits
    ]
    scores = mil
    if heads:
      scores = (1 - mil_share) * sum(heads) / len(heads) + mil_share * mil
    image, semantic = outputs.image_scores, None
    if model.semantic is not None:
      semantic = jax.nn.softmax(
        model.apply(variables, features, method="semantic_logits")
      )
    if model.cells is not None:
      inside = model.inside(batch)
      maps = cells.class_maps(
        model.apply(variables, features, method="cell_logits"), inside
      )
      scores *= cells.map_overlap(maps, batch)
      if semantic is not None:
        num_things = maps.shape[-1] + 1 - semantic.shape[-1]
        thing = maps[..., :num_things].sum(-1, keepdims=True)
        stuff = maps[..., num_things:]
        maps = jnp.concatenate([thing, stuff], axis=-1)
        semantic = (semantic + maps) / 2
        presence = cells.map_presence(semantic[..., 1:], inside)
        image = image.at[:, num_things:].set(presence)
    return Scores(
      proposals=jnp.where(batch.valid[..., None], scores, 0.0),
      image=image,
      semantic=semantic,
      features=features,
    )

  return score


@functools.lru_cache(maxsize=8)
def make_mask_step(model: JTSM) -> Callable[..., jax.Array]:
  """The jitted instance branch: box masks [B, N, 28, 28] in [0, 1]."""

  @jax.jit
  def masks(variables: Any, features: Array, boxes: Array, category: Array):
    logits = model.apply(variables, features, boxes, method="instance_logits")
    index = category[:, :, None, None, None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return jax.nn.sigmoid(chosen)

  return masks


def detect(
  scores: np.ndarray,
  proposals: Proposals,
  *,
  settings: DetectionSettings = DetectionSettings(),
) -> Detections:
  """Class-wise non-maximum suppression of segments.

  Calibrated scores often end at 1 together. The proposals' own order decides
  then, and classes in theirs.

  Args:
    scores: [P, T] float32 thing scores of the image's proposals.
    proposals: the same P proposals, best first.
    settings: see there.

  Returns:
    Detections without masks; those of the proposals are their own.
  """
  areas = np.bincount(
    proposals.superpixels.ravel(), minlength=len(proposals.member_bits)
  ).astype(np.float32)
  members = proposals.membership.astype(np.float32)
  size = members @ areas
  kept = []
  for category in range(scores.shape[1]):
    (candidates,) = np.nonzero(scores[:, category] >= settings.min_score)
    # Stable: of equal scores, that of the better proposal comes first.
    ranks = np.argsort(-scores[candidates, category], kind="stable")
    order = candidates[ranks]
    survivors = 0
    while len(order) and survivors < settings.max_detections:
      best = order[0]
      kept.append((scores[best, category], best, category))
      survivors += 1
      if settings.nms_kind == "boxes":
        boxes = proposals.boxes
        overlap = box_iou(boxes[order], boxes[[best]])[:, 0]
        apart = overlap <= settings.nms_iou
      else:
        intersection = members[order] @ (members[best] * areas)
        union = size[order] + size[best] - intersection
        apart = intersection <= settings.nms_iou * union
      order = order[1:][apart[1:]]
  kept.sort(key=lambda k: -k[0])
  kept = kept[: settings.max_detections]
  index = np.array([k[1] for k in kept], np.int32)
  category = np.array([k[2] for k in kept], np.int32)
  return Detections(
    proposal=index,
    category=category,
    score=scores[index, category].astype(np.float32),
    boxes=proposals.boxes[index],
    size=proposals.superpixels.shape,
  )


def superpixel_votes(scores: np.ndarray, proposals: Proposals) -> np.ndarray:
  """Each superpixel's mean score over the proposals that hold it.

  Small proposals say more about a place than large ones: each votes with a
  weight of one over the square root of its area.

  Args:
    scores: [P, K] float32.
    proposals: the same P proposals.

  Returns:
    [S, K] float32.
  """
  members = proposals.membership.astype(np.float32)
  areas = np.bincount(
    proposals.superpixels.ravel(), minlength=members.shape[1]
  ).astype(np.float32)
  weight = 1 / np.sqrt(np.maximum(members @ areas, 1))
  votes = (members * weight[:, None]).T @ scores
  return votes / np.maximum(members.T @ weight, 1e-12)[:, None]
