"""Proposals that other programs made.

- A folder of `.mat` files of MCG or COB, one per image: `superpixels` [H, W]
  and `labels` [P] cells of superpixel ids, both counted from 1, and `scores`
  [P].
- A JSON file of masks in COCO's result format, a list of {"image_id",
  "segmentation": {"size": [H, W], "counts": RLE}, "score"}, from SAM for
  instance. Masks may overlap: superpixels are the sets of pixels that lie in
  the same masks.

An image without a file or entry of its id has those of the same number, which
may have fewer zeros before it, unless they are another image's.

In both cases the best score comes first, equal ones in the order of the file,
and of equal masks only the first is kept; masks that differ are kept although
their boxes may be the same. A mask without a pixel is an error.

Files may be corrected in place, so what makes a store holds their content, too:
of the images of the store alone, as those of further images may be added.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jtsm_jax.data import mat_files
from jtsm_jax.data.run_lengths import read_runs
from jtsm_jax.proposals import record_format
from jtsm_jax.proposals.fill_store import Maker
from jtsm_jax.proposals.generate import tight_boxes
from jtsm_jax.types import InputError, Proposals, Record, pack_members

MAX_PIXELS = 1 << 26  # of a mask; a file may claim anything
MAX_MAT_BYTES = 1 << 29  # of a variable; 64 megapixels in MATLAB's numbers


def importer(
  path: pathlib.Path,
  image_ids: Iterable[str],
  *,
  max_proposals: int,
  max_superpixels: int,
) -> Maker:
  """Takes proposals from a folder of `.mat` files or from a JSON file.

  Args:
    path: see the top of this file.
    image_ids: of the images that a store is for.
    max_proposals: at most so many per image, the best.
    max_superpixels: an image with more is at fault.

  Raises:
    InputError: there is nothing of the kind at `path`, or it is damaged.
  """
  limits = dict(max_proposals=max_proposals, max_superpixels=max_superpixels)
  image_ids = tuple(image_ids)
  if path.is_dir():
    names = [file.stem for file in path.glob("*.mat") if file.is_file()]
    files = {
      image_id: path / f"{name}.mat"
      for image_id, name in _names_of(image_ids, names).items()
    }
    content = functools.partial(_mat_content, files)
    read = functools.partial(_find_mat, path, files)
    make = functools.partial(read_mat, **limits)
  else:
    found = _read_masks(path)
    masks = {
      image_id: found[name]
      for image_id, name in _names_of(image_ids, found).items()
    }
    content = functools.partial(_masks_content, masks)
    read = functools.partial(_find_masks, path, masks)
    make = functools.partial(proposals_from_masks, **limits)

  def made_with(image_ids: Iterable[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for image_id in sorted(image_ids):
      digest.update(f"{image_id} {content(image_id)}\n".encode())
    source = {"imported": str(path.resolve()), "content": digest.hexdigest()}
    return source | limits

  def key(image_ids: Iterable[str]) -> str:
    text = json.dumps(made_with(image_ids), sort_keys=True)
    return f"imported-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

  return Maker(
    made_with=made_with(image_ids),
    key=key(image_ids),
    key_of=lambda image_id: key([image_id]),
    read=read,
    make=make,
  )


def read_mat(
  path: pathlib.Path,
  *,
  max_proposals: int = 4000,
  max_superpixels: int = record_format.MAX_SUPERPIXELS,
) -> Proposals:
  """Reads one `.mat` file of MCG or COB (MATLAB's format 5).

  Raises:
    InputError: the file cannot be read, or its content is not as described at
      the top of this file.
  """
  names = ["superpixels", "labels", "scores"]
  try:
    content = mat_files.read_mat(
      path.read_bytes(), names, max_bytes=MAX_MAT_BYTES
    )
  except (OSError, ValueError) as error:
    raise InputError(
      f"{path}: not a MATLAB 5 file, or damaged ({error}); export it again,"
      " with -v7"
    ) from error
  for name in names:
    if name not in content:
      raise InputError(f"{path}: holds no {name!r}, wanted {names}")
  superpixels = _whole_numbers(path, "superpixels", content["superpixels"])
  cells = content["labels"]
  if cells.dtype != object:
    raise InputError(
      f"{path}: labels are {cells.dtype} {cells.shape}, wanted cells of arrays"
    )
  labels = [_whole_numbers(path, "labels", x).ravel() for x in cells.ravel()]
  scores = np.asarray(content["scores"])
  if scores.dtype.kind not in "fiu" or scores.size != len(labels):
    raise InputError(
      f"{path}: scores are {scores.dtype} {scores.shape} for {len(labels)}"
      " labels, wanted a number for each"
    )
  if superpixels.ndim != 2 or not superpixels.size or superpixels.min() < 1:
    raise InputError(
      f"{path}: superpixels are {superpixels.shape} from"
      f" {superpixels.min(initial=0)} on, wanted [H, W] counted from 1"
    )
  # Ids without a pixel may be named, and some files have gaps.
  ids, compact = np.unique(superpixels, return_inverse=True)
  membership = np.zeros((len(labels), len(ids)), bool)
  for row, members in zip(membership, labels, strict=True):
    if not len(members) or members.min() < 1:
      raise InputError(
        f"{path}: labels of a proposal are {members[:5].tolist()}, wanted"
        " superpixel ids counted from 1"
      )
    row[:] = np.isin(ids, members)
  return _ordered(
    str(path),
    compact.reshape(superpixels.shape).astype(np.int32),
    membership,
    scores.ravel().astype(np.float64),
    max_proposals,
    max_superpixels,
  )


def proposals_from_masks(
  entries: Sequence[Mapping[str, Any]],
  *,
  max_proposals: int = 4000,
  max_superpixels: int = record_format.MAX_SUPERPIXELS,
) -> Proposals:
  """Turns the masks of one image, in COCO's result format, into proposals.

  Raises:
    InputError: an entry is not as described at the top of this file, or the
      masks cut the image into more than `max_superpixels`.
  """
  different = {}
  for entry in sorted(entries, key=_score, reverse=True):  # stable
    different.setdefault(str(entry.get("segmentation")), entry)
  entries = [*different.values()][:max_proposals]
  name = f"masks of image {entries[0].get('image_id')!r}"
  masks = [_decode(name, entry.get("segmentation")) for entry in entries]
  shapes = {mask.shape for mask in masks}
  if len(shapes) > 1:
    raise InputError(f"{name}: of sizes {sorted(shapes)}, wanted one size")
  # Pixels in the same masks have the same sum of the masks' random keys; that
  # any others have is as likely as 10^-9 for 10^5 of them.
  keys = np.random.default_rng(0).integers(0, 2**64, len(masks), np.uint64)
  total = np.zeros(masks[0].shape, np.uint64)
  for key, mask in zip(keys, masks, strict=True):
    total[mask] += key
  _, first, labels = np.unique(total, return_index=True, return_inverse=True)
  return _ordered(
    name,
    labels.reshape(total.shape).astype(np.int32),
    np.stack([mask.ravel()[first] for mask in masks]),
    np.array([_score(entry) for entry in entries]),
    max_proposals,
    max_superpixels,
  )


def _names_of(
  image_ids: Iterable[str], names: Collection[str]
) -> dict[str, str]:
  """By what name a file knows each image; without those that it lacks."""
  own = set(image_ids)
  found = {image_id: image_id for image_id in own.intersection(names)}
  of_number = collections.defaultdict(list)
  for name in set(names) - own:
    of_number[name.lstrip("0")].append(name)
  for image_id in own - found.keys():
    alike = of_number[image_id.lstrip("0")]
    if len(alike) == 1:
      found[image_id] = alike[0]
  return found


def _mat_content(files: Mapping[str, pathlib.Path], image_id: str) -> str:
  """What changes with a file; to read them all would take long."""
  if image_id not in files:
    return ""
  found = files[image_id].stat()
  return f"{files[image_id].name} {found.st_size} {found.st_mtime_ns}"


def _find_mat(folder, files, record: Record) -> pathlib.Path:
  try:
    return files[record.image_id]
  except KeyError:
    raise InputError(f"there is no {record.image_id}.mat in {folder}") from None


def _read_masks(path: pathlib.Path) -> dict[str, list]:
  """The entries of a JSON file by image id."""
  try:
    entries = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
      f"proposals.source {path}: neither a folder of .mat files nor a JSON file"
      f" of masks ({error})"
    ) from error
  if not isinstance(entries, list):
    raise InputError(
      f"{path}: holds a {type(entries).__name__}, wanted a list of masks in"
      " COCO's result format"
    )
  found: dict[str, list] = {}
  for n, entry in enumerate(entries):
    if not isinstance(entry, dict) or "image_id" not in entry:
      raise InputError(f"{path}: entry {n} names no image_id")
    found.setdefault(str(entry["image_id"]), []).append(entry)
  return found


def _masks_content(masks: dict[str, list], image_id: str) -> str:
  entries = masks.get(image_id, [])
  return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _find_masks(path, masks, record):
  try:
    return masks[record.image_id]
  except KeyError:
    raise InputError(
      f"there is no image_id {record.image_id!r} in {path}"
    ) from None


def _score(entry) -> float:
  score = entry.get("score", 0.0)
  if not isinstance(score, (int, float)) or not np.isfinite(score):
    raise InputError(
      f"masks of image {entry.get('image_id')!r}: a score is {score!r}, wanted"
      " a number"
    )
  return float(score)


def _decode(name: str, rle: Any) -> np.ndarray:
  """The mask of an RLE, [H, W] bool."""
  size = rle.get("size") if isinstance(rle, dict) else None
  counts = rle.get("counts") if isinstance(rle, dict) else None
  if (
    not isinstance(size, list)
    or len(size) != 2
    or not all(isinstance(n, int) and n > 0 for n in size)
    or size[0] * size[1] > MAX_PIXELS
  ):
    raise InputError(f"{name}: segmentation {str(rle)[:80]} is no RLE")
  pixels = size[0] * size[1]
  if isinstance(counts, str):
    try:
      counts = read_runs(counts.encode()).tolist()
    except ValueError as error:
      raise InputError(f"{name}: an RLE is damaged ({error})") from error
  if (
    not isinstance(counts, list)
    or not all(isinstance(n, int) and n >= 0 for n in counts)
    or sum(counts) != pixels
  ):
    raise InputError(
      f"{name}: the runs of an RLE do not fill its {size[0]} x {size[1]} pixels"
    )
  # Runs go down the columns, and begin outside.
  inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
  mask = inside.reshape(size[::-1]).T
  if not mask.any():
    raise InputError(f"{name}: a mask has no pixel; remove it")
  return mask


def _whole_numbers(path, name, values) -> np.ndarray:
  values = np.asarray(values)
  if values.dtype.kind in "iu":
    return values.astype(np.int64)
  if values.dtype.kind == "f" and np.all(np.mod(values, 1) == 0):
    return values.astype(np.int64)  # MATLAB's numbers are doubles
  raise InputError(f"{path}: {name} are {values.dtype}, wanted whole numbers")


def _ordered(
  name, superpixels, membership, scores, max_proposals, max_superpixels
) -> Proposals:
  """Best first, without equal masks."""
  count = membership.shape[1]
  limit = min(max_superpixels, record_format.MAX_SUPERPIXELS)
  if count > limit:
    raise InputError(
      f"{name}: {count} superpixels, more than the {limit} of"
      " proposals.num_superpixels; raise it, or take fewer masks"
    )
  if not len(membership):
    raise InputError(f"{name}: no proposals")
  if not membership.any(1).all():
    raise InputError(f"{name}: a proposal has no pixel")
  if not np.isfinite(scores).all():
    raise InputError(f"{name}: a score is not finite")
  order = np.argsort(-scores, kind="stable")
  _, first = np.unique(membership[order], axis=0, return_index=True)
  order = order[np.sort(first)][:max_proposals]
  return Proposals(
    superpixels=superpixels,
    member_bits=pack_members(membership[order]),
    boxes=tight_boxes(superpixels, membership[order]),
    scores=scores[order].astype(np.float32),
  )
