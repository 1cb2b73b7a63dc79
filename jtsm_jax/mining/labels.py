"""Pseudo labels for proposals, from the scores of the head before.

Everything here is a constant for the gradient: callers pass scores through
`jax.lax.stop_gradient`, or use the results only as labels and weights.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jtsm_jax.models.proposal_features import superpixel_areas
from jtsm_jax.types import Batch, Mined


def mine(
  scores: jax.Array,
  image_scores: jax.Array,
  batch: Batch,
  *,
  num_things: int,
  num_slots: int,
  segments_per_thing: int = 1,
  segments_per_stuff: int = 3,
  score_ratio: float = 0.5,
  foreground_iou: float = 0.5,
  background_iou: tuple[float, float] = (0.0, 0.5),
  iou_kind: str = "masks",
) -> Mined:
  """Mines the segments of the tagged classes and labels all proposals by them.

  The first segment of a class is its highest-scored proposal. Every further one
  stands for another connected component (section 3.2): the best proposal that
  shares no pixel with the earlier ones of its class, if its score is at least
  `score_ratio` of the first.

  A proposal whose IoU with its nearest mined segment is at least
  `foreground_iou` takes that segment's class; one whose IoU lies in
  `background_iou` is background; any other is ignored. Its weight is the image
  score y of the nearest segment's class; where it touches none, the largest y
  of the tagged classes.

  Args:
    scores: [B, P, K] float32, or [B, P, K + 1] with a background column that is
      not looked at.
    image_scores: [B, K] float32, y.
    batch: tags, superpixels, membership, boxes and valid are read. A proposal
      without a pixel takes no part.
    num_things: T; classes from T on are stuff.
    num_slots: M, mined segments kept per image; the best-scored ones if there
      are more, the first segment of each class before all others.
    segments_per_thing: most segments of a thing class; the paper has 1.
    segments_per_stuff: most segments of a stuff class.
    score_ratio: see above.
    foreground_iou: see above.
    background_iou: half-open interval [low, high).
    iou_kind: whose IoU it is: of "masks" or of "boxes".

  Returns:
    The mined segments and the pseudo labels.
  """
  num_classes = image_scores.shape[-1]
  function = functools.partial(
    _mine_image,
    num_things=num_things,
    num_slots=num_slots,
    segments_per_thing=segments_per_thing,
    segments_per_stuff=segments_per_stuff,
    score_ratio=score_ratio,
    foreground_iou=foreground_iou,
    background_iou=background_iou,
    iou_kind=iou_kind,
  )
  count = batch.membership.shape[2]
  areas = jax.vmap(lambda s: superpixel_areas(s, count))(batch.superpixels)
  return jax.vmap(function)(
    jax.lax.stop_gradient(scores[..., :num_classes]),
    jax.lax.stop_gradient(image_scores),
    batch.tags,
    areas,
    batch.membership,
    batch.boxes,
    batch.valid,
  )


def _mine_image(
  scores,
  image_scores,
  tags,
  areas,
  membership,
  boxes,
  valid,
  *,
  num_things,
  num_slots,
  segments_per_thing,
  segments_per_stuff,
  score_ratio,
  foreground_iou,
  background_iou,
  iou_kind,
):
  _num_proposals, num_classes = scores.shape
  members = membership.astype(jnp.float32)
  tagged = tags > 0
  # Thin proposals may have lost their pixels as the image shrank to the canvas.
  valid &= _count(members, areas[None])[:, 0] > 0

  # Segments class by class: [rounds, K].
  rounds = max(segments_per_thing, segments_per_stuff)
  quota = jnp.where(
    jnp.arange(num_classes) < num_things, segments_per_thing, segments_per_stuff
  )
  free = jnp.broadcast_to(valid[:, None], scores.shape)
  proposals, found = [], []
  top_score = None
  for r in range(rounds):
    candidates = jnp.where(free, scores, -jnp.inf)
    best = candidates.argmax(0)  # [K]
    best_score = candidates.max(0)
    if top_score is None:
      top_score = best_score
    ok = tagged & (quota > r) & (best_score > -jnp.inf)
    if r > 0:
      ok &= best_score >= score_ratio * top_score
    proposals.append(best)
    found.append(ok)
    touching = _count(members, members[best] * areas) > 0  # [P, K]
    free &= ~touching
  proposals = jnp.stack(proposals)  # [rounds, K]
  found = jnp.stack(found)
  round_index = jnp.arange(rounds)[:, None]
  categories = jnp.broadcast_to(jnp.arange(num_classes), found.shape)
  segment_scores = scores[proposals, categories]

  # The M best, the first segment of each class before all others.
  order = jnp.where(
    found, segment_scores + 2.0 * (round_index == 0), -jnp.inf
  ).reshape(-1)
  kept = min(num_slots, order.shape[0])
  rank, slots = jax.lax.top_k(order, kept)
  pad = (0, num_slots - kept)
  proposal = jnp.pad(proposals.reshape(-1)[slots], pad)
  category = jnp.pad(categories.reshape(-1)[slots], pad)
  slot_valid = jnp.pad(rank > -jnp.inf, pad)

  # Nearest segment of each proposal.
  if iou_kind == "boxes":
    overlap = _box_iou(boxes[proposal], boxes)  # [M, P]
  else:
    overlap = segment_iou(members, areas, proposal)
  overlap = jnp.where(slot_valid[:, None], overlap, -1.0)
  slot = overlap.argmax(0)
  best_overlap = overlap.max(0)
  low, high = background_iou
  foreground = best_overlap >= foreground_iou
  background = (best_overlap >= low) & (best_overlap < high) & ~foreground
  label = jnp.where(foreground, category[slot], num_classes)
  present_score = jnp.where(tagged, image_scores, 0.0)
  weight = jnp.where(
    best_overlap > 0, present_score[category[slot]], present_score.max()
  )
  weight = jnp.where(valid & (foreground | background), weight, 0.0)
  return Mined(
    proposal=proposal.astype(jnp.int32),
    category=category.astype(jnp.int32),
    score=scores[proposal, category],
    valid=slot_valid,
    label=label.astype(jnp.int32),
    weight=weight,
    slot=slot.astype(jnp.int32),
  )


def segment_iou(
  members: jax.Array, areas: jax.Array, proposal: jax.Array
) -> jax.Array:
  """Mask IoU of some proposals with all, from superpixel areas.

  Args:
    members: [P, S] float32, 1 where the superpixel belongs to the proposal.
    areas: [S] float32, pixels.
    proposal: [M] int32.

  Returns:
    [M, P] float32; 0 where both are empty.
  """
  size = _count(members, areas[None])[:, 0]  # [P]
  intersection = _count(members[proposal] * areas, members)
  union = size[proposal][:, None] + size[None, :] - intersection
  return intersection / jnp.maximum(union, 1.0)


def _box_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """IoU of boxes [M, 4] (y0, x0, y1, x1) with [P, 4]: [M, P]."""
  a = a[:, None]
  low = jnp.maximum(a[..., :2], b[:, :2])
  high = jnp.minimum(a[..., 2:], b[:, 2:])
  intersection = jnp.maximum(high - low, 0).prod(-1)
  areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
  return intersection / (areas[0] + areas[1] - intersection)


def _count(a: jax.Array, b: jax.Array) -> jax.Array:
  """a b^T in full float32: pixel counts must not be rounded on accelerators."""
  return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def slots_needed(
  tags, *, num_things: int, segments_per_thing: int, segments_per_stuff: int
) -> int:
  """M that loses no segment of a split: tags [N, K] of all its images."""
  count = (
    tags[:, :num_things].sum(1) * segments_per_thing
    + tags[:, num_things:].sum(1) * segments_per_stuff
  )
  return max(int(count.max()), 1)
