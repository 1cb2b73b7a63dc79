"""The whole model: backbone, mining branch, instance and semantic branches."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtsm_jax.models.cell_head import CellHead
from jtsm_jax.models.colours import coloured_images
from jtsm_jax.models.features import FeatureExtractor
from jtsm_jax.models.instance_branch import InstanceBranch
from jtsm_jax.models.neck_and_heads import MiningHeads, Neck, TagHead
from jtsm_jax.models.proposal_features import ProposalFeatures
from jtsm_jax.models.semantic_branch import SemanticBranch
from jtsm_jax.types import Batch, MiningOutputs


class JTSM(nn.Module):
  """Joint thing-and-stuff mining (Fig. 2).

  Each method is one branch and takes what the one before returned; nothing is
  stored on the module. A branch that a task does not need is None: instance
  segmentation drops `semantic`, detection drops both. `cells` is no part of the
  paper, see `mining.cells`.
  """

  extractor: FeatureExtractor
  proposal_features: ProposalFeatures
  neck: Neck
  heads: MiningHeads
  tag_head: TagHead
  instance: InstanceBranch | None
  semantic: SemanticBranch | None
  cells: CellHead | None = None

  def features(self, batch: Batch) -> jax.Array:
    """The feature map: cached, or from the images.

    Args:
      batch: its features are read, or else images and colour.

    Returns:
      [B, Hf, Wf, C] of the extractor's dtype, not bounded; padding has values,
      too. One cell is the extractor's stride of canvas pixels wide.
    """
    if batch.features is not None:
      return batch.features.astype(self.extractor.dtype)
    return self.extractor(coloured_images(batch))

  def extract(self, images: jax.Array) -> jax.Array:
    """The feature map of images [B, H, W, 3] uint8, like that of `features`."""
    return self.extractor(images)

  def stages(self, images: jax.Array, *, train: bool) -> jax.Array:
    """The feature map before its projection, for warm-up and calibration.

    See `FeatureExtractor.stages`.
    """
    return self.extractor.stages(images, train=train)

  def pool(self, features: jax.Array, batch: Batch) -> list[jax.Array]:
    """The pooled proposals before centring, float32, for calibration."""
    parts = self.proposal_features.pool(features, batch)
    return [part.astype(jnp.float32) for part in parts]

  def mine(
    self, features: jax.Array, batch: Batch, *, keys: jax.Array | None = None
  ) -> MiningOutputs:
    """The panoptic mining branch (section 3.2)."""
    return self.judge(self.describe(features, batch, keys=keys), batch.valid)

  def describe(
    self,
    features: jax.Array,
    batch: Batch,
    *,
    keys: jax.Array | None = None,
    first: int | jax.Array = 0,
  ) -> jax.Array:
    """The first half of `mine`: [B, P, D], each proposal by itself.

    Args:
      features: [B, Hf, Wf, C] float.
      batch: with all proposals, or a part of them.
      keys: [B] random keys of the images, for dropout; None at test time.
      first: index of the batch's first proposal among the image's.
    """
    features = features.astype(self.extractor.dtype)
    described = self.proposal_features(features, batch)
    return self.neck(described, keys=keys, first=first)

  def judge(self, described: jax.Array, valid: jax.Array) -> MiningOutputs:
    """The second half of `mine`: compares the proposals of an image."""
    return self.heads(described, valid)

  def instance_logits(self, features: jax.Array, boxes: jax.Array) -> jax.Array:
    """Masks of boxes, for each thing class.

    Args:
      features: [B, Hf, Wf, C] float.
      boxes: [B, N, 4] float32, canvas pixels.

    Returns:
      [B, N, 28, 28, T] float32 logits in the frame of each box.
    """
    return self.instance(features, boxes)

  def semantic_logits(self, features: jax.Array) -> jax.Array:
    """Stuff classes of the cells of `features`, [B, Hf, Wf, C] float.

    Returns:
      [B, Hf, Wf, 1 + stuff] float32 logits; channel 0 is any thing.
    """
    return self.semantic(features)

  def cell_logits(
    self, features: jax.Array, *, keys: jax.Array | None = None
  ) -> jax.Array:
    """Logits [B, Hf, Wf, K] float32 of the cells; `keys` [B] for dropout."""
    return self.cells(features.astype(self.extractor.dtype), keys=keys)

  def inside(self, batch: Batch) -> jax.Array:
    """[B, Hf, Wf] bool: True for cells whose first pixel lies in the image.

    Args:
      batch: superpixels [B, H, W] are read; H and W are multiples of the
        extractor's stride.
    """
    stride = self.extractor.stride
    return batch.superpixels[:, ::stride, ::stride] >= 0

  def tag_logits(self, stages: jax.Array, size: jax.Array) -> jax.Array:
    """Tag logits [B, K] float32 of images of `size` [B, 2] canvas pixels."""
    stride = self.extractor.stride
    y = jnp.arange(stages.shape[1]) * stride
    x = jnp.arange(stages.shape[2]) * stride
    inside = (y < size[:, :1])[:, :, None] & (x < size[:, 1:])[:, None, :]
    return self.tag_head(stages, inside)

  def __call__(self, batch: Batch) -> None:
    """Touches every branch, so that `init` makes all variables."""
    features = self.features(batch.replace(features=None))
    self.mine(features, batch)
    self.tag_logits(self.stages(batch.images, train=False), batch.size)
    if self.instance is not None:
      self.instance_logits(features, batch.boxes[:, :1])
    if self.semantic is not None:
      self.semantic_logits(features)
    if self.cells is not None:
      self.cell_logits(features)
