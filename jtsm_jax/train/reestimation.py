"""Mined segments of a batch to pseudo masks on its canvas, by host threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.types import Batch, Mined, Proposals, PseudoMasks

Futures = list[list[Future | None]]


@dataclasses.dataclass
class InFlight:
  """Segments of a step whose masks the branches have not learnt from yet.

  Attributes:
    batch: this process's part of the batch, on the host.
    device_batch: the batch on the devices.
    mined: its segments, on the devices, as soon as the step has found them.
    futures: of their masks, as soon as they are asked for.
  """

  batch: Batch
  device_batch: Batch
  mined: Mined | None = None
  futures: Futures | None = None


def submit(
  reestimator: MaskReestimator,
  batch: Batch,
  mined: Mined,
  *,
  source: RecordSource,
  get_proposals: Callable[[str, tuple[int, int]], Proposals],
) -> Futures:
  """Asks for the masks of all mined segments of a host batch.

  Args:
    reestimator: makes the masks on its threads.
    batch: with B images; its `image_index` points into `source`.
    mined: [B, M] segments of the batch.
    source: the split.
    get_proposals: see `data.pipeline.with_fallback`.

  Returns:
    B lists of M futures; None for an empty slot.
  """
  return [
    [
      _submit_one(reestimator, source, get_proposals, int(index), int(proposal))
      if ok and index >= 0
      else None
      for proposal, ok in zip(proposals, valid, strict=True)
    ]
    for index, proposals, valid in zip(
      batch.image_index, mined.proposal, mined.valid, strict=True
    )
  ]


def _submit_one(reestimator, source, get_proposals, index, proposal):
  image_id = source.image_ids[index]

  def load():
    image = decode_image(source[index].image, name=image_id)
    proposals = get_proposals(image_id, image.shape[:2])
    return image, proposals.mask(proposal)

  return reestimator.submit(image_id, proposal, load)


def collect(futures: Futures, batch: Batch, *, mask_stride: int) -> PseudoMasks:
  """Waits for the masks and lays them on the batch's canvas.

  Args:
    futures: from `submit`.
    batch: the same batch; its superpixels give the canvas.
    mask_stride: canvas pixels per cell of the result.

  Returns:
    Masks sampled at the middle of each cell, [B, M, H / stride, W / stride].
  """
  shape = tuple(side // mask_stride for side in batch.superpixels.shape[1:])
  masks = np.zeros((len(futures), len(futures[0]), *shape), bool)
  valid = np.zeros(masks.shape[:2], bool)
  for i, slots in enumerate(futures):
    for m, future in enumerate(slots):
      if future is not None:
        masks[i, m] = _on_canvas(
          future.result(),
          batch.window[i],
          batch.size[i],
          batch.flip[i],
          shape,
          mask_stride,
        )
        valid[i, m] = True
  return PseudoMasks(masks, valid)


def _on_canvas(mask, window, size, flip, shape, stride):
  y0, x0, y1, x1 = window
  mask = mask[y0:y1, x0:x1]
  canvas = np.zeros(shape, bool)
  rows, columns = (
    (np.arange(cells) * stride + stride // 2)[: -(-int(side) // stride)]
    for cells, side in zip(shape, size, strict=True)
  )
  source_rows = np.minimum(
    rows * mask.shape[0] // int(size[0]), mask.shape[0] - 1
  )
  source_columns = np.minimum(
    columns * mask.shape[1] // int(size[1]), mask.shape[1] - 1
  )
  if flip:
    mask = mask[:, ::-1]
  canvas[: len(rows), : len(columns)] = mask[
    np.ix_(source_rows, source_columns)
  ]
  return canvas
