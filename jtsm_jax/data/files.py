"""Files of data sets, on this machine or in a bucket.

A local path is a `pathlib.Path`. A URL of anything else that fsspec can reach
(gs://, s3://, ...) is a `UPath` of the package universal_pathlib, which can be
joined and taken apart alike. What opens, lists or writes files goes through the
functions here, since a bucket differs in three ways: requests take long, a
folder cannot be renamed, and anything may fail at any time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import fsspec
from fsspec.registry import known_implementations
from upath import UPath

from jtsm_jax.console import progress
from jtsm_jax.types import InputError

AnyPath: TypeAlias = pathlib.Path | UPath
PathOrUrl: TypeAlias = str | os.PathLike | UPath

CACHE_VARIABLE = "JTSM_CACHE_DIR"
"""Environment variable: the folder of `fetch`."""

_REQUESTS = 16  # at once
_NAME_BYTES = 200  # of a name; file systems take 255, and endings are added


def data_path(name: PathOrUrl) -> AnyPath:
  """The path of a file or folder that the user names.

  Args:
    name: a local path, or a URL; file:// is local, and ~ the home folder.

  Raises:
    InputError: fsspec does not know the kind of URL, or needs another package
      for it.
  """
  if isinstance(name, UPath) and not isinstance(name, pathlib.Path):
    return name
  text = os.fspath(name)
  protocol, mark, rest = text.partition("://")
  if not mark:
    return pathlib.Path(os.path.expanduser(text))
  if protocol in ("file", "local"):
    return pathlib.Path(rest)
  try:
    fsspec.get_filesystem_class(protocol)
    return UPath(text)
  except ImportError as error:
    package = known_implementations[protocol]["class"].split(".")[0]
    remedy = "" if package == "fsspec" else f": pip install {package}"
    raise InputError(f"{text}: {error}{remedy}") from error
  except ValueError as error:
    raise InputError(
      f"{text}: no such kind of URL ({_reason(error)}); give a local path, or a"
      " URL such as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
    ) from error


def is_local(path: AnyPath) -> bool:
  """Whether a path of `data_path` is on this machine."""
  return isinstance(path, pathlib.Path)


def absolute_path(path: PathOrUrl) -> str:
  """A path that does not depend on the current folder; a URL stays as it is."""
  text = str(path)
  if "://" in text:
    return text
  return os.path.abspath(os.path.expanduser(text))


def full_path(path: PathOrUrl) -> str:
  """The same text for each spelling of a path; a URL stays as it is."""
  text = str(path)
  return text if "://" in text else os.path.realpath(text)


def safe_name(name: str) -> str:
  """A name that is safe for a file, and the same however Unicode spells it.

  Characters of ASCII other than letters, digits, '.', '_' and '-', and all that
  cannot be seen, become '_'; the end of a long name gives way to a hash.
  """
  kept = re.sub(r"[^A-Za-z0-9._\x80-\U0010ffff-]", " ", composed(name))
  seen = "".join(c if c.isprintable() else " " for c in kept)
  safe = re.sub(" +", "_", seen)
  safe = safe if safe[0] not in ".-" else f"_{safe}"
  data = safe.encode()
  if len(data) <= _NAME_BYTES:
    return safe
  key = hashlib.sha256(data).hexdigest()[:16]
  return f"{data[: _NAME_BYTES - 17].decode(errors='ignore')}-{key}"


def composed(name: str) -> str:
  """A name as most programs spell it (NFC); macOS takes letters apart (NFD)."""
  return unicodedata.normalize("NFC", name)


def check_names(name_of: Mapping[Any, str]) -> None:
  """Checks that each file has a name of its own.

  Args:
    name_of: the `safe_name` of each file.

  Raises:
    InputError: several have one; tells all of them.
  """
  files_of: dict[str, list[str]] = {}
  for file, name in name_of.items():
    files_of.setdefault(name, []).append(repr(str(file)))
  twins = [
    f"\n  {' and '.join(files)} would be called {name!r}"
    for name, files in files_of.items()
    if len(files) > 1
  ]
  if twins:
    raise InputError(
      f"{len(twins)} names are of several images; rename these (the ending"
      " does not count, and what is no letter, digit, '.', '_' or '-' counts"
      f" as '_'):{''.join(twins)}"
    )


def folder_name(path: AnyPath) -> str:
  """The name of a folder, also of "." and of a bucket."""
  full = os.path.abspath(path) if is_local(path) else path.path
  return full.rstrip("/").rpartition("/")[2]


def safe_path(folder: PathOrUrl, name: str, where: str) -> AnyPath:
  """The path of a file that a data set's own table names.

  A data set may come from a stranger, so its table must not lead out of it.

  Args:
    folder: which the file has to lie in; the folder itself may be a link.
    name: of the file, relative to `folder`.
    where: what names the file; error messages begin with it.

  Returns:
    `folder / name`, whether or not there is such a file.

  Raises:
    InputError: the name is empty or no text, absolute, contains '..', or leaves
      the folder by a link.
  """
  path = pathlib.PurePosixPath(name) if isinstance(name, str) else None
  if path is None or not path.parts or not _can_be_opened(name):
    raise InputError(
      f"{where}: {name!r} is no name of a file; give a path relative to"
      f" {folder}"
    )
  if path.is_absolute() or ".." in path.parts:
    raise InputError(
      f"{where}: {name!r} leaves the folder; give a path relative to {folder},"
      " without '..'"
    )
  file = folder = data_path(folder)
  if not is_local(folder):
    return folder.joinpath(*path.parts)  # there are no links
  for part in path.parts:
    file = file / part
    # Only links can lead out, and to resolve every path takes long.
    if file.is_symlink() and not _is_inside(file, folder):
      raise InputError(
        f"{where}: {name!r} is a link that leaves {folder}; put the file itself"
        " there"
      )
  return file


def _can_be_opened(name: str) -> bool:
  try:
    return b"\0" not in os.fsencode(name)
  except UnicodeEncodeError:  # Half a surrogate pair.
    return False


def _is_inside(file: pathlib.Path, folder: pathlib.Path) -> bool:
  real = pathlib.Path(os.path.realpath(file))
  return real.is_relative_to(os.path.realpath(folder))


# --- Reading


def read_bytes(path: AnyPath, *, limit: int | None = None) -> bytes:
  """The bytes of a file.

  Args:
    path: of the file.
    limit: read no more than the first so many.

  Raises:
    OSError: whatever went wrong; FileNotFoundError if there is no such file.
  """
  if is_local(path) and limit is None:
    return path.read_bytes()
  if is_local(path):
    with path.open("rb") as file:
      return file.read(limit)
  try:
    return path.fs.cat_file(path.path, end=limit)
  except FileNotFoundError as error:
    reason = "no such file"
    raise FileNotFoundError(errno.ENOENT, reason, str(path)) from error
  except Exception as error:  # Each file system has its own.
    raise OSError(errno.EIO, _reason(error), str(path)) from error


def read_file(path: AnyPath) -> bytes:
  """The bytes of a file of a data set; InputError if it cannot be read."""
  try:
    return read_bytes(path)
  except OSError as error:
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); check the file"
    ) from error


def map_reads(
  function: Callable[[Any], Any], items: Sequence[Any], folder: AnyPath
) -> list[Any]:
  """`function` of each item, which reads a file in `folder`; in their order."""
  if is_local(folder):
    return [function(item) for item in items]
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
    return list(pool.map(function, items))


# --- Listing


def is_file(path: AnyPath) -> bool:
  """Whether there is a file; InputError if that cannot be found out."""
  return path.is_file() if is_local(path) else _kind(path) == "file"


def is_folder(path: AnyPath) -> bool:
  """Whether there is a folder; InputError if that cannot be found out."""
  return path.is_dir() if is_local(path) else _kind(path) == "directory"


def _kind(path: UPath) -> str | None:
  """ "file", "directory", or None if there is nothing."""
  with _remote(path, "reached"):
    try:
      return path.fs.info(path.path)["type"]
    except FileNotFoundError:
      return None


def names_in(folder: AnyPath) -> list[str]:
  """The names of the files and folders in a folder, sorted; [] without one.

  Raises:
    InputError: the folder cannot be listed.
  """
  if is_local(folder):
    return sorted(os.listdir(folder)) if folder.is_dir() else []
  return sorted(_infos(folder))


def _infos(folder: UPath) -> dict[str, dict[str, Any]]:
  """What fsspec tells of each file and folder in a folder, by name."""
  with _remote(folder, "listed"):
    path = folder.path.rstrip("/")
    folder.fs.invalidate_cache(path)  # others write there, too
    try:
      infos = folder.fs.ls(path, detail=True)
    except FileNotFoundError:
      return {}
  # Some list an empty object that stands for the folder itself.
  own = [i for i in infos if i["name"].strip("/") != path.strip("/")]
  return {i["name"].rstrip("/").rpartition("/")[2]: i for i in own}


def file_names(folder: AnyPath) -> list[str]:
  """All files in a folder and its subfolders, sorted.

  Returns:
    Names relative to `folder`, separated by '/'; links to folders are not
    followed.

  Raises:
    InputError: the folder cannot be listed.
  """
  if is_local(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
  with _remote(folder, "listed"):
    folder.fs.invalidate_cache(folder.path)
    found = folder.fs.find(folder.path)
  start = len(folder.path.strip("/")) + 1
  return sorted(name.strip("/")[start:] for name in found)


def file_lookup() -> Callable[[AnyPath], bool]:
  """A function that tells whether a file exists, for many of them.

  Each folder in a bucket is listed once, instead of a request for every file.
  """
  listed: dict[AnyPath, dict[str, dict[str, Any]]] = {}

  def exists(path: AnyPath) -> bool:
    if is_local(path):
      return path.is_file()
    folder = path.parent
    if folder not in listed:
      listed[folder] = _infos(folder)
    return listed[folder].get(path.name, {}).get("type") == "file"

  return exists


# --- Writing


@contextlib.contextmanager
def written_whole(path: AnyPath) -> Iterator[pathlib.Path]:
  """Gives a local file to write, which becomes `path`, whole or not at all.

  It is renamed, or uploaded into a bucket, when the block ends without an
  error. What a kill leaves beside a local file is called NAME.partial-*.

  Raises:
    InputError: the upload failed.
    OSError: the disk fails; names `path` if it names nothing else.
  """
  if not is_local(path):
    with tempfile.TemporaryDirectory() as folder:
      draft = pathlib.Path(folder) / path.name
      yield draft
      _upload(draft, path)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
  try:
    yield draft
    with draft.open("rb") as file:
      os.fsync(file.fileno())
    draft.replace(path)
  except BaseException as error:
    draft.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.filename is None:
      error.filename = str(path)
    raise


def write_file(path: AnyPath, content: str | bytes) -> None:
  """Writes a file, text as UTF-8; as `written_whole`."""
  data = content.encode() if isinstance(content, str) else content
  with written_whole(path) as draft:
    draft.write_bytes(data)


def _upload(draft: pathlib.Path, path: UPath) -> None:
  with _remote(path, "written"):
    path.fs.put_file(str(draft), path.path)
    wanted, found = draft.stat().st_size, path.fs.info(path.path)["size"]
    if found != wanted:
      raise OSError(f"{found} of {wanted} bytes arrived")


def file_size(path: AnyPath) -> int:
  """Bytes of a file that exists."""
  if is_local(path):
    return path.stat().st_size
  with _remote(path, "reached"):
    return path.fs.info(path.path)["size"]


def remove(path: AnyPath) -> None:
  """Removes a file, or a folder with all that is in it, if it is there."""
  if not is_local(path):
    with _remote(path, "removed"), contextlib.suppress(FileNotFoundError):
      path.fs.rm(path.path, recursive=True)
  elif path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


# --- Local copies


def cache_folder() -> pathlib.Path:
  """Where local copies lie: $JTSM_CACHE_DIR, or jtsm_jax in the user's cache.

  All of it may be deleted while no program uses it.
  """
  if own := os.environ.get(CACHE_VARIABLE):
    return pathlib.Path(own)
  users = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(users) / "jtsm_jax"


def fetch(path: AnyPath) -> pathlib.Path:
  """A local file with the content of `path`.

  ArrayRecord reads at random, and not from every kind of bucket. So a file in a
  bucket is copied into `cache_folder()` once, whoever asks for it, and again if
  its size or time of change there is another. Files of one folder get into one.

  Raises:
    InputError: there is no such file, or it cannot be copied.
  """
  if is_local(path):
    return path
  source = str(path.parent)
  key = hashlib.sha256(source.encode()).hexdigest()[:16]
  copy = cache_folder() / f"{path.parent.name or 'root'}-{key}" / path.name
  with _remote(path, f"copied to {copy.parent} (${CACHE_VARIABLE})"):
    size = path.fs.info(path.path)["size"]
    time = _time_of_change(path)
    if _is_current(copy, size, time):
      return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{copy}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees that of a killed one
      if _is_current(copy, size, time):
        return copy
      draft = pathlib.Path(f"{copy}.partial")
      path.fs.get_file(path.path, str(draft))
      found = draft.stat().st_size
      if size is not None and found != size:
        raise OSError(f"{found} of {size} bytes arrived")
      if time is not None:
        os.utime(draft, (time, time))
      draft.replace(copy)
  return copy


def fetch_all(paths: Iterable[AnyPath]) -> list[pathlib.Path]:
  """`fetch` of many files, several at a time."""
  paths = list(paths)
  if all(map(is_local, paths)):
    return paths
  with (
    progress(None, "fetch", total=len(paths), unit="file") as bar,
    concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool,
  ):
    copies = []
    for copy in pool.map(fetch, paths):
      bar.update()
      copies.append(copy)
  return copies


def _time_of_change(path: UPath) -> float | None:
  """Seconds since the epoch; None where files have no time."""
  try:
    return path.fs.modified(path.path).timestamp()
  except (NotImplementedError, AttributeError):
    return None


def _is_current(
  copy: pathlib.Path, size: int | None, time: float | None
) -> bool:
  try:
    found = copy.stat()
  except FileNotFoundError:
    return False
  same_time = time is None or int(found.st_mtime) == int(time)
  return same_time and size in (None, found.st_size)


@contextlib.contextmanager
def _remote(path: UPath, done: str) -> Iterator[None]:
  """Turns what a file system raises into an InputError."""
  try:
    yield
  except FileNotFoundError as error:
    raise InputError(f"{path}: no such file or bucket") from error
  except Exception as error:  # Each file system has its own.
    raise InputError(
      f"{path}: cannot be {done} ({_reason(error)}); check the URL, the rights"
      " and the network, then start again: what is done is kept"
    ) from error


def _reason(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
