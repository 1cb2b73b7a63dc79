"""Re-estimation of mined segments with GrabCut (paper, section 3.4); host only.

GrabCut takes some 0.1 to 1 s per segment, but its result depends on the image
and the segment alone. So it runs on host threads beside the device, and a
segment that is mined again costs a look-up.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

Init = Literal["segment", "rectangle", "none"]

MIN_BOX_AREA = 9
"""Boxes of fewer working pixels keep their segment, as in the authors' code."""

_SEED = 0  # of the k-means that starts GrabCut's colour models


def reestimate_mask(
  image: np.ndarray,
  segment: np.ndarray,
  *,
  init: Init = "segment",
  iterations: int = 5,
  longest_side: int = 400,
) -> np.ndarray:
  """Re-estimates the mask of a mined segment by its colours (GrabCut).

  The segment is firm foreground, what is outside its bounding box is firm
  background, and the rest of the box is decided by the graph cut. The result
  is a pure function of the arguments, in any thread.

  Args:
    image: [H, W, 3] uint8 RGB.
    segment: [H, W] bool.
    init: "segment" as above (the paper); "rectangle": the whole box is probable
      foreground (the authors' code); "none": returns the segment.
    iterations: rounds of GrabCut.
    longest_side: pixels at which it works; the image is resized to it.

  Returns:
    [H, W] bool, inside the segment's box. With "segment" it contains the
    segment. It is the segment itself where nothing is left to decide, where no
    pixel is background, and where GrabCut finds no foreground.

  Raises:
    ValueError: an argument has the wrong shape, dtype or range.
  """
  _check(image, segment, init, iterations, longest_side)
  if init == "none" or not segment.any():
    return segment.copy()
  y0, x0, y1, x1 = _bounding_box(segment)
  if segment[y0:y1, x0:x1].all() and init == "segment":
    return segment.copy()

  height, width = segment.shape
  scale = longest_side / max(height, width)
  shape = max(round(height * scale), 1), max(round(width * scale), 1)
  shrinks = scale < 1
  small_image = _resize(image, shape, area=shrinks)
  small_segment = _resize(_grey(segment), shape, area=shrinks) >= 128
  # Rounded outwards, so that the box holds every pixel of the small segment.
  sy, sx = shape[0] / height, shape[1] / width
  box = (
    slice(int(y0 * sy), min(int(np.ceil(y1 * sy)), shape[0])),
    slice(int(x0 * sx), min(int(np.ceil(x1 * sx)), shape[1])),
  )

  labels = np.full(shape, cv2.GC_BGD, np.uint8)
  if init == "segment":
    # Probable background beats probable foreground by 0.02 IoU on photographs,
    # and leaves background samples where the box is the whole image.
    labels[box] = cv2.GC_PR_BGD
    labels[small_segment] = cv2.GC_FGD
  else:
    labels[box] = cv2.GC_PR_FGD
    if labels.all():  # no background: the authors give it a border of 3 pixels
      labels[:3] = labels[-3:] = labels[:, :3] = labels[:, -3:] = cv2.GC_BGD
  before = is_foreground(labels)
  if labels[box].size < MIN_BOX_AREA or before.all() or not before.any():
    return segment.copy()

  found = grab_cut(small_image, labels, iterations=iterations)
  full = _resize(_grey(found), (height, width), area=not shrinks) >= 128
  mask = np.zeros_like(segment)
  mask[y0:y1, x0:x1] = full[y0:y1, x0:x1]
  if init == "segment":
    mask |= segment
  return mask if mask.any() else segment.copy()


def grab_cut(
  image: np.ndarray, labels: np.ndarray, *, iterations: int
) -> np.ndarray:
  """GrabCut from given labels; a pure function of them, in any thread.

  Args:
    image: [H, W, 3] uint8 RGB.
    labels: [H, W] uint8 of cv2's GC_BGD, GC_FGD, GC_PR_BGD and GC_PR_FGD, some
      of them foreground and some background.
    iterations: rounds.

  Returns:
    [H, W] bool, the foreground.
  """
  labels = labels.copy()
  cv2.setRNGSeed(_SEED)  # the generator is the thread's own
  cv2.grabCut(
    image[..., ::-1].copy(),
    labels,
    None,
    np.zeros((1, 65)),
    np.zeros((1, 65)),
    iterations,
    cv2.GC_INIT_WITH_MASK,
  )
  return is_foreground(labels)


def is_foreground(labels: np.ndarray) -> np.ndarray:
  """Firm or probable foreground among GrabCut's labels."""
  return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


class MaskReestimator:
  """Runs `reestimate_mask` on host threads and remembers the results.

  Example:
    with MaskReestimator(workers=4) as reestimator:
      future = reestimator.submit("cow_1", 17, lambda: (image, segment))
      mask = future.result()

  Attributes:
    hits: submissions answered without GrabCut: from memory, from disk, or by a
      computation that was already on its way.
    misses: GrabCut computations that were started.
  """

  def __init__(
    self,
    *,
    init: Init = "segment",
    iterations: int = 5,
    longest_side: int = 400,
    workers: int = 2,
    memory_bytes: int = 2**28,
    cache_dir: str | os.PathLike | None = None,
  ):
    """Starts the threads.

    Args:
      init: see `reestimate_mask`, like the next two.
      iterations: rounds of GrabCut.
      longest_side: working size, pixels.
      workers: threads.
      memory_bytes: bound of the masks kept in memory (1 bit per pixel); the
        least recently used ones go first.
      cache_dir: also keep every mask as a small PNG below this folder. Masks
        are filed under (settings, image id, proposal), so the folder must
        belong to one proposal store. It is safe to delete, and where it cannot
        be written, masks are made without it.
    """
    self.hits = 0
    self.misses = 0
    self._settings = {
      "init": init,
      "iterations": iterations,
      "longest_side": longest_side,
    }
    self._folder = cache_dir and (
      Path(cache_dir) / f"{init}-{iterations}-{longest_side}"
    )
    self._warned = threading.Event()  # that the folder cannot be written
    self._memory_bytes = memory_bytes
    self._used_bytes = 0
    self._masks = collections.OrderedDict()  # key -> (packed bits, shape)
    self._pending = {}  # key -> Future
    self._lock = threading.RLock()
    self._executor = concurrent.futures.ThreadPoolExecutor(
      workers, thread_name_prefix="reestimate"
    )

  @property
  def hit_rate(self) -> float:
    """Share of the submissions that were answered without GrabCut."""
    return self.hits / max(self.hits + self.misses, 1)

  @property
  def queue_depth(self) -> int:
    """Masks that are not ready yet."""
    with self._lock:
      return len(self._pending)

  def submit(
    self,
    image_id: str,
    proposal: int,
    load: Callable[[], tuple[np.ndarray, np.ndarray]],
  ) -> concurrent.futures.Future[np.ndarray]:
    """Asks for the mask of a proposal; returns at once.

    Args:
      image_id: unique, and safe as a folder's name.
      proposal: its index in the image's proposal store.
      load: returns the image, [H, W, 3] uint8 RGB, and the segment, [H, W]
        bool; called on a thread, and only where the mask is not known.

    Returns:
      A future of the mask, [H, W] bool, read-only. It raises what `load` or
      `reestimate_mask` raised; a failure is not remembered.
    """
    key = image_id, int(proposal)
    with self._lock:
      if key in self._masks:
        self.hits += 1
        self._masks.move_to_end(key)
        future = concurrent.futures.Future()
        future.set_result(_unpack(*self._masks[key]))
        return future
      if key in self._pending and not self._pending[key].done():
        self.hits += 1
        return self._pending[key]
      future = self._executor.submit(self._work, key, load)
      self._pending[key] = future
    future.add_done_callback(lambda done: self._forget(key, done))
    return future

  def close(self) -> None:
    """Cancels what waits, finishes what runs, and stops the threads."""
    self._executor.shutdown(wait=True, cancel_futures=True)

  def __enter__(self) -> MaskReestimator:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _work(self, key: tuple[str, int], load: Callable) -> np.ndarray:
    path = self._folder and self._folder / key[0] / f"{key[1]}.png"
    mask = _read_mask(path) if path else None
    if mask is None:
      with self._lock:
        self.misses += 1
      mask = reestimate_mask(*load(), **self._settings)
      if path:
        self._write(path, mask)
    else:
      with self._lock:
        self.hits += 1
    self._remember(key, mask)
    mask.setflags(write=False)  # it may be handed to several callers
    return mask

  def _write(self, path: Path, mask: np.ndarray) -> None:
    try:
      _write_mask(path, mask)
    except OSError as error:
      with self._lock:
        if self._warned.is_set():
          return
        self._warned.set()
      logging.warning(
        "masks cannot be kept in %s (%s): they are made again where a run needs"
        " them again",
        self._folder,
        error.strerror,
      )

  def _remember(self, key: tuple[str, int], mask: np.ndarray) -> None:
    bits = np.packbits(mask)
    with self._lock:
      self._masks[key] = bits, mask.shape
      self._used_bytes += bits.nbytes
      while self._used_bytes > self._memory_bytes:
        _, (oldest, _) = self._masks.popitem(last=False)
        self._used_bytes -= oldest.nbytes

  def _forget(
    self, key: tuple[str, int], future: concurrent.futures.Future
  ) -> None:
    with self._lock:
      if self._pending.get(key) is future:
        del self._pending[key]


def _unpack(bits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  mask = np.unpackbits(bits, count=shape[0] * shape[1]).astype(bool)
  mask = mask.reshape(shape)
  mask.setflags(write=False)
  return mask


def _read_mask(path: Path) -> np.ndarray | None:
  """Reads a cached mask; None where there is none, or none that is whole."""
  try:
    data = np.frombuffer(path.read_bytes(), np.uint8)
  except OSError:  # mostly because there is none
    return None
  image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
  if image is None:
    logging.warning("the cached mask %s is damaged; computing it again", path)
    return None
  return image >= 128


def _write_mask(path: Path, mask: np.ndarray) -> None:
  """Writes beside the target and renames: no reader sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  _, data = cv2.imencode(".png", _grey(mask), [cv2.IMWRITE_PNG_BILEVEL, 1])
  handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data.tobytes())
    Path(name).replace(path)
  except BaseException:
    Path(name).unlink(missing_ok=True)
    raise


def _check(image, segment, init, iterations, longest_side) -> None:
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(
      f"image is {image.dtype} {image.shape}; it must be uint8 [H, W, 3]"
    )
  if segment.shape != image.shape[:2] or segment.dtype != bool:
    raise ValueError(
      f"segment is {segment.dtype} {segment.shape}; it must be bool "
      f"{image.shape[:2]}, as the image"
    )
  if init not in ("segment", "rectangle", "none"):
    raise ValueError(
      f"init is {init!r}; it must be 'segment', 'rectangle' or 'none'"
    )
  if iterations < 1 or longest_side < 1:
    raise ValueError(
      f"iterations is {iterations} and longest_side is {longest_side}; both "
      "must be at least 1"
    )


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def _grey(mask: np.ndarray) -> np.ndarray:
  """bool -> uint8 0 or 255, which OpenCV can resize and encode."""
  return mask.astype(np.uint8) * 255


def _resize(
  image: np.ndarray, shape: tuple[int, int], *, area: bool
) -> np.ndarray:
  mode = cv2.INTER_AREA if area else cv2.INTER_LINEAR
  return cv2.resize(image, shape[::-1], interpolation=mode)
