"""Classes of cells from tags, by expectation-maximisation.

S^MIL tells what is typical of a tag's images, not of its class: where sky, tree
and building share their images, the best segment of "sky" is often a tree. A
classifier of cells whose classes exclude one another has to decide. It learns
from its own decisions (Papandreou et al., "Weakly- and semi-supervised learning
of a DCNN for semantic image segmentation", 2015), which obey the tags: tagged
classes are preferred, and each of these has a least share of the image (Pathak
et al., "Constrained convolutional neural networks", 2015). Tags do not name all
that an image shows: what looks much more like another class teaches nothing.

Everything here is a constant for the gradient: callers pass logits through
`jax.lax.stop_gradient`, or use the results only as targets and scores.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jtsm_jax.models.proposal_features import for_each_image
from jtsm_jax.types import Batch

ROUNDS = 30
"""Of the projection onto the least shares: enough for 1 % of the image."""

MOST = 0.9
"""Of an image that the least shares of its tags can demand together."""


def prefer_tags(
  logits: jax.Array, tags: jax.Array, advantage: float
) -> jax.Array:
  """Logits in which tagged classes have an advantage over the others.

  Args:
    logits: [B, Hf, Wf, K] float32.
    tags: [B, K] float32, 0 or 1.
    advantage: what the others lose.

  Returns:
    [B, Hf, Wf, K] float32, no more than `logits`.
  """
  return jnp.where(tags[:, None, None] > 0, logits, logits - advantage)


def assign_cells(
  logits: jax.Array, tags: jax.Array, inside: jax.Array, shares: jax.Array
) -> jax.Array:
  """What the cells are to learn: the E-step.

  Of all distributions over the classes in which each tagged class has its least
  share of the image, the nearest to the classifier's (in the Kullback-Leibler
  divergence): a class with too little has its logits raised. What falls to
  classes without a tag is left out.

  Args:
    logits: [B, Hf, Wf, K] float32, from `prefer_tags`.
    tags: [B, K] float32, 0 or 1.
    inside: [B, Hf, Wf] bool, cells that lie in the image.
    shares: [K] float32 in [0, 1], the least share of each class. Where those of
      an image's tags sum up to more than `MOST`, they shrink to it.

  Returns:
    [B, Hf, Wf, K] float32, sums of up to 1; 0 outside the image and where there
    is no tag.
  """
  return jax.vmap(_assign_image, in_axes=(0, 0, 0, None))(
    logits, tags, inside, shares
  )


def _assign_image(logits, tags, inside, shares):
  tagged = tags > 0
  shares = jnp.where(tagged, shares, 0.0)
  shares *= jnp.minimum(1, MOST / jnp.maximum(shares.sum(), 1e-6))
  weight = inside[..., None].astype(jnp.float32)
  count = jnp.maximum(weight.sum(), 1)

  def distribution(bias):
    return jax.nn.softmax(logits + bias) * weight * tagged

  def project(_, bias):
    found = distribution(bias).sum((0, 1)) / count
    wanted = jnp.log(jnp.maximum(shares, 1e-6))
    raised = bias + wanted - jnp.log(jnp.maximum(found, 1e-6))
    return jnp.where(tagged, jnp.maximum(raised, 0), 0)

  bias = jax.lax.fori_loop(0, ROUNDS, project, jnp.zeros_like(shares))
  return distribution(bias)


def class_maps(logits: jax.Array, inside: jax.Array) -> jax.Array:
  """Probabilities of the cells.

  Args:
    logits: [B, Hf, Wf, K] float32.
    inside: [B, Hf, Wf] bool, cells that lie in the image.

  Returns:
    [B, Hf, Wf, K] float32 in [0, 1], sums of 1; 0 outside the image.
  """
  return jax.nn.softmax(logits) * inside[..., None]


def map_presence(maps: jax.Array, inside: jax.Array) -> jax.Array:
  """How much the maps speak for each class in an image.

  The fourth power mean of the cells: between the mean, for which a small thing
  is nothing, and the maximum, for which one cell is enough.

  Args:
    maps: [B, Hf, Wf, K] float32 in [0, 1].
    inside: [B, Hf, Wf] bool, cells that lie in the image.

  Returns:
    [B, K] float32 in [0, 1]; 0 without a cell inside.
  """
  count = jnp.maximum(inside.sum((1, 2)), 1)
  powers = jnp.where(inside[..., None], maps**4, 0)
  return (powers.sum((1, 2)) / count[:, None]) ** 0.25


def tagged_overlap(
  logits: jax.Array, batch: Batch, inside: jax.Array, *, advantage: float
) -> jax.Array:
  """How well each proposal matches the maps of its image's tags.

  Args:
    logits: [B, Hf, Wf, K] float32 of the cells.
    batch: tags, superpixels and membership are read.
    inside: [B, Hf, Wf] bool, cells that lie in the image.
    advantage: of tagged classes, see `prefer_tags`.

  Returns:
    [B, P, K] float32 in [0, 1].
  """
  maps = class_maps(prefer_tags(logits, batch.tags, advantage), inside)
  return map_overlap(maps, batch)


def map_overlap(maps: jax.Array, batch: Batch) -> jax.Array:
  """How well each proposal matches the map of each class: their soft IoU.

  Args:
    maps: [B, Hf, Wf, K] float32 in [0, 1].
    batch: superpixels and membership are read.

  Returns:
    [B, P, K] float32 in [0, 1].
  """
  return for_each_image(
    _map_overlap_image, maps, batch.superpixels, batch.membership
  )


def _map_overlap_image(maps, superpixels, membership):
  num_superpixels = membership.shape[1]
  coverage = pk.superpixel_cells(
    superpixels,
    num_superpixels=num_superpixels,
    stride=superpixels.shape[0] // maps.shape[0],
  )
  multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  members = membership.astype(jnp.float32)
  flat = coverage.reshape(num_superpixels, -1)
  # A cell at the border has fewer pixels.
  maps = maps.reshape(-1, maps.shape[-1])
  in_image = flat.sum(0)[:, None] * maps
  intersection = multiply(members, multiply(flat, maps))
  size = multiply(members, flat.sum(1))[:, None] + in_image.sum(0)
  return intersection / jnp.maximum(size - intersection, 1e-6)
