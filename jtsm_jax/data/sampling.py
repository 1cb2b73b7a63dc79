"""Which images, on which canvas, in which step: a pure function of the seed.

All processes must run the same program in the same step, so the canvas of a
step is decided here, for all of them, before any image is read.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

# The streams of random numbers that one seed feeds.
_EPOCH, _STEP = 0, 1


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """What one batch is made of.

  Attributes:
    canvas: (H, W), pixels.
    indices: [B] int32, positions in the split; -1 marks a padding example.
    flips: [B] bool, mirror left and right.
    windows: [B, 4] int32 (y0, x0, y1, x1), the part of each image that is
      shown, half-open, pixels of the image.
    colours: [B, 2] float32, factors of the saturation and of the value, or
      None.
  """

  canvas: tuple[int, int]
  indices: np.ndarray
  flips: np.ndarray
  windows: np.ndarray
  colours: np.ndarray | None = None

  def part(self, examples: slice) -> BatchPlan:
    """The plan of some of the examples."""
    return BatchPlan(
      self.canvas,
      self.indices[examples],
      self.flips[examples],
      self.windows[examples],
      None if self.colours is None else self.colours[examples],
    )


def batch_plan(
  step: int,
  *,
  seed: int,
  sizes: np.ndarray,
  canvases: tuple[tuple[int, int], ...],
  batch_size: int,
  flip: bool = True,
  crop: float = 1.0,
  colour_factor: float = 1.0,
) -> BatchPlan:
  """Plans the batch of a step, as a pure function of (seed, step).

  An epoch shuffles the landscape images (square ones among them) and the
  portrait images, cuts each group into batches, fills the last batch of a group
  from the group's start, and shuffles the batches: every image is seen at least
  once, and no batch mixes orientations. The canvas is drawn from those of the
  batch's orientation; a square canvas fits both, and where none fits, all do.

  Args:
    step: >= 0, counts batches over all epochs.
    seed: of the whole run.
    sizes: [N, 2] height and width of the images, pixels.
    canvases: the (H, W) that a batch may have.
    batch_size: images in a batch, over all processes.
    flip: mirror each image with probability 1/2.
    crop: show a part of each image, at a random place, whose height and width
      are each a random share, uniform in [crop, 1], of the image's; 1 for the
      whole image.
    colour_factor: saturation and value (exposure) of each image are each
      multiplied by a number that is log-uniform in [1 / factor, factor], so
      that darker is as likely as brighter (section 4.1); 1 changes nothing.

  Returns:
    The plan, for all processes.

  Raises:
    ValueError: no images, no canvases, a batch size below 1, a crop outside
      (0, 1], or a colour factor below 1.
  """
  portrait = _portrait(sizes)
  _check(portrait, canvases, batch_size)
  if not 0 < crop <= 1:
    raise ValueError(f"crop is {crop}, must be in (0, 1]; 1 does not crop")
  if colour_factor < 1:
    raise ValueError(
      f"colour_factor is {colour_factor}, must be >= 1 (1 changes nothing)"
    )
  num_batches = num_batches_per_epoch(sizes, batch_size=batch_size)
  epoch, position = divmod(step, num_batches)
  indices = _epoch(seed, epoch, portrait.tobytes(), batch_size)[position]
  fitting = fitting_canvases(canvases, portrait=bool(portrait[indices[0]]))
  rng = np.random.default_rng((seed, _STEP, step))
  canvas = fitting[rng.integers(len(fitting))]
  flips = rng.random(batch_size) < 0.5
  windows = _windows(rng, np.asarray(sizes)[indices], crop)
  logs = rng.uniform(-1, 1, (batch_size, 2)) * np.log(colour_factor)
  return BatchPlan(
    canvas,
    indices,
    flips if flip else np.zeros_like(flips),
    windows,
    np.exp(logs).astype(np.float32) if colour_factor != 1 else None,
  )


def _windows(rng: np.random.Generator, sizes: np.ndarray, crop: float):
  """Random parts [B, 4] of images of the sizes [B, 2]."""
  parts = np.round(sizes * rng.uniform(crop, 1, sizes.shape))
  parts = np.clip(parts.astype(np.int32), 1, sizes)
  first = rng.integers(0, sizes - parts, endpoint=True).astype(np.int32)
  return np.concatenate([first, first + parts], axis=1)


def num_batches_per_epoch(sizes: np.ndarray, *, batch_size: int) -> int:
  """Batches in an epoch: each orientation is rounded up by itself.

  Args:
    sizes: [N, 2] height and width of the images, pixels.
    batch_size: images in a batch, over all processes.
  """
  portrait = _portrait(sizes)
  groups = np.bincount(portrait.astype(np.int64), minlength=2)
  return int(sum(-(-n // batch_size) for n in groups))


def fitting_canvases(
  canvases: tuple[tuple[int, int], ...], *, portrait: bool
) -> tuple[tuple[int, int], ...]:
  """The canvases of an orientation, or all of them if none has it."""
  sign = 1 if portrait else -1
  fitting = tuple(c for c in canvases if sign * (c[0] - c[1]) >= 0)
  return fitting or tuple(canvases)


def inference_plans(
  *,
  sizes: np.ndarray,
  canvases: tuple[tuple[int, int], ...],
  batch_size: int,
  flips: tuple[bool, ...] = (False,),
) -> list[BatchPlan]:
  """Plans batches that show every image once in each of its views.

  The views of an image are the canvases of its orientation, each plain or
  mirrored. The views of the same images follow one another. The last images of
  an orientation are filled up with -1.

  Args:
    sizes: [N, 2] height and width of the images, pixels.
    canvases: the (H, W) to view images on.
    batch_size: images in a batch, over all processes.
    flips: (False,) for plain views, (False, True) for mirrored ones, too.

  Returns:
    The plans; images of the same orientation are in ascending order.

  Raises:
    ValueError: no canvases, or a batch size below 1.
  """
  portrait = _portrait(sizes)
  _check(None, canvases, batch_size)
  plans = []
  for upright in dict.fromkeys(portrait.tolist()):
    members = np.flatnonzero(portrait == upright)
    for start in range(0, len(members), batch_size):
      indices = np.full(batch_size, -1, np.int32)
      chunk = members[start : start + batch_size]
      indices[: len(chunk)] = chunk
      windows = whole_windows(sizes, indices)
      plans += [
        BatchPlan(canvas, indices, np.full(batch_size, flip), windows)
        for canvas in fitting_canvases(canvases, portrait=upright)
        for flip in flips
      ]
  return plans


def whole_windows(sizes: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """The windows of a plan that shows whole images: [B, 4] int32."""
  shown = np.asarray(sizes, np.int32)[indices]
  return np.concatenate([np.zeros_like(shown), shown], axis=1)


def _portrait(sizes: np.ndarray) -> np.ndarray:
  sizes = np.asarray(sizes).reshape(-1, 2)
  return sizes[:, 0] > sizes[:, 1]


def _check(portrait, canvases, batch_size) -> None:
  if portrait is not None and not len(portrait):
    raise ValueError("sizes is empty: there are no images to make batches of")
  if not canvases:
    raise ValueError("canvases is empty; give at least one (height, width)")
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}, must be at least 1")


@functools.lru_cache(maxsize=4)
def _epoch(
  seed: int, epoch: int, portrait: bytes, batch_size: int
) -> np.ndarray:
  """The [batches, B] int32 image indices of an epoch."""
  is_portrait = np.frombuffer(portrait, bool)
  rng = np.random.default_rng((seed, _EPOCH, epoch))
  batches = []
  for group in (np.flatnonzero(~is_portrait), np.flatnonzero(is_portrait)):
    num_batches = -(-len(group) // batch_size)
    order = rng.permutation(group)
    filled = np.resize(order, num_batches * batch_size)  # Repeats from 0.
    batches.append(filled.reshape(num_batches, batch_size))
  shuffled = rng.permutation(np.concatenate(batches)).astype(np.int32)
  shuffled.flags.writeable = False  # It is shared by all callers.
  return shuffled
