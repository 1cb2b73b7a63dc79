"""The terms of the loss L_PM + L_IS + L_SS (Eq. 1), of a batch or a part of it.

A mean over the images, proposals or pixels of a batch is a sum over the count
of the whole batch, which is known before any part of it is computed. So the
shares of the parts sum up to the loss of the whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jtsm_jax.losses import mil, refinement, segmentation
from jtsm_jax.losses.cells import cell_loss
from jtsm_jax.mining import cells, labels
from jtsm_jax.models import proposal_blocks
from jtsm_jax.models.instance_branch import MASK_SIZE
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.models.proposal_features import area_share
from jtsm_jax.train.random_keys import DropoutKeys
from jtsm_jax.types import Batch, Mined, MiningOutputs, PseudoMasks

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MiningSettings:
  """How segments are mined; the fields are those of `mining.labels.mine`."""

  num_things: int
  num_slots: int
  segments_per_thing: int = 1
  segments_per_stuff: int = 3
  score_ratio: float = 0.5
  foreground_iou: float = 0.5
  background_iou: tuple[float, float] = (0.0, 0.5)
  iou_kind: str = "masks"


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """How losses are reduced and what the instance branch learns from."""

  mil_reduction: str = "sum"
  refinement_reduction: str = "mean"
  instances_per_image: int = 64
  weight_instances: bool = True  # Eq. 9; the authors' code does not
  mask_stride: int = 4  # canvas pixels per cell of a pseudo mask
  # Least share of an image that belongs to a tagged thing, and to tagged stuff.
  cell_shares: tuple[float, float] = (0.12, 0.25)
  tag_advantage: float = 2.0  # of tagged classes over others, logits


class MiningCounts(NamedTuple):
  """What the means of L_PM are over, in the whole batch of a step.

  Attributes:
    images: examples that are no padding.
    tagged: images with tags.
    proposing: images with proposals.
    proposals: valid proposals.
  """

  images: jax.Array
  tagged: jax.Array
  proposing: jax.Array
  proposals: jax.Array


def mining_counts(batch: Batch) -> MiningCounts:
  """The counts of a whole batch."""
  return MiningCounts(
    images=(batch.image_index >= 0).sum(),
    tagged=batch.tags.any(1).sum(),
    proposing=batch.valid.any(1).sum(),
    proposals=batch.valid.sum(),
  )


def mining_loss(
  model: JTSM,
  variables: Any,
  batch: Batch,
  keys: DropoutKeys,
  *,
  counts: MiningCounts,
  mining: MiningSettings,
  losses: LossSettings,
  proposal_block: int = 0,
) -> tuple[jax.Array, tuple[Metrics, Mined, jax.Array]]:
  """L_PM (Eq. 4) of a batch, or the share of a part of it.

  With a cell head its loss is added. The first refinement head then learns from
  what matches the maps of the tagged classes, in place of S^MIL, and the last
  mining looks at both.

  Args:
    model: the model.
    variables: what `model.apply` takes.
    batch: the examples.
    keys: for dropout.
    counts: of the whole batch.
    mining: how segments are mined.
    losses: how losses are reduced.
    proposal_block: proposals that are pooled at a time, see
      `models.proposal_blocks`; the result is the same.

  Returns:
    The loss; its terms and the share of positive proposals of each head, which
    sum up over the parts of a batch; what the last head mines; the image scores
    [B, K].
  """
  options = dataclasses.asdict(mining)
  # Norm layers keep the statistics of the warm-up: batches are small from now.
  features = model.apply(variables, batch, method="features")
  described = proposal_blocks.describe(
    model,
    variables,
    features,
    batch,
    keys=keys.neck,
    proposal_block=proposal_block,
  )
  outputs = model.apply(variables, described, batch.valid, method="judge")
  loss = mil.mil_loss(
    outputs.image_scores,
    batch.tags,
    valid=batch.image_index >= 0,
    reduction=losses.mil_reduction,
    count=counts.images,
  )
  metrics = {"loss/mil": loss}
  # Head r learns from the scores of the head before it; S^MIL is the first.
  scores, overlap = outputs.mil_scores, None
  if model.cells is not None:
    logits = model.apply(
      variables, features, keys=keys.cells, method="cell_logits"
    )
    inside = model.inside(batch)
    term = _cell_term(
      logits, inside, batch, counts=counts, mining=mining, losses=losses
    )
    metrics["loss/cells"] = term
    loss += term
    # Labels come of it, so nothing is differentiated.
    constant = jax.lax.stop_gradient(logits)
    scores = overlap = cells.tagged_overlap(
      constant, batch, inside, advantage=losses.tag_advantage
    )
  for r, logits in enumerate(outputs.refinement_logits):
    mined = labels.mine(scores, outputs.image_scores, batch, **options)
    term = refinement.refinement_loss(
      logits,
      mined,
      valid=batch.valid,
      reduction=losses.refinement_reduction,
      count=counts.proposing,
    )
    metrics[f"loss/refinement_{r + 1}"] = term
    metrics[f"mining/positive_{r + 1}"] = mil.masked_mean(
      (mined.label < batch.tags.shape[1]).astype(jnp.float32),
      batch.valid,
      count=counts.proposals,
    )
    loss += term
    scores = jax.nn.softmax(logits)
  scores = last_scores(outputs, overlap)
  mined = labels.mine(scores, outputs.image_scores, batch, **options)
  return loss, (metrics, mined, outputs.image_scores)


def _cell_term(logits, inside, batch, *, counts, mining, losses):
  """The loss of the cell head."""
  preferred = cells.prefer_tags(
    jax.lax.stop_gradient(logits), batch.tags, losses.tag_advantage
  )
  is_thing = jnp.arange(batch.tags.shape[1]) < mining.num_things
  shares = jnp.where(is_thing, *losses.cell_shares)
  targets = cells.assign_cells(preferred, batch.tags, inside, shares)
  return cell_loss(logits, targets, count=counts.tagged)


def last_scores(outputs: MiningOutputs, overlap: jax.Array | None) -> jax.Array:
  """The scores by which the segments are mined that the branches learn from.

  Args:
    outputs: of B images.
    overlap: [B, P, K] float32 in [0, 1], how proposals match the maps of the
      cell head (`mining.cells.tagged_overlap`); None without one.

  Returns:
    [B, P, K] float32 in [0, 1]: of the last refinement head, or S^MIL without
    any, times the overlap.
  """
  scores = outputs.mil_scores
  if outputs.refinement_logits:
    scores = jax.nn.softmax(outputs.refinement_logits[-1])[..., :-1]
  return scores if overlap is None else scores * overlap


def mining_metrics(
  mined: Mined, image_scores: jax.Array, batch: Batch
) -> Metrics:
  """What tells good mining from bad without any mask, of a whole batch.

  The area of the mined segments matters most: a run that mines the tiniest or
  the largest proposals is lost, and its losses do not show it.
  """
  share = jax.vmap(area_share)(batch.superpixels, batch.membership)
  area = jnp.take_along_axis(share, mined.proposal, axis=1)
  predicted = (image_scores > 0.5).astype(jnp.float32)
  return {
    "tags/accuracy": mil.masked_mean(
      (predicted == batch.tags).mean(1), batch.image_index >= 0
    ),
    "mining/area": mil.masked_mean(area, mined.valid),
    "mining/score": mil.masked_mean(mined.score, mined.valid),
  }


@flax.struct.dataclass
class BranchTargets:
  """What the branches learn from, made of re-estimated masks.

  Attributes:
    boxes: [B, N, 4] float32, the sampled proposals, canvas pixels; None without
      an instance branch, like the next four.
    masks: [B, N, m, m] float32, 0 or 1.
    category: [B, N] int32.
    weight: [B, N] float32.
    valid: [B, N] bool.
    semantic: [B, h, w] int32, see `losses.segmentation.semantic_targets`; None
      without a semantic branch.
  """

  boxes: jax.Array | None = None
  masks: jax.Array | None = None
  category: jax.Array | None = None
  weight: jax.Array | None = None
  valid: jax.Array | None = None
  semantic: jax.Array | None = None


def branch_targets(
  model: JTSM,
  batch: Batch,
  mined: Mined,
  pseudo: PseudoMasks,
  keys: jax.Array,
  *,
  num_things: int,
  losses: LossSettings,
) -> BranchTargets:
  """Makes the targets of a batch.

  Args:
    model: tells which branches there are.
    batch: its boxes are read.
    mined: segments of the batch.
    pseudo: their masks.
    keys: [B], for the choice of proposals.
    num_things: T.
    losses: how many proposals, and their weight.
  """
  targets = BranchTargets()
  if model.instance is not None:
    index, valid = segmentation.sample_instances(
      keys, mined, num_things=num_things, count=losses.instances_per_image
    )

    def take(x):
      return jax.vmap(lambda row, i: row[i])(x, index)

    boxes, slot, weight = (
      take(batch.boxes),
      take(mined.slot),
      take(mined.weight),
    )
    masks = jax.vmap(
      lambda masks, slots, box: segmentation.instance_targets(
        masks, slots, box / losses.mask_stride, size=MASK_SIZE
      )
    )(pseudo.masks, slot, boxes)
    targets = BranchTargets(
      boxes=boxes,
      masks=masks,
      category=take(mined.label),
      weight=weight if losses.weight_instances else jnp.ones_like(weight),
      valid=valid & jnp.take_along_axis(pseudo.valid, slot, axis=1),
    )
  if model.semantic is not None:
    targets = targets.replace(
      semantic=segmentation.semantic_targets(
        pseudo, mined, num_things=num_things
      )
    )
  return targets


class BranchCounts(NamedTuple):
  """What the means of L_IS and L_SS are over, in the whole batch of a step.

  Attributes:
    instances: proposals that the instance branch learns from.
    pixels: cells that the semantic branch learns from.
  """

  instances: jax.Array | int
  pixels: jax.Array | int


def branch_counts(targets: BranchTargets) -> BranchCounts:
  """The counts of a whole batch."""
  instances, pixels = 0, 0
  if targets.valid is not None:
    instances = targets.valid.sum()
  if targets.semantic is not None:
    pixels = (targets.semantic != segmentation.IGNORE).sum()
  return BranchCounts(instances, pixels)


def branch_loss(
  model: JTSM,
  variables: Any,
  batch: Batch,
  targets: BranchTargets,
  *,
  counts: BranchCounts,
) -> tuple[jax.Array, Metrics]:
  """L_IS + L_SS of a batch, or the share of a part of it.

  Args:
    model: the model.
    variables: what `model.apply` takes.
    batch: the examples; features, or images, are read.
    targets: of the same examples.
    counts: of the whole batch.

  Returns:
    The loss, a float32 scalar of at least 0, to which absent branches add 0;
    and the terms of those that there are, "loss/instance" and "loss/semantic".
    Both sum up over the parts of a batch.
  """
  features = model.apply(variables, batch, method="features")
  loss = jnp.zeros(())
  metrics = {}
  if model.instance is not None:
    term = segmentation.instance_loss(
      model.apply(variables, features, targets.boxes, method="instance_logits"),
      targets.masks,
      targets.category,
      targets.weight,
      targets.valid,
      count=counts.instances,
    )
    metrics["loss/instance"] = term
    loss += term
  if model.semantic is not None:
    term = segmentation.semantic_loss(
      model.apply(variables, features, method="semantic_logits"),
      targets.semantic,
      count=counts.pixels,
    )
    metrics["loss/semantic"] = term
    loss += term
  return loss, metrics
