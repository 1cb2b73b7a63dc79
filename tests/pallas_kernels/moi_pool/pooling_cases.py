"""MoIPool in numpy loops, and the random cases that its tests share."""

import math

import numpy as np

f32 = np.float32


def loop_pool(features, masks, boxes, output_size):
  """Eq. 5 cell by cell: the pooled features and the argmax, -1 if empty.

  NaN is the largest of all, and -inf is nothing.
  """
  height, width, channels = features.shape
  shape = (len(boxes), *output_size, channels)
  pooled = np.zeros(shape, np.float32)
  argmax = np.full(shape, -1)
  for p, (y0, x0, y1, x1) in enumerate(boxes):
    # RoIPool rounds the bins' sizes and edges to float32.
    bin_height = f32(max(y1 - y0 + 1, 1)) / f32(output_size[0])
    bin_width = f32(max(x1 - x0 + 1, 1)) / f32(output_size[1])
    for u in range(output_size[0]):
      top = y0 + math.floor(f32(u) * bin_height)
      bottom = y0 + math.ceil(f32(u + 1) * bin_height)
      for v in range(output_size[1]):
        left = x0 + math.floor(f32(v) * bin_width)
        right = x0 + math.ceil(f32(v + 1) * bin_width)
        for y in range(max(top, 0), min(bottom, height)):
          for x in range(max(left, 0), min(right, width)):
            if not masks[p, y, x]:
              continue
            for c in range(channels):
              new, old = features[y, x, c], pooled[p, u, v, c]
              if argmax[p, u, v, c] < 0:
                wins = new != -np.inf
              else:
                wins = new > old or (np.isnan(new) and not np.isnan(old))
              if wins:
                pooled[p, u, v, c] = new
                argmax[p, u, v, c] = y * width + x
  return pooled, argmax


def random_case(seed=0, *, grid=(9, 13), channels=3, proposals=12, ties=False):
  """Signed features, sparse masks, boxes that cross the border; float32."""
  rng = np.random.default_rng(seed)
  features = rng.normal(-1, size=(*grid, channels)).astype(np.float32)
  if ties:
    features = np.round(features)
  masks = rng.random((proposals, *grid)) < 0.4
  ends = rng.integers(-3, max(grid) + 3, (proposals, 2, 2))
  boxes = np.sort(ends, axis=1).reshape(proposals, 4).astype(np.int32)
  boxes[0] = 0, 0, grid[0] - 1, grid[1] - 1
  boxes[1] = 4, 5, 4, 5  # one cell
  boxes[2] = -5, -5, -2, -2  # outside
  boxes[3] = grid[0], 0, grid[0] + 4, 4  # just outside
  boxes[4] = 3, 4, 1, 1  # end before start: one cell, as in RoIPool
  masks[5] = False
  return features, masks, boxes


def unusual_case():
  """A random case with NaN, infinities and bins of nothing else."""
  features, masks, boxes = random_case(14)
  rng = np.random.default_rng(15)
  for value, share in ((np.nan, 0.05), (np.inf, 0.05), (-np.inf, 0.4)):
    features[rng.random(features.shape) < share] = value
  features[:2] = -np.inf
  return features, masks, boxes
