"""From the feature map to one description of each segment proposal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import pallas_kernels as pk
from jtsm_jax.types import Batch


class ProposalFeatures(nn.Module):
  """Pools every proposal of a batch (Eq. 5-8) and arranges what the neck reads.

  With the defaults this is the paper's: 7 x 7 MoIPool, compensated, flattened.
  The other options are what small sets of real photographs need; see
  docs/decisions.md.

  Attributes:
    stride: pixels per cell of the feature map.
    pooling: "moi" (masked), "tps" (masked, the segment bent into its box),
      "roi" (RoIPool) or "roi_align".
    output_size: bins, rows and columns.
    compensation: of MoIPool, see `pallas_kernels.moi_pool`; the mean over bins
      has no use for it.
    availability: which cells a segment owns, see
      `pallas_kernels.superpixel_masks`.
    reduce: "flatten" keeps the bins apart; "mean" averages the non-empty bins,
      which ties linear heads over the bins.
    average: append the average of the features over the segment, each cell
      weighted by how much of it the segment covers (over the box when `pooling`
      is not masked).
    center: subtract the mean proposal and divide by the spread; both are
      constants that calibration sets.
    size_exponents: scale the pooled part and the averaged part by the
      proposal's share of the image to this power; 0 hides the size.
    sampling_ratio: of RoIAlign, see `pallas_kernels.roi_align`.
    dtype: of the result; means, spreads and shares are float32.
  """

  stride: int
  pooling: str = "moi"
  output_size: tuple[int, int] = (7, 7)
  compensation: str | None = "bins"
  availability: str = "any"
  reduce: str = "flatten"
  average: bool = False
  center: bool = False
  size_exponents: tuple[float, float] = (0.0, 0.0)
  sampling_ratio: int | None = 2
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, batch: Batch) -> jax.Array:
    """Describes each proposal of a batch.

    Args:
      features: [B, Hf, Wf, C] float.
      batch: superpixels, membership and boxes are read.

    Returns:
      [B, P, D] of `dtype`, neither bounded nor normalised; padded proposals are
      described, too. D is C, or bins x C where they are flattened, and C more
      with `average`.

    Raises:
      ValueError: `pooling` or `reduce` is unknown, or a part has no exponent.
    """
    parts = self.pool(features, batch)
    if self.center:
      parts = [self._centred(i, part) for i, part in enumerate(parts)]
    share = jax.vmap(area_share)(batch.superpixels, batch.membership)
    exponents = self.size_exponents[: len(parts)]
    parts = [
      part * share[..., None] ** exponent if exponent else part
      for part, exponent in zip(parts, exponents, strict=True)
    ]
    parts = [part.astype(self.dtype) for part in parts]
    return jnp.concatenate(parts, axis=-1)

  def pool(self, features: jax.Array, batch: Batch) -> list[jax.Array]:
    """The pooled part and, if asked for, the averaged part: [B, P, Di] each."""
    return for_each_image(
      self._pool_image,
      features,
      batch.superpixels,
      batch.membership,
      batch.boxes,
    )

  def _pool_image(self, features, superpixels, membership, boxes):
    grid = pk.grid_boxes(boxes, stride=self.stride)
    # Rectangles have no bin to leave out.
    bins = jnp.ones((len(boxes), *self.output_size), bool)
    if self.pooling in ("moi", "tps"):
      weights = pk.superpixel_coverage(
        superpixels, membership, stride=self.stride
      )
      masks = pk.available_cells(weights, grid, availability=self.availability)
      if self.pooling == "tps":
        pooled = pk.tps_pool(
          features, masks, grid, output_size=self.output_size
        )
      else:
        pooled = pk.moi_pool(
          features,
          masks,
          grid,
          output_size=self.output_size,
          compensation=self.compensation if self.reduce == "flatten" else None,
        )
        bins = pk.available_bins(masks, grid, output_size=self.output_size)
    else:
      weights = pk.cells_in_boxes(grid, grid_size=features.shape[:2])
      if self.pooling == "roi":
        pooled = pk.roi_pool(features, grid, output_size=self.output_size)
      elif self.pooling == "roi_align":
        pooled = pk.roi_align(
          features,
          boxes,
          stride=self.stride,
          output_size=self.output_size,
          sampling_ratio=self.sampling_ratio,
        )
      else:
        raise ValueError(
          f"pooling is {self.pooling!r}; wanted 'moi', 'tps', 'roi' or "
          "'roi_align'"
        )
    if self.reduce == "flatten":
      parts = [pooled.reshape(len(boxes), -1)]
    elif self.reduce == "mean":
      count = jnp.maximum(bins.sum((1, 2)), 1)
      parts = [pooled.sum((1, 2), dtype=jnp.float32) / count[:, None]]
    else:
      raise ValueError(f"reduce is {self.reduce!r}; wanted 'flatten' or 'mean'")
    if self.average:
      parts.append(pk.masked_average(features, weights))
    return parts

  def _centred(self, index: int, part: jax.Array) -> jax.Array:
    dimension = part.shape[-1]
    mean = self.variable(
      "constants", f"mean_{index}", jnp.zeros, (dimension,)
    ).value
    scale = self.variable("constants", f"scale_{index}", jnp.ones, ()).value
    return (part - mean) / scale


def for_each_image(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """`function` of each image of a batch, on the devices that have its images.

  Args:
    function: from arrays without the axis B to a tree of such arrays.
    *arrays: [B, ...].
  """

  def apply(*arrays):
    # Image by image is faster where nothing runs in parallel anyhow.
    return jax.lax.platform_dependent(
      *arrays,
      cpu=lambda *a: jax.lax.map(lambda image: function(*image), a),
      default=jax.vmap(function),
    )

  # Each device walks as far as its own boxes need. Pallas kernels, which cannot
  # be split otherwise, do not run with check_vma.
  mesh = jax.sharding.get_abstract_mesh()
  if "data" in mesh.axis_names and mesh.shape["data"] > 1:
    spec = PartitionSpec("data")
    apply = jax.shard_map(apply, in_specs=spec, out_specs=spec, check_vma=False)
  return apply(*arrays)


def area_share(superpixels: jax.Array, membership: jax.Array) -> jax.Array:
  """Area of each proposal as a share of its image: [P] float32 in [0, 1]."""
  areas = superpixel_areas(superpixels, membership.shape[1])
  size = jnp.matmul(
    membership.astype(jnp.float32), areas, precision=jax.lax.Precision.HIGHEST
  )
  return size / jnp.maximum(areas.sum(), 1)


def superpixel_areas(superpixels: jax.Array, count: int) -> jax.Array:
  """Pixels of each superpixel on the canvas, [S] float32; no padding."""
  flat = superpixels.reshape(-1).astype(jnp.int32)
  index = jnp.where(flat < 0, count, flat)
  return jnp.zeros(count + 1, jnp.float32).at[index].add(1.0)[:count]
