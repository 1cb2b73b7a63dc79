"""Backbone to one feature map: choose stages, bring to one stride, project."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class FeatureExtractor(nn.Module):
  """The backbone's chosen stages as one map, optionally projected by a PCA.

  The projection is not trained: `fit_projection` computes it from training
  images, and it lives in the collection "constants". With a frozen backbone
  the result never changes, so it can be cached.

  Attributes:
    backbone: module from normalised images to a dict of stages.
    normalise: function from uint8 RGB to the backbone's input.
    outputs: names of the stages to use, concatenated over channels.
    stride: pixels per cell of the result; every stage is resized to it.
    projection: channels after the PCA; 0 leaves the stages as they are.
    frozen: stop gradients.
    dtype: of the result; the projection is computed in float32.
  """

  backbone: nn.Module
  normalise: Callable[[jax.Array], jax.Array]
  outputs: tuple[str, ...]
  stride: int
  projection: int = 0
  frozen: bool = True
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    if self.projection:
      self.project = Projection(self.projection)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps [B, H, W, 3] uint8 to [B, H / stride, W / stride, C].

    Norm layers use their stored statistics, also while their weights train.
    """
    x = self.stages(images, train=False)
    if self.frozen:
      x = jax.lax.stop_gradient(x)
    x = self.project(x) if self.projection else x
    return x.astype(self.dtype)

  def stages(self, images: jax.Array, *, train: bool) -> jax.Array:
    """The chosen stages before the projection, never frozen.

    Args:
      images: [B, H, W, 3] uint8 RGB; H and W are multiples of the stride.
      train: whether norm layers compute their statistics, and update them.

    Returns:
      [B, H / stride, W / stride, C] float32 in any case, C the sum of the
      stages' channels; not bounded.
    """
    stages = self.backbone(self.normalise(images), train=train)
    height = images.shape[1] // self.stride
    width = images.shape[2] // self.stride
    chosen = [stages[name].astype(jnp.float32) for name in self.outputs]
    return jnp.concatenate([_resize(x, height, width) for x in chosen], axis=-1)


class Projection(nn.Module):
  """A fixed linear map of channels; `fit_projection` computes its constants."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.channels)
    mean = self.variable("constants", "mean", jnp.zeros, shape[:1])
    matrix = self.variable("constants", "matrix", jnp.zeros, shape)
    return jnp.matmul(
      x - mean.value, matrix.value, precision=jax.lax.Precision.HIGHEST
    )


def _resize(x: jax.Array, height: int, width: int) -> jax.Array:
  """Brings [B, h, w, C] to [B, height, width, C] by mean or bilinear."""
  if x.shape[1:3] == (height, width):
    return x
  if x.shape[1] % height == 0 and x.shape[2] % width == 0:
    window = (x.shape[1] // height, x.shape[2] // width)
    return nn.avg_pool(x, window, strides=window)
  return jax.image.resize(
    x, (x.shape[0], height, width, x.shape[3]), "linear", antialias=True
  )


def fit_projection(
  cells: np.ndarray, groups: tuple[int, ...], dimension: int
) -> tuple[np.ndarray, np.ndarray]:
  """Principal components of feature cells, each stage with an equal say.

  Args:
    cells: [N, C] float32, sampled cells of the concatenated stages.
    groups: channels of each stage; they sum to C.
    dimension: components to keep.

  Returns:
    mean [C] and matrix [C, dimension], float32: `(x - mean) @ matrix` has unit
    mean variance over its components.

  Raises:
    ValueError: `groups` do not sum to C, or `dimension` exceeds C.
  """
  if sum(groups) != cells.shape[1] or dimension > cells.shape[1]:
    raise ValueError(
      f"cells have {cells.shape[1]} channels: groups {groups} must sum to it "
      f"and dimension {dimension} must not exceed it"
    )
  mean = cells.mean(0)
  centred = cells - mean
  weight = np.concatenate(
    [
      np.full(g, 1.0 / max(np.sqrt((part**2).sum(1).mean()), 1e-6))
      for g, part in zip(
        groups, np.split(centred, np.cumsum(groups)[:-1], 1), strict=True
      )
    ]
  )
  centred = centred * weight
  _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
  matrix = vectors[:, ::-1][:, :dimension]
  # The sign of an eigenvector is arbitrary: fix it, for equal runs everywhere.
  matrix = matrix * np.where(
    matrix[np.abs(matrix).argmax(0), np.arange(dimension)] < 0, -1.0, 1.0
  )
  scale = np.sqrt(((centred @ matrix) ** 2).mean())
  matrix = weight[:, None] * matrix / max(scale, 1e-6)
  return mean.astype(np.float32), matrix.astype(np.float32)
