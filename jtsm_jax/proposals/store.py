"""Proposals on disk: written once, safely, and read at random.

A store is a folder:

    settings.json                   version and settings that made it
    proposals-00000.array_record    up to 64 images each
    quarantine.txt                  images of the last run that had no pixels

A shard is written under a temporary name and renamed when it is complete, so
every file with the final name is whole. Its last record lists its image ids.
An image is a record of its own:

    magic "JTSM", header length (uint32), header (JSON: image id, version, H,
    W, S, P), and one LZMA stream of superpixels (uint16 [H, W]), membership
    (bits, [S, ceil(P / 8)]: by superpixels it packs twice as well as by
    proposals), boxes (int32 [P, 4]), scores (float32 [P]), all little-endian
"""

from __future__ import annotations

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import itertools
import json
import lzma
import multiprocessing
import os
import pathlib
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from array_record.python import array_record_module

from jtsm_jax.console import progress
from jtsm_jax.proposals import generate
from jtsm_jax.types import InputError, Proposals, Record

MAGIC = b"JTSM"
SHARD_SIZE = 64  # images whose work a killed run loses at most
MAX_SUPERPIXELS = 65535
MEMORY_LIMIT = 1 << 26  # bytes that unpacking may take, beside the result
MAX_OPEN_SHARDS = 64  # well below the usual limit of 1024 open files
JOBS_AHEAD = 4  # images per worker that are read before they are needed
WORKER_ENVIRONMENT = dict(  # one thread for each process; GPUs stay free
  OMP_NUM_THREADS="1",
  OPENBLAS_NUM_THREADS="1",
  MKL_NUM_THREADS="1",
  JAX_PLATFORMS="cpu",
  XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
REMEDY = "delete the folder and propose again"


class Source(Protocol):
  """Random access to the images of a split."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class ProposeReport:
  """What `propose_all` did.

  Attributes:
    made: images proposed in this run.
    kept: images that the store already had.
    quarantined: ids of the images that could not be decoded.
    seconds: wall-clock time.
  """

  made: int
  kept: int
  quarantined: tuple[str, ...]
  seconds: float


# Writing.


def store_path(
  root: str | os.PathLike[str], settings: generate.ProposalSettings
) -> pathlib.Path:
  """The folder in `root` for the proposals of these settings and version."""
  return pathlib.Path(root) / generate.settings_key(settings)


def propose_all(
  source: Source,
  path: str | os.PathLike[str],
  *,
  settings: generate.ProposalSettings | None = None,
  num_workers: int | None = None,
  max_bad_fraction: float = 0.01,
  report: Callable[[str], None] = print,
) -> ProposeReport:
  """Proposes for every image of `source` that the store does not have yet.

  May be killed at any time and started again: finished shards are kept. An
  image that cannot be decoded gets a line in `quarantine.txt` and a message,
  and is tried again by the next run.

  Args:
    source: the images, with unique ids.
    path: folder of the store, see `store_path`; made if absent.
    settings: the preset "quality" when None.
    num_workers: processes, one thread each; 0 works in this process, None
      takes one per available core.
    max_bad_fraction: share of undecodable images that is tolerated; one is
      tolerated always.
    report: called with each message.

  Raises:
    InputError: too many images are undecodable, two images have one id, the
      store was made with other settings, or another process is writing it.
  """
  settings = settings or generate.preset_settings("quality")
  if num_workers is None:
    num_workers = _available_cores()
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  with _locked(path):
    _check_settings(path, settings)
    for stale in path.glob("*.tmp"):  # left by a run that was killed
      stale.unlink()
    shards = _shard_paths(path)
    known = set(_image_places(shards))
    ids = getattr(source, "image_ids", None)
    if ids is not None and known.issuperset(ids):  # no need to read the images
      seconds = time.monotonic() - start
      return ProposeReport(0, len(source), (), seconds)
    next_shard = 1 + max((int(p.stem[-5:]) for p in shards), default=-1)
    allowed = max(1, int(max_bad_fraction * len(source)))

    made, kept, pending, bad = 0, 0, [], []
    quarantine = path / "quarantine.txt"
    quarantine.unlink(missing_ok=True)
    bar = progress(description="propose", total=len(source), unit="image")

    def flush() -> None:
      nonlocal next_shard
      if pending:
        write_shard(path / _shard_name(next_shard), pending)
        next_shard += 1
        pending.clear()

    def jobs() -> Iterator[tuple[str, bytes]]:
      nonlocal kept
      seen = set()
      for index in range(len(source)):
        record = source[index]
        if record.image_id in seen:
          raise InputError(
            f"image id {record.image_id!r} occurs twice in the data set; ids"
            " must be unique. Prepare the data set again."
          )
        seen.add(record.image_id)
        if record.image_id in known:
          kept += 1
          bar.update()
        else:
          yield record.image_id, record.image

    results = _propose(jobs(), settings, num_workers)
    try:
      for image_id, encoded, fault in results:
        bar.update()
        if fault is None:
          made += 1
          pending.append((image_id, encoded))
          if len(pending) == SHARD_SIZE:
            flush()
          continue
        bad.append(image_id)
        with quarantine.open("a") as lines:
          lines.write(f"{image_id}\t{fault}\n")
        report(f"warning: no proposals for image {image_id!r}: {fault}")
        if len(bad) > allowed:
          raise InputError(
            f"{len(bad)} images of {len(source)} could not be decoded, more"
            f" than max_bad_fraction={max_bad_fraction} allows; see"
            f" {quarantine}. Repair or remove them, then propose again."
          )
    finally:  # an interrupted run keeps what it has finished
      bar.close()
      flush()
      results.close()
  return ProposeReport(
    made=made,
    kept=kept,
    quarantined=tuple(bad),
    seconds=time.monotonic() - start,
  )


def write_shard(path: pathlib.Path, images: list[tuple[str, bytes]]) -> None:
  """Writes encoded images and their ids as one file, whole or not at all.

  Args:
    path: the final name.
    images: (image id, `encode_proposals`) of each.
  """
  temporary = path.with_name(path.name + ".tmp")
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(temporary), "group_size:1"
  )
  for _, encoded in images:
    writer.write(encoded)
  writer.write(json.dumps([image_id for image_id, _ in images]).encode())
  writer.close()
  with temporary.open("rb") as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)


def encode_proposals(image_id: str, proposals: Proposals) -> bytes:
  """Packs the proposals of one image; `decode_proposals` is the inverse.

  Raises:
    ValueError: a superpixel id does not fit, or the arrays disagree.
  """
  fault = _find_fault(proposals)
  if fault:
    raise ValueError(f"proposals of image {image_id!r}: {fault}.")
  height, width = proposals.superpixels.shape
  num_proposals, num_superpixels = proposals.membership.shape
  header = json.dumps(
    dict(
      image_id=image_id,
      version=generate.VERSION,
      height=height,
      width=width,
      superpixels=num_superpixels,
      proposals=num_proposals,
    )
  ).encode()
  body = b"".join(
    [
      proposals.superpixels.astype("<u2").tobytes(),
      np.packbits(proposals.membership.T, axis=1).tobytes(),
      proposals.boxes.astype("<i4").tobytes(),
      proposals.scores.astype("<f4").tobytes(),
    ]
  )
  prefix = MAGIC + struct.pack("<I", len(header))
  return prefix + header + lzma.compress(body)


# Reading.


def decode_proposals(data: bytes) -> tuple[str, Proposals]:
  """The image id and proposals of one record, checked.

  Raises:
    ValueError: the record is damaged; says how.
  """
  if data[:4] != MAGIC or len(data) < 8:
    raise ValueError("it does not start like a record of proposals")
  end = 8 + struct.unpack("<I", data[4:8])[0]
  try:
    header = json.loads(data[8:end])
    image_id = str(header["image_id"])
    height, width, num_superpixels, num_proposals = (
      int(header[k]) for k in ("height", "width", "superpixels", "proposals")
    )
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"the header is damaged: {error}") from error
  if (
    min(height, width, num_superpixels) < 1
    or num_proposals < 0
    or num_superpixels > MAX_SUPERPIXELS
  ):
    raise ValueError(f"sizes are impossible: {header}")
  row = -(-num_proposals // 8)
  lengths = [2 * height * width, row * num_superpixels]
  lengths += [16 * num_proposals, 4 * num_proposals]
  decompressor = lzma.LZMADecompressor(memlimit=MEMORY_LIMIT)
  try:  # never more than the header promises
    body = decompressor.decompress(data[end:], sum(lengths) + 1)
  except lzma.LZMAError as error:
    raise ValueError(f"the data are damaged: {error}") from error
  if len(body) != sum(lengths) or not decompressor.eof:
    raise ValueError(f"the data do not hold {sum(lengths)} bytes")
  stops = [0, *itertools.accumulate(lengths)]
  labels, bits, boxes, scores = (
    np.frombuffer(body[a:b], dtype)
    for a, b, dtype in zip(
      stops, stops[1:], ("<u2", "u1", "<i4", "<f4"), strict=False
    )
  )
  member = np.unpackbits(
    bits.reshape(num_superpixels, row), axis=1, count=num_proposals
  ).T
  proposals = Proposals(
    superpixels=labels.reshape(height, width).astype(np.int32),
    membership=np.ascontiguousarray(member.astype(bool)),
    boxes=boxes.reshape(num_proposals, 4).astype(np.int32),
    scores=scores.astype(np.float32),
  )
  fault = _find_fault(proposals)
  if fault:
    raise ValueError(fault)
  return image_id, proposals


class ProposalStore:
  """Random access to the proposals of a store. May be shared by threads.

  Can be pickled (data loaders send it to their processes): a copy opens the
  files anew.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._places = _image_places(_shard_paths(self.path))
    self._readers: collections.OrderedDict = collections.OrderedDict()
    self._lock = threading.Lock()

  @property
  def ids(self) -> tuple[str, ...]:
    """Image ids in the order of the files."""
    return tuple(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def __contains__(self, image_id: str) -> bool:
    return image_id in self._places

  def get(self, image_id: str) -> Proposals:
    """The proposals of an image.

    Raises:
      InputError: the store has none, or its record is damaged.
    """
    if image_id not in self._places:
      raise InputError(
        f"proposal store {self.path}: no proposals for image {image_id!r}"
        " (quarantine.txt there lists undecodable images); propose again."
      )
    shard, index = self._places[image_id]
    try:
      found, proposals = decode_proposals(self._reader(shard).read([index])[0])
      if found != image_id:
        raise ValueError(f"the record belongs to image {found!r}")
    except (ValueError, IndexError, RuntimeError, OSError) as error:
      raise InputError(
        f"proposal store {shard}: the record of image {image_id!r} is damaged:"
        f" {error}; {REMEDY}."
      ) from error
    return proposals

  def close(self) -> None:
    """Closes the files; `get` opens them again."""
    with self._lock:
      self._readers.clear()

  def __enter__(self) -> ProposalStore:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __getstate__(self) -> dict:
    return {"path": self.path, "_places": self._places}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    self._readers = collections.OrderedDict()
    self._lock = threading.Lock()

  def _reader(self, shard: pathlib.Path):
    with self._lock:
      if shard not in self._readers:
        self._readers[shard] = _open_shard(shard)
        if len(self._readers) > MAX_OPEN_SHARDS:
          self._readers.popitem(last=False)
      self._readers.move_to_end(shard)
      return self._readers[shard]


def open_store(path: str | os.PathLike[str]) -> ProposalStore:
  """Opens a store for reading.

  Raises:
    InputError: there is no store, it is empty, a file is damaged, or another
      version of the program made it.
  """
  path = pathlib.Path(path)
  if not (path / "settings.json").is_file():
    raise InputError(
      f"proposal store {path}: no settings.json there; run the propose mode"
      " first, or correct the path."
    )
  made_with = _read_settings(path)
  if made_with.get("version") != generate.VERSION:
    raise InputError(
      f"proposal store {path}: made by version {made_with.get('version')!r},"
      f" this program is version {generate.VERSION!r}; {REMEDY}."
    )
  store = ProposalStore(path)
  if not len(store):
    raise InputError(f"proposal store {path}: it is empty; propose again.")
  return store


# Work of one image, and its distribution.


def _propose(
  jobs: Iterator[tuple[str, bytes]],
  settings: generate.ProposalSettings,
  num_workers: int,
) -> Iterator[tuple[str, bytes, str | None]]:
  """Yields (image id, encoded proposals, fault) in the order of `jobs`."""
  if num_workers == 0:
    for image_id, data in jobs:
      yield _propose_one(image_id, data, settings)
    return
  with single_threaded_children():  # spawn: forking after jax can deadlock
    pool = concurrent.futures.ProcessPoolExecutor(
      num_workers,
      mp_context=multiprocessing.get_context("spawn"),
      initializer=start_worker,
    )
    waiting: collections.deque = collections.deque()
    try:
      for image_id, data in jobs:
        waiting.append(pool.submit(_propose_one, image_id, data, settings))
        if len(waiting) >= JOBS_AHEAD * num_workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise InputError(
        "a proposal worker was killed, most likely for want of memory; set"
        f" num_workers below {num_workers} and propose again."
      ) from error
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def _propose_one(
  image_id: str, data: bytes, settings: generate.ProposalSettings
) -> tuple[str, bytes, str | None]:
  # Imported late: only this function of the module needs image decoders.
  from jtsm_jax.data import transforms

  try:
    image = transforms.decode_image(data)
  except InputError as error:
    return image_id, b"", " ".join(str(error).split())
  try:
    proposals = generate.propose(image, settings)
    return image_id, encode_proposals(image_id, proposals), None
  except Exception as error:
    error.add_note(f"while proposing for image {image_id!r}")
    raise


def start_worker() -> None:
  """To be run first in a process that shares the cores with others."""
  import cv2

  cv2.setNumThreads(1)


@contextlib.contextmanager
def single_threaded_children() -> Iterator[None]:
  """Children started inside use one thread each, and the CPU alone."""
  before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
  os.environ.update(WORKER_ENVIRONMENT)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value


def _available_cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


# Files.


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Excludes a second writer; the system frees the lock of a killed one."""
  with (path / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"proposal store {path}: another process is writing it; wait for its"
        " end or stop it."
      ) from error
    yield


def _check_settings(
  path: pathlib.Path, settings: generate.ProposalSettings
) -> None:
  """Writes settings.json, or compares it with the one that is there."""
  wanted = {
    "version": generate.VERSION,
    "settings": dataclasses.asdict(settings),
  }
  file = path / "settings.json"
  if file.exists():
    found = _read_settings(path)
    if found != wanted:
      raise InputError(
        f"proposal store {path}: made with {found}, wanted {wanted}; {REMEDY},"
        " or choose another folder."
      )
    return
  temporary = file.with_name(file.name + ".tmp")
  temporary.write_text(json.dumps(wanted, indent=2) + "\n")
  os.replace(temporary, file)


def _read_settings(path: pathlib.Path) -> dict:
  try:
    return dict(json.loads((path / "settings.json").read_text()))
  except (TypeError, ValueError) as error:
    raise InputError(
      f"proposal store {path}: settings.json is damaged: {error}; {REMEDY}."
    ) from error


def _shard_name(number: int) -> str:
  return f"proposals-{number:05d}.array_record"


def _shard_paths(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.glob("proposals-[0-9]*[0-9].array_record"))


def _image_places(
  shards: Sequence[pathlib.Path],
) -> dict[str, tuple[pathlib.Path, int]]:
  """Shard and position of every image."""
  places = {}
  for shard in shards:
    reader = _open_shard(shard)
    try:
      if not reader.num_records():
        raise ValueError("it holds no record; it is cut off or of another kind")
      ids = json.loads(reader.read([reader.num_records() - 1])[0])
      if len(ids) != reader.num_records() - 1:
        raise ValueError("its index does not fit its records")
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
      raise InputError(
        f"proposal store {shard}: the file is damaged: {error}; {REMEDY}."
      ) from error
    places |= {image_id: (shard, n) for n, image_id in enumerate(ids)}
  return places


def _open_shard(shard: pathlib.Path):
  try:
    return array_record_module.ArrayRecordReader(
      os.fspath(shard), "readahead_buffer_size:0,max_parallelism:0"
    )
  except (RuntimeError, ValueError, OSError) as error:
    raise InputError(
      f"proposal store {shard}: the file cannot be read: {error}; {REMEDY}."
    ) from error


def _find_fault(proposals: Proposals) -> str | None:
  """What is wrong with `proposals`, or None."""
  labels, member = proposals.superpixels, proposals.membership
  if labels.ndim != 2 or labels.size == 0 or member.ndim != 2:
    return f"superpixels are {labels.shape}, membership is {member.shape}"
  height, width = labels.shape
  count, num_superpixels = member.shape
  if num_superpixels > MAX_SUPERPIXELS:
    return f"{num_superpixels} superpixels, at most {MAX_SUPERPIXELS} fit"
  if labels.min() < 0 or labels.max() >= num_superpixels:
    return (
      f"superpixel ids are {labels.min()} .. {labels.max()}, wanted"
      f" 0 .. {num_superpixels - 1}"
    )
  boxes, scores = proposals.boxes, proposals.scores
  if boxes.shape != (count, 4) or scores.shape != (count,):
    return (
      f"boxes are {boxes.shape} and scores {scores.shape} for {count} proposals"
    )
  low, high = boxes[:, :2], boxes[:, 2:]
  if (low < 0).any() or (high <= low).any() or (high > (height, width)).any():
    return f"a box is empty or leaves the image of {height} x {width}"
  if not np.isfinite(scores).all():
    return "a score is not finite"
  return None
