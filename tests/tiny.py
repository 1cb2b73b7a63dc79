"""A model, batches and weights small enough for every test."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtsm_jax.models.cell_head import CellHead
from jtsm_jax.models.features import FeatureExtractor
from jtsm_jax.models.instance_branch import InstanceBranch
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.models.neck_and_heads import MiningHeads, Neck, TagHead
from jtsm_jax.models.proposal_features import ProposalFeatures
from jtsm_jax.models.semantic_branch import SemanticBranch
from jtsm_jax.types import Batch, Mined, PseudoMasks, pack_members

CANVAS = (64, 64)
IMAGE = (40, 48)  # leaves at least two cells of padding on the canvas
STRIDE = 8
P = 12
S = 10
NUM_THINGS = 3
NUM_STUFF = 2
K = NUM_THINGS + NUM_STUFF


class Backbone(nn.Module):
  """Two strided convolutions: a cell sees nothing but its own pixels."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, *, train):
    conv = functools.partial(nn.Conv, padding="VALID", dtype=self.dtype)
    fine = nn.relu(conv(6, (4, 4), strides=4, name="fine_conv")(images))
    fine = nn.BatchNorm(
      use_running_average=not train, dtype=self.dtype, name="fine_norm"
    )(fine)
    conv = conv(8, (2, 2), strides=2, name="coarse_conv")
    return {"fine": fine, "coarse": nn.relu(conv(fine))}


def normalise(images):
  """Maps uint8 to about -1 .. 1."""
  return images / 128.0 - 1.0


def make_model(
  *,
  outputs=("coarse",),
  frozen=True,
  projection=0,
  widths=(16,),
  dropout=0.0,
  input_dropout=0.0,
  num_refinements=2,
  zero_init=False,
  availability="any",
  reduce="flatten",
  center=False,
  average=False,
  size_exponents=(0.0, 0.0),
  instance=True,
  semantic=True,
  cells=False,
  dtype=jnp.float32,
):
  """A whole model on the backbone above."""
  return JTSM(
    extractor=FeatureExtractor(
      backbone=Backbone(dtype),
      normalise=normalise,
      outputs=outputs,
      stride=STRIDE,
      projection=projection,
      frozen=frozen,
      dtype=dtype,
    ),
    proposal_features=ProposalFeatures(
      stride=STRIDE,
      output_size=(2, 2),
      availability=availability,
      reduce=reduce,
      center=center,
      average=average,
      size_exponents=size_exponents,
      dtype=dtype,
    ),
    neck=Neck(
      widths=widths,
      dropout=dropout,
      input_dropout=input_dropout,
      dtype=dtype,
    ),
    heads=MiningHeads(
      num_classes=K,
      num_refinements=num_refinements,
      zero_init=zero_init,
      dtype=dtype,
    ),
    tag_head=TagHead(num_classes=K),
    instance=InstanceBranch(
      num_things=NUM_THINGS,
      channels=4,
      num_convs=1,
      stride=STRIDE,
      dtype=dtype,
    )
    if instance
    else None,
    semantic=SemanticBranch(num_stuff=NUM_STUFF, channels=4, dtype=dtype)
    if semantic
    else None,
    cells=CellHead(num_classes=K, dropout=dropout, gain=2.0, dtype=dtype)
    if cells
    else None,
  )


def make_batch(batch_size=2, *, seed=0, image=IMAGE, canvas=CANVAS):
  """Random images in the top left of a canvas, Voronoi cells as superpixels.

  Each image is tagged with at least one thing and one stuff class.
  """
  rng = np.random.default_rng(seed)
  height, width = image
  batch = Batch(
    image_index=np.arange(batch_size, dtype=np.int32),
    images=np.zeros((batch_size, *canvas, 3), np.uint8),
    features=None,
    colour=None,
    size=np.tile(np.array(image, np.int32), (batch_size, 1)),
    flip=np.zeros(batch_size, bool),
    window=np.tile(np.array([0, 0, *image], np.int32), (batch_size, 1)),
    tags=np.zeros((batch_size, K), np.float32),
    superpixels=np.full((batch_size, *canvas), -1, np.int32),
    member_bits=np.zeros((batch_size, S, -(-P // 8)), np.uint8),
    boxes=np.zeros((batch_size, P, 4), np.float32),
    valid=np.ones((batch_size, P), bool),
  )
  y, x = np.mgrid[:height, :width]
  for b in range(batch_size):
    batch.images[b, :height, :width] = rng.integers(0, 256, (*image, 3))
    centres = rng.permutation(height * width)[:S]
    distance = (y[..., None] - centres // width) ** 2
    distance = distance + (x[..., None] - centres % width) ** 2
    superpixels = distance.argmin(-1)
    batch.superpixels[b, :height, :width] = superpixels
    batch.tags[b, rng.integers(NUM_THINGS)] = 1
    batch.tags[b, NUM_THINGS + rng.integers(NUM_STUFF)] = 1
    membership = np.zeros((P, S), bool)
    for p in range(P):
      membership[p, rng.permutation(S)[: 1 + p % 4]] = True
      rows, columns = np.nonzero(membership[p][superpixels])
      batch.boxes[b, p] = (
        rows.min(),
        columns.min(),
        rows.max() + 1,
        columns.max() + 1,
      )
    batch.member_bits[b] = pack_members(membership)
  return batch


def make_variables(model, batch, *, seed=0):
  """Random variables; with numpy, since compiling `init` takes seconds."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
  rng = np.random.default_rng(seed)

  def draw(path, x):
    name = path[-1].key
    if name in ("var", "scale") or name.startswith("scale_"):
      value = rng.uniform(0.5, 1.5, x.shape)
    elif x.ndim > 1:
      value = rng.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape)
    else:
      value = rng.normal(0, 0.1, x.shape)
    return np.asarray(value, np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def proposal_masks(batch):
  """[B, P, H, W] bool, pixel by pixel."""

  def one(membership, superpixels):
    return membership[:, jnp.maximum(superpixels, 0)] & (superpixels >= 0)

  return jax.vmap(one)(batch.membership, batch.superpixels)


def pseudo_masks(batch, mined, *, stride=4):
  """The mined segments themselves as pseudo masks."""
  middle = slice(stride // 2, None, stride)
  masks = proposal_masks(batch)[:, :, middle, middle]
  masks = jnp.take_along_axis(masks, mined.proposal[..., None, None], axis=1)
  return PseudoMasks(masks & mined.valid[..., None, None], mined.valid)


def make_mined(category, score, *, label=None, weight=None, slot=None):
  """A `Mined` of the given slots [B, M]; all of them valid."""
  category = np.asarray(category, np.int32)
  label = category if label is None else np.asarray(label, np.int32)
  ones = np.ones(label.shape, np.float32)
  return Mined(
    proposal=np.zeros_like(category),
    category=category,
    score=np.asarray(score, np.float32),
    valid=np.ones(category.shape, bool),
    label=label,
    weight=ones if weight is None else np.asarray(weight, np.float32),
    slot=np.zeros_like(label) if slot is None else np.asarray(slot, np.int32),
  )


def paths(tree):
  """Leaves by path: {"neck/fc1/kernel": array}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    "/".join(str(getattr(k, "key", k)) for k in path): leaf
    for path, leaf in leaves
  }
