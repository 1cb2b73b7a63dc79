"""Pooling of boxes and arbitrarily shaped segments, for JAX.

Depends on jax (0.10.2 or newer) and the standard library only; the folder may
lie in another package. Every function works on one image (no batch axis), can
be jitted and vmapped, and takes its options by keyword.

Axes: P proposals, S superpixels, C channels, H x W pixels, Hf x Wf cells of the
feature grid, with stride = H / Hf = W / Wf pixels per cell. Boxes are
(y0, x0, y1, x1). In pixels they are half-open floats; on the feature grid they
are integers with an INCLUSIVE end, as in RoIPool (see `grid_boxes`).
"""

from .grid import (
  available_bins,
  available_cells,
  cells_in_boxes,
  grid_boxes,
  superpixel_cells,
  superpixel_coverage,
  superpixel_masks,
)
from .moi_pool import masked_average, moi_pool
from .roi_align import roi_align
from .roi_pool import roi_pool
from .tps_pool import tps_pool

__all__ = [
  "available_bins",
  "available_cells",
  "cells_in_boxes",
  "grid_boxes",
  "masked_average",
  "moi_pool",
  "roi_align",
  "roi_pool",
  "superpixel_cells",
  "superpixel_coverage",
  "superpixel_masks",
  "tps_pool",
]
