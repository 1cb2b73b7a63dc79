"""Images without any labels, for prediction."""

from __future__ import annotations

import collections
import glob
import hashlib
import os
import sys
from collections.abc import Sequence

import numpy as np

from jtsm_jax.console import progress
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  check_names,
  data_path,
  file_lookup,
  is_file,
  is_folder,
  is_local,
  names_in,
  read_bytes,
  read_file,
  safe_name,
)
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.types import InputError, Record

SUFFIXES = (
  *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif"),
  *(".tiff", ".avif", ".jp2", ".tga", ".pbm", ".pgm", ".ppm"),
)
"""Endings of the images that `decode_image` reads, in any case."""


def find_images(where: PathOrUrl) -> tuple[AnyPath, dict[str, AnyPath]]:
  """The image files of a folder, of a pattern, or one of them.

  Says on stderr how many files it passes over, of which endings, and how many
  folders.

  Args:
    where: a folder, whose own images count, without those of its subfolders; a
      pattern with `*`, `?` or `[...]`, where `**` stands for any folders, and
      leading folders that exist for themselves; or a file. A local path or a
      URL.

  Returns:
    (Their folder: what is given, that of the file, or that before the first
    wildcard of the pattern;
    the files by their names, which tell them apart and are safe as file names:
    `file_name` in that folder, without the ending.)

  Raises:
    InputError: there is no such file or folder, or no image in it, or two have
      one name.
  """
  path = data_path(where)
  if is_file(path):
    folder, found = path.parent, [path]
  elif is_folder(path):
    folder = path
    found = [path / name for name in names_in(path)]  # also its folders
  elif glob.has_magic(str(where)):
    # A folder that exists means itself, whatever characters are in its name.
    folder = next(
      p for p in path.parents if not glob.has_magic(str(p)) or is_folder(p)
    )
    found = _matches(folder, file_name(path, folder))
  else:
    raise InputError(
      f"{where}: no such file or folder; --input wants a folder of images, an"
      " image, or a pattern in quotes, such as 'photos/**/*'"
    )
  others = [file for file in found if file.suffix.lower() not in SUFFIXES]
  found = [file for file in found if file.suffix.lower() in SUFFIXES]
  no_images = [*filter(file_lookup(), others)]
  endings = collections.Counter(f.suffix.lower() for f in no_images)
  told = ", ".join(
    f"{ending or 'no ending'} ({n})" for ending, n in endings.most_common()
  )
  folders = {*others} - {*no_images}
  num_folders = sum(not f.name.startswith(".") for f in folders)
  hint = f"; for those in its {num_folders} folders give '{path}/**/*'"
  if not found:
    raise InputError(
      f"{where}: there is no image ({', '.join(SUFFIXES)}); found"
      f" {told or 'nothing'}{hint if num_folders else ''}"
    )
  if num_folders:
    print(f"{where}: only its own images are taken{hint}", file=sys.stderr)
  if told:
    print(
      f"{where}: {len(no_images)} files are no images that can be read here:"
      f" {told}; images among them have to be converted",
      file=sys.stderr,
    )
  name_of = {
    file: safe_name(file_name(file.with_suffix(""), folder).replace("/", "_"))
    for file in found
  }
  check_names(name_of)
  return folder, {name: file for file, name in name_of.items()}


def file_name(path: AnyPath, folder: AnyPath) -> str:
  """The name of a file relative to a folder that it is in, with '/'."""
  return "/".join(path.parts[len(folder.parts) :])


def _matches(folder: AnyPath, pattern: str) -> list[AnyPath]:
  if is_local(folder):
    names = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    return [folder / name for name in names if os.path.isfile(folder / name)]
  pattern = f"{glob.escape(folder.path.rstrip('/'))}/{pattern}"
  found = folder.fs.glob(pattern, detail=True)
  names = sorted(n for n, info in found.items() if info["type"] == "file")
  return [folder.with_segments(folder.fs.unstrip_protocol(n)) for n in names]


class ImageFiles:
  """Image files with what a `RecordSource` has, but tags.

  An image that cannot be decoded is left out, with a message.

  Attributes:
    names: N names, the keys of `find_images`.
    image_ids: N unique strings, which change with the content of a file.
    paths: N files.
    sizes: [N, 2] int32, height and width after EXIF rotation, pixels.
    tags: [N, K] float32, all 0: nothing is known.
    left_out: names of the files that cannot be decoded.
  """

  def __init__(self, files: dict[str, AnyPath], *, num_classes: int):
    """Reads and decodes every file."""
    self.left_out: list[str] = []
    kept: list[tuple[str, AnyPath, str]] = []
    sizes: list[Sequence[int]] = []
    bar = progress(files.items(), "read", total=len(files), unit="image")
    for name, path in bar:
      try:
        data = read_bytes(path)
        image = decode_image(data, name=str(path))
      except (InputError, OSError) as error:
        print(f"left out: {error}", file=sys.stderr)
        self.left_out.append(name)
        continue
      kept.append((name, path, digest(data)))
      sizes.append(image.shape[:2])
    self.names = tuple(name for name, _, _ in kept)
    self.paths = tuple(path for _, path, _ in kept)
    # Proposals are filed under these, and a file may be replaced by another.
    self.image_ids = tuple(f"{name}-{key[:16]}" for name, _, key in kept)
    self.sizes = np.array(sizes, np.int32).reshape(-1, 2)
    self.tags = np.zeros((len(kept), num_classes), np.float32)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, i: int) -> Record:
    height, width = (int(n) for n in self.sizes[i])
    return Record(
      self.image_ids[i], read_file(self.paths[i]), height, width, ()
    )


def digest(data: bytes) -> str:
  """SHA-256 of the bytes of a file."""
  return hashlib.sha256(data).hexdigest()
