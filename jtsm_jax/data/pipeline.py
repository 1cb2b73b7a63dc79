"""From prepared records and stored proposals to batches of static shape.

One element of the pipeline is the whole batch of a step and a pure function of
(seed, step). No iterator is saved: a resumed run begins at its step, and sees
exactly the batches that it would have seen.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import numpy as np

from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.data.sampling import BatchPlan, batch_plan, inference_plans
from jtsm_jax.data.transforms import (
  crop_proposals,
  decode_image,
  scale_boxes,
  scale_image,
  scale_labels,
  scaled_size,
)
from jtsm_jax.types import (
  PADDING,
  Batch,
  InputError,
  Proposals,
  pack_members,
)
from jtsm_jax.workers import start_worker

MAX_SUPERPIXELS = np.iinfo(np.int16).max


class ProposalSource(Protocol):
  """What the pipeline needs of a store of proposals."""

  def __contains__(self, image_id: str) -> bool: ...

  def get(self, image_id: str) -> Proposals: ...


def make_pipeline(
  source: RecordSource,
  store: ProposalSource,
  *,
  seed: int,
  canvases: tuple[tuple[int, int], ...],
  batch_size: int,
  max_proposals: int,
  max_superpixels: int,
  num_steps: int,
  start_step: int = 0,
  load_images: bool = True,
  flip: bool = True,
  crop: float = 1.0,
  colour_factor: float = 1.0,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  num_workers: int = 0,
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """Batches for training: images, tags and proposals, never a target.

  Args:
    source: the training split.
    store: the proposals of its images.
    seed: of the whole run.
    canvases: the (H, W) that a batch may have, pixels.
    batch_size: images in a batch, over all processes.
    max_proposals: P; more are cut, best first.
    max_superpixels: S.
    num_steps: the step at which the iterator ends.
    start_step: the first step.
    load_images: False gives `images=None`, for cached features.
    flip: mirror each image with probability 1/2.
    crop: the least share of an image's height and width that is shown, see
      `sampling.batch_plan`; 1 shows whole images. Tags stay the image's own.
    colour_factor: the most by which the step is to change exposure and
      saturation, see `sampling.batch_plan`; 1 for none.
    process_index: k; this process gets the k-th slice of each batch.
    process_count: n; must divide `batch_size`.
    num_threads: that make batches.
    num_workers: processes that make batches, each with `num_threads`; 0 makes
      them in this one.
    prefetch: batches that are made ahead, by each process.

  Returns:
    An iterator of (step, Batch), B = batch_size / process_count, numpy arrays.

  Raises:
    ValueError: process_count does not divide batch_size, or `batch_plan`
      refuses the arguments.
    InputError (while iterating): proposals do not fit the image or S.
  """
  local = _local_slice(batch_size, process_index, process_count)
  get_proposals = with_fallback(store)

  def plan_of(step: int) -> BatchPlan:
    return batch_plan(
      step,
      seed=seed,
      sizes=source.sizes,
      canvases=canvases,
      batch_size=batch_size,
      flip=flip,
      crop=crop,
      colour_factor=colour_factor,
    )

  def batch_of(step: int) -> tuple[int, Batch]:
    batch = make_batch(
      plan_of(step).part(local),
      source,
      get_proposals,
      max_proposals=max_proposals,
      max_superpixels=max_superpixels,
      load_images=load_images,
    )
    return step, batch

  plan_of(start_step)  # Wrong arguments fail here, not in a thread.
  steps = grain.MapDataset.range(start_step, num_steps).map(batch_of)
  dataset = steps.to_iter_dataset(_options(num_threads, prefetch))
  if num_workers:
    options = grain.MultiprocessingOptions(num_workers, prefetch)
    dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
  return iter(dataset)


def inference_batches(
  source: RecordSource,
  store: ProposalSource,
  *,
  canvases: tuple[tuple[int, int], ...],
  batch_size: int,
  max_proposals: int,
  max_superpixels: int,
  load_images: bool = True,
  flips: tuple[bool, ...] = (False,),
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  prefetch: int = 4,
) -> Iterator[Batch]:
  """Batches that show every image in each of its views.

  The views of the same images follow one another, see
  `sampling.inference_plans`. The last batch of an orientation is filled with
  padding examples, whose `image_index` is -1 and whose `valid` is False.

  Args:
    source: any split; targets are not read.
    store: the proposals of its images.
    canvases: the (H, W) to view images on, pixels.
    batch_size: images in a batch, over all processes.
    max_proposals: P; more are cut, best first.
    max_superpixels: S.
    load_images: False gives `images=None`, for cached features.
    flips: (False,) for plain views, (False, True) for mirrored ones, too.
    process_index: k; this process gets the k-th slice of each batch.
    process_count: n; must divide `batch_size`.
    num_threads: that make batches.
    prefetch: batches that are made ahead.

  Returns:
    An iterator of Batch, B = batch_size / process_count; all processes get
    equally many, of the same shapes.

  Raises:
    ValueError: process_count does not divide batch_size, or there is no canvas.
    InputError (while iterating): proposals do not fit the image or S.
  """
  local = _local_slice(batch_size, process_index, process_count)
  get_proposals = with_fallback(store)
  plans = inference_plans(
    sizes=source.sizes, canvases=canvases, batch_size=batch_size, flips=flips
  )

  def batch_of(plan: BatchPlan) -> Batch:
    return make_batch(
      plan.part(local),
      source,
      get_proposals,
      max_proposals=max_proposals,
      max_superpixels=max_superpixels,
      load_images=load_images,
    )

  batches = grain.MapDataset.source(plans).map(batch_of)
  return iter(batches.to_iter_dataset(_options(num_threads, prefetch)))


def make_batch(
  plan: BatchPlan,
  source: RecordSource,
  get_proposals: Callable[[str, tuple[int, int]], Proposals],
  *,
  max_proposals: int,
  max_superpixels: int,
  load_images: bool = True,
) -> Batch:
  """Makes the batch of a plan.

  Args:
    plan: what to show; index -1 gives a padding example.
    source: the split.
    get_proposals: (image id, (height, width)) -> Proposals.
    max_proposals: P; more are cut, best first.
    max_superpixels: S.
    load_images: False gives `images=None`; no image is read then.

  Returns:
    The batch as described in `types.Batch`. Padded proposals belong to no
    superpixel and have the box (0, 0, 1, 1), which those have, too, of which
    no pixel is on the canvas.

  Raises:
    InputError: proposals do not fit the image or S.
    ValueError: S is more than int16 can tell apart.
  """
  if max_superpixels > MAX_SUPERPIXELS:
    raise ValueError(
      f"max_superpixels is {max_superpixels}, must be at most {MAX_SUPERPIXELS}"
    )
  B, P, S = len(plan.indices), max_proposals, max_superpixels
  batch = Batch(
    image_index=np.asarray(plan.indices, np.int32),
    images=np.zeros((B, *plan.canvas, 3), np.uint8) if load_images else None,
    features=None,
    colour=plan.colours if load_images else None,
    size=np.zeros((B, 2), np.int32),
    flip=np.asarray(plan.flips, bool),
    window=np.zeros((B, 4), np.int32),
    tags=np.zeros((B, source.tags.shape[1]), np.float32),
    superpixels=np.full((B, *plan.canvas), PADDING, np.int16),
    member_bits=np.zeros((B, S, -(-P // 8)), np.uint8),
    boxes=np.tile(np.array([0, 0, 1, 1], np.float32), (B, P, 1)),
    valid=np.zeros((B, P), bool),
  )
  for b, i in enumerate(plan.indices.tolist()):
    if i < 0:
      continue
    image_id = source.image_ids[i]
    size = tuple(source.sizes[i].tolist())
    proposals = get_proposals(image_id, size)
    _check_proposals(image_id, size, proposals, S)
    proposals = proposals.best(P)
    y0, x0, y1, x1 = window = plan.windows[b]
    superpixels, boxes, left = crop_proposals(proposals, window)
    h, w = scaled_size((y1 - y0, x1 - x0), plan.canvas)
    scale_labels(superpixels, batch.superpixels[b, :h, :w], flip=plan.flips[b])
    if load_images:
      image = decode_image(source[i].image, name=image_id)
      _check_image(image_id, size, image)
      scale_image(
        image[y0:y1, x0:x1], batch.images[b, :h, :w], flip=plan.flips[b]
      )
    batch.size[b] = h, w
    batch.window[b] = window
    batch.tags[b] = source.tags[i]
    num_superpixels, num_bytes = proposals.member_bits.shape
    batch.member_bits[b, :num_superpixels, :num_bytes] = proposals.member_bits
    batch.boxes[b, : len(boxes)] = scale_boxes(
      boxes, superpixels.shape, (h, w), flip=plan.flips[b]
    )
    # A superpixel of few pixels can be lost on a smaller canvas.
    shown = np.zeros(num_superpixels, bool)
    shown[np.unique(batch.superpixels[b, :h, :w])] = True
    if not shown.all():
      left &= proposals.membership[:, shown].any(1)
    batch.boxes[b, : len(boxes)][~left] = 0, 0, 1, 1
    batch.valid[b, : len(boxes)] = left
  return batch


def images_on_canvas(plan: BatchPlan, source: RecordSource) -> np.ndarray:
  """The `images` of `make_batch` alone, without proposals.

  Args:
    plan: what to show; index -1 gives a black image.
    source: the split.

  Returns:
    [B, H, W, 3] uint8 RGB, padded with 0.
  """
  images = np.zeros((len(plan.indices), *plan.canvas, 3), np.uint8)
  for b, i in enumerate(plan.indices.tolist()):
    if i < 0:
      continue
    image = decode_image(source[i].image, name=source.image_ids[i])
    y0, x0, y1, x1 = plan.windows[b]
    h, w = scaled_size((y1 - y0, x1 - x0), plan.canvas)
    scale_image(image[y0:y1, x0:x1], images[b, :h, :w], flip=plan.flips[b])
  return images


def with_fallback(
  store: ProposalSource,
) -> Callable[[str, tuple[int, int]], Proposals]:
  """`store.get`, where an image without proposals is one proposal itself.

  Returns:
    A function of (image id, (height, width)).
  """
  warned: dict[str, object] = {}

  def get(image_id: str, size: tuple[int, int]) -> Proposals:
    if image_id in store:
      return store.get(image_id)
    mine = object()
    if warned.setdefault(image_id, mine) is mine:  # no other thread was first
      print(
        f"warning: image {image_id!r} has no proposals in the store; the whole"
        " image serves as its one proposal",
        file=sys.stderr,
      )
    return Proposals(
      superpixels=np.zeros(size, np.int32),
      member_bits=pack_members(np.ones((1, 1), bool)),
      boxes=np.array([[0, 0, *size]], np.int32),
      scores=np.ones(1, np.float32),
    )

  return get


def _check_proposals(
  image_id: str, size: tuple[int, int], proposals: Proposals, S: int
) -> None:
  found = proposals.superpixels.shape
  if found != size:
    raise InputError(
      f"the proposals of {image_id!r} are for an image of {found} (height,"
      f" width), the data set has {size}; generate the proposals again"
    )
  count = len(proposals.member_bits)
  if count > S:
    raise InputError(
      f"image {image_id!r} has {count} superpixels, more than"
      f" max_superpixels={S}; set it to at least {count}, or generate the"
      " proposals with fewer superpixels"
    )


def _check_image(
  image_id: str, size: tuple[int, int], image: np.ndarray
) -> None:
  if image.shape[:2] != size:
    raise InputError(
      f"image {image_id!r} is {image.shape[:2]} (height, width), its index says"
      f" {size}; prepare the data set again"
    )


def _local_slice(
  batch_size: int, process_index: int, process_count: int
) -> slice:
  if not 0 <= process_index < process_count or batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} for process {process_index} of {process_count}:"
      " the number of processes must divide it"
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)


def _start_worker(index: int, count: int) -> None:
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # a whole group gets them
  start_worker()


def _options(num_threads: int, prefetch: int) -> grain.ReadOptions:
  return grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
  )
