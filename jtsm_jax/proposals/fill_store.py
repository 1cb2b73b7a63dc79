"""Fills a proposal store: work for many processes, on one machine or several.

May be killed at any time and started again: what is in complete files is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from jtsm_jax import workers
from jtsm_jax.console import progress
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  data_path,
  fetch_all,
  is_file,
  is_local,
  names_in,
  remove,
  write_file,
)
from jtsm_jax.locks import exclusive
from jtsm_jax.proposals import generate, record_format, store
from jtsm_jax.types import InputError, Proposals, Record

SHARD_SIZE = 64  # images whose work a killed run loses at most


class Source(Protocol):
  """Random access to the images of a split."""

  image_ids: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Maker:
  """Where proposals come from.

  Attributes:
    made_with: plain values that say so; a store is of one of them.
    key: a short name for them, fit for a folder.
    key_of: the same of the proposals of one image alone, by its id.
    read: what `make` needs of an image, read in the main process.
    make: proposals from that, in a worker; pickles. Both may raise InputError:
      then the image is quarantined.
  """

  made_with: dict[str, Any]
  key: str
  key_of: Callable[[str], str]
  read: Callable[[Record], Any]
  make: Callable[[Any], Proposals]


@dataclasses.dataclass(frozen=True)
class FillReport:
  """What `fill_store` did.

  Attributes:
    made: images that got proposals in this run.
    kept: images that the store already had.
    quarantined: ids of the images that got none.
    seconds: wall-clock time.
  """

  made: int
  kept: int
  quarantined: tuple[str, ...]
  seconds: float


def generator(settings: generate.ProposalSettings) -> Maker:
  """Makes proposals by `generate.propose`."""
  key = generate.settings_key(settings)
  return Maker(
    made_with={
      "version": generate.VERSION,
      "settings": dataclasses.asdict(settings),
    },
    key=key,
    key_of=lambda image_id: key,
    read=_image_bytes,
    make=functools.partial(_decode_and_propose, settings=settings),
  )


def fill_store(
  source: Source,
  path: PathOrUrl,
  maker: Maker,
  *,
  shard: int = 0,
  num_shards: int = 1,
  num_workers: int | None = None,
  max_bad_fraction: float = 0.01,
  report: Callable[[str], None] = print,
) -> FillReport:
  """Makes proposals for the images of `source` that the store does not have.

  An image without any gets a line in the quarantine file and a message, and is
  tried again by the next run.

  Args:
    source: the images, with unique ids.
    path: folder of the store, or its URL; made if absent.
    maker: where the proposals come from.
    shard, num_shards: this run does the shard-th of num_shards parts of about
      the same size, which are neighbours and so lie in few files; several may
      fill one store at once, on machines that share it.
    num_workers: processes, one thread each; 0 works in this process, None
      takes one per available core.
    max_bad_fraction: share of quarantined images that is tolerated; one is
      tolerated always.
    report: called with each message.

  Raises:
    InputError: too many images are quarantined, two have one id, `shard` is
      not below `num_shards`, the store was made with something else, or
      another run is doing this shard.
  """
  if not 0 <= shard < num_shards <= 10_000:
    raise InputError(
      f"shard is {shard} and num_shards {num_shards}; wanted 0 <= shard <"
      " num_shards <= 10000."
    )
  if len(set(source.image_ids)) < len(source):
    seen: set[str] = set()
    twice = next(i for i in source.image_ids if i in seen or seen.add(i))
    raise InputError(
      f"image id {twice!r} occurs twice in the data set; ids must be unique."
      " Prepare the data set again."
    )
  if num_workers is None:
    num_workers = workers.available_cores()
  path = data_path(path)
  start = time.monotonic()
  store.claim_store(path, maker.made_with)
  bounds = [len(source) * n // num_shards for n in (shard, shard + 1)]
  mine = range(*bounds)
  own = f"proposals-{shard:04d}-"
  quarantine = path / f"quarantine-{shard:04d}.txt"

  def missing_images() -> tuple[list[AnyPath], list[int]]:
    files = store.shard_paths(path)
    known = _known(files, own if num_shards > 1 else "")
    return files, [n for n in mine if source.image_ids[n] not in known]

  # Runs that find all they need do not wait for one another.
  if not missing_images()[1] and not is_file(quarantine):
    return FillReport(0, len(mine), (), time.monotonic() - start)
  with _locked(path, shard):
    for name in names_in(path):
      if name.startswith(own) and ".partial-" in name:
        remove(path / name)  # left by a run that was killed
    files, missing = missing_images()
    kept = len(mine) - len(missing)
    remove(quarantine)
    if not missing:
      return FillReport(0, kept, (), time.monotonic() - start)
    next_file = _next_number(path, [f for f in files if f.name.startswith(own)])
    allowed = max(1, int(max_bad_fraction * len(mine)))

    made, pending, bad, faults = 0, [], [], ""

    def flush() -> None:
      nonlocal next_file
      if pending:
        name = f"{own}{next_file:05d}.array_record"
        store.write_shard(path / name, pending)
        next_file += 1
        pending.clear()

    fewer = f"--config.proposals.num_workers={num_workers // 2}"
    smaller = "a smaller --config.proposals.max_side"
    remedy = f"give {fewer if num_workers > 1 else smaller}"
    jobs = ((maker.make, *_read(maker.read, source[n])) for n in missing)
    results = workers.map_in_processes(_make, jobs, num_workers, remedy=remedy)
    bar = progress(description="propose", total=len(mine), unit="image")
    bar.update(kept)
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
        faults += f"{image_id}\t{fault}\n"
        write_file(quarantine, faults)
        report(f"warning: no proposals for image {image_id!r}: {fault}")
        if len(bad) > allowed:
          raise InputError(
            f"{len(bad)} images of {len(mine)} got no proposals, more than"
            f" max_bad_fraction={max_bad_fraction} allows; see {quarantine}."
            " Repair or remove them, then propose again."
          )
    finally:  # an interrupted run keeps what it has finished
      bar.close()
      flush()
      results.close()
  return FillReport(
    made=made,
    kept=kept,
    quarantined=tuple(bad),
    seconds=time.monotonic() - start,
  )


def _known(files: list[AnyPath], own: str) -> Collection[str]:
  """The ids of the images that a store has.

  Of one in a bucket a shard looks into the files alone whose names begin with
  `own`, since it would have to copy all the others.
  """
  mine = [f for f in files if is_local(f) or f.name.startswith(own)]
  return store.image_places(fetch_all(mine))


def _next_number(path: AnyPath, files: list[AnyPath]) -> int:
  """The number of the first new file after those of this shard."""
  if is_local(path):
    return max((int(f.stem[-5:]) for f in files), default=-1) + 1
  # A bucket has no locks: two runs of one shard must not use the same names.
  return secrets.randbelow(10**15)


def _read(read, record):
  """The id and size of an image, what `make` needs, and what went wrong."""
  size = record.height, record.width
  try:
    return record.image_id, size, read(record), None
  except InputError as error:
    return record.image_id, size, None, " ".join(str(error).split())


def _make(make, image_id, size, needed, fault):
  """The id, the encoded proposals, and what went wrong."""
  if fault is not None:
    return image_id, b"", fault
  try:
    proposals = make(needed)
    found = proposals.superpixels.shape
    if found != size:
      raise InputError(
        f"its proposals are of an image of {found[0]} x {found[1]} pixels, it"
        f" has {size[0]} x {size[1]}"
      )
    return image_id, record_format.encode_proposals(image_id, proposals), None
  except InputError as error:
    return image_id, b"", " ".join(str(error).split())
  except Exception as error:
    error.add_note(f"while proposing for image {image_id!r}")
    raise


def _image_bytes(record: Record) -> bytes:
  return record.image


def _decode_and_propose(data: bytes, *, settings) -> Proposals:
  # Imported late: the rest of this module needs no image decoders.
  from jtsm_jax.data import transforms

  return generate.propose(transforms.decode_image(data), settings)


@contextlib.contextmanager
def _locked(path: AnyPath, shard: int) -> Iterator[None]:
  """Excludes a second run; the system frees the lock of a killed one."""
  if not is_local(path):
    yield
    return
  busy = (
    f"proposal store {path}: another run is doing shard {shard}; wait for its "
    "end or stop it."
  )
  with exclusive(path / f"lock-{shard:04d}", busy=busy):
    yield
