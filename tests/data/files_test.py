"""Tests of files on this machine and in buckets."""

import concurrent.futures
import datetime
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jtsm_jax.data import files
from jtsm_jax.types import InputError
from tests.data.array_records_test import files_no_longer_than


def put(path, data=b"data"):
  """Writes a file into a bucket past what is tested."""
  path.fs.pipe_file(path.path, data)
  return path


def test_paths_and_urls(tmp_path):
  assert files.data_path("a/b") == pathlib.Path("a/b")
  assert files.data_path(tmp_path) == tmp_path
  assert files.data_path("~/a") == pathlib.Path.home() / "a"
  assert files.data_path(f"file://{tmp_path}/x") == tmp_path / "x"
  url = files.data_path("memory://bucket/a")
  assert not files.is_local(url)
  assert files.data_path(url) is url
  assert str(url / "b.jpg") == "memory://bucket/a/b.jpg"
  assert str(pickle.loads(pickle.dumps(url))) == str(url)
  assert files.folder_name(url) == "a"
  assert files.folder_name(files.data_path("memory://bucket")) == "bucket"
  assert files.folder_name(pathlib.Path(".")) == pathlib.Path.cwd().name


def test_urls_that_cannot_be_reached(monkeypatch):
  with pytest.raises(InputError, match="nope://b: no such kind of URL"):
    files.data_path("nope://b")
  for url, package in {"gs://b/x": "gcsfs", "s3://b/x": "s3fs"}.items():
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with pytest.raises(InputError, match=f"{url}: .*: pip install {package}$"):
      files.data_path(url)


@pytest.mark.parametrize(
  ("name", "wanted"),
  [
    ("IMG_1-a.b", "IMG_1-a.b"),
    ("sub/b  c", "sub_b_c"),
    ("-a", "_-a"),
    (".a", "_.a"),
    ("日本", "日本"),
    ("हिन्दी", "हिन्दी"),  # its vowel signs are no letters
    ("cafe\u0301 1", "café_1"),  # as macOS spells it
    ("a\u202eb\u3000c\udcff", "a_b_c_"),  # what nobody can see
  ],
)
def test_safe_names(name, wanted):
  assert files.safe_name(name) == wanted
  assert files.safe_name(wanted) == wanted


def test_long_names_stay_apart():
  names = [files.safe_name("山" * 99 + end) for end in ("a", "b")]
  assert names[0] != names[1]
  for name in names:
    assert name.startswith("山" * 60)
    assert len(name.encode()) <= 200
    assert files.safe_name(name) == name
  assert files.safe_name("a" * 200) == "a" * 200


def test_safe_paths(tmp_path):
  (tmp_path / "folder" / "inner").mkdir(parents=True)
  link = tmp_path / "link"
  link.symlink_to(tmp_path / "folder")
  (link / "near").symlink_to("inner")
  (link / "loop").symlink_to("loop")
  for name in ("a.png", "inner/a..png", "near/a.png", "./a", "loop"):
    path = files.safe_path(link, name, "here")
    assert path == link / name
  for name in ("..", "inner/../a", "/a", "//a", "", ".", "a\0", "\ud800", 5):
    with pytest.raises(InputError, match=r"^here: .* give a path relative"):
      files.safe_path(link, name, "here")
  # A name that only begins like the folder's lies outside, too.
  (tmp_path / "folder2").mkdir()
  (link / "twin").symlink_to(tmp_path / "folder2")
  with pytest.raises(InputError, match="'twin/a' is a link that leaves"):
    files.safe_path(link, "twin/a", "here")


def test_safe_paths_in_a_bucket(bucket):
  for name, wanted in {"a/b.png": "a/b.png", "./a": "a"}.items():
    path = files.safe_path(bucket / "folder", name, "here")
    assert path == bucket / "folder" / wanted
  for name in ("..", "a/../../b", "/a", "//a", "", "memory:///a/../../b"):
    with pytest.raises(InputError, match=r"^here: .* give a path relative"):
      files.safe_path(bucket / "folder", name, "here")
  path = files.safe_path(bucket / "folder", "memory://other/b", "here")
  assert str(path).startswith("memory://bucket/folder/")


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path, bucket):
  """A folder with files and a subfolder, here and there."""
  folder = tmp_path / "folder" if request.param == "local" else bucket / "f"
  for name in ("b.txt", "a.txt", "sub/c.txt"):
    files.write_file(folder / name, name)
  return folder


def test_reading_listing_and_removing(folder):
  assert files.names_in(folder) == ["a.txt", "b.txt", "sub"]
  assert files.names_in(folder / "none") == []
  assert files.file_names(folder) == ["a.txt", "b.txt", "sub/c.txt"]
  assert files.file_names(folder / "sub") == ["c.txt"]
  assert files.is_folder(folder / "sub")
  assert not files.is_file(folder / "sub")
  assert files.is_file(folder / "a.txt")
  assert not files.is_folder(folder / "a.txt")
  assert not files.is_file(folder / "none")
  assert not files.is_folder(folder / "none")
  exists = files.file_lookup()
  names = ("a.txt", "sub", "sub/c.txt", "sub/d", "none/e")
  found = [exists(folder.joinpath(*name.split("/"))) for name in names]
  assert found == [True, False, True, False, False]
  assert files.read_file(folder / "sub" / "c.txt") == b"sub/c.txt"
  assert files.read_bytes(folder / "a.txt", limit=2) == b"a."
  assert files.file_size(folder / "a.txt") == 5
  with pytest.raises(FileNotFoundError):
    files.read_bytes(folder / "none")
  with pytest.raises(InputError, match=r"none: cannot be read \([Nn]o such"):
    files.read_file(folder / "none")
  paths = [folder / "b.txt", folder / "a.txt"]
  assert files.map_reads(files.read_file, paths, folder) == [b"b.txt", b"a.txt"]
  for name in ("a.txt", "sub", "none"):
    files.remove(folder / name)
  assert files.file_names(folder) == ["b.txt"]


def test_what_is_not_finished_is_not_there(folder):
  files.write_file(folder / "a.txt", "old")

  def write():
    with files.written_whole(folder / "a.txt") as draft:
      draft.write_bytes(b"half")
      raise KeyError

  with pytest.raises(KeyError):
    write()
  assert files.read_file(folder / "a.txt") == b"old"
  assert files.file_names(folder) == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
  path = tmp_path / "folder" / "a.json"
  with (
    files_no_longer_than(100),
    pytest.raises(OSError, match="too large") as raised,
  ):
    files.write_file(path, b"x" * 101)
  assert raised.value.filename == str(path)
  assert files.names_in(path.parent) == []


def test_a_bucket_that_fails(bucket, monkeypatch):
  """Each file system has exceptions of its own."""

  class HttpError(Exception):
    pass

  def fail(*args, **kwargs):
    raise HttpError("403,\n no rights")

  put(bucket / "a")
  for method in ("info", "ls", "find", "cat_file", "put_file", "get_file"):
    monkeypatch.setattr(MemoryFileSystem, method, fail)
  for function in (
    files.is_file,
    files.is_folder,
    files.names_in,
    files.file_names,
    files.read_file,
    files.fetch,
    lambda path: files.write_file(path, "x"),
  ):
    with pytest.raises(InputError, match=r"bucket/a: .*HttpError: 403, no"):
      function(bucket / "a")


def test_an_upload_that_loses_bytes(bucket, monkeypatch):
  real = MemoryFileSystem.put_file

  def lose(self, source, target, **kwargs):
    real(self, source, target, **kwargs)
    self.pipe_file(target, b"1")

  monkeypatch.setattr(MemoryFileSystem, "put_file", lose)
  with pytest.raises(InputError, match="1 of 3 bytes arrived"):
    files.write_file(bucket / "a", "123")


def test_files_are_fetched_once_and_again_when_they_change(bucket, monkeypatch):
  fetched = []
  real = MemoryFileSystem.get_file

  def get_file(self, source, target, **kwargs):
    fetched.append(source)
    real(self, source, target, **kwargs)

  monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
  path = put(bucket / "part" / "a", b"one")
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    copies = list(pool.map(files.fetch, [path] * 20))
  assert len(set(copies)) == len(fetched) == 1
  assert copies[0].read_bytes() == b"one"
  assert copies[0].is_relative_to(files.cache_folder())
  put(path, b"three")
  assert files.fetch(path).read_bytes() == b"three"
  put(path, b"seven")  # the same size, but another time
  path.fs.store[path.path].modified = datetime.datetime(2001, 1, 1)
  assert files.fetch(path).read_bytes() == b"seven"
  assert len(fetched) == 3
  # Of one folder into one folder, of another into another.
  others = [put(bucket / "part" / "b"), put(bucket / "other" / "a")]
  same, other = files.fetch_all(others)
  assert same.parent == copies[0].parent
  assert other.parent != copies[0].parent
  local = copies[0]
  assert files.fetch(local) is local
  assert files.fetch_all([local]) == [local]


def test_a_download_that_breaks_off(bucket, monkeypatch):
  path = put(bucket / "a", b"1234")

  def half(self, source, target, **kwargs):
    pathlib.Path(target).write_bytes(b"12")

  def broken(self, source, target, **kwargs):
    half(self, source, target)
    raise ConnectionError("reset by peer")

  with monkeypatch.context() as patch:
    patch.setattr(MemoryFileSystem, "get_file", half)
    with pytest.raises(InputError, match=r"copied to .* 2 of 4 bytes arrived"):
      files.fetch(path)
    patch.setattr(MemoryFileSystem, "get_file", broken)
    with pytest.raises(InputError, match=r"JTSM_CACHE_DIR.*reset by peer"):
      files.fetch(path)
  assert files.fetch(path).read_bytes() == b"1234"
  with pytest.raises(InputError, match="bucket/none: no such file or bucket"):
    files.fetch(bucket / "none")


FETCH = """
import fsspec, pathlib, sys, time
from fsspec.implementations.local import LocalFileSystem

class Disk(LocalFileSystem):  # a bucket that many processes see
  protocol = "disk"
  def get_file(self, source, target, **kwargs):
    with open(sys.argv[2], "a") as log:
      log.write("fetched\\n")
    data = pathlib.Path(source).read_bytes()
    with open(target, "wb") as file:
      for n in range(0, len(data), 1000):
        file.write(data[n : n + 1000])
        time.sleep(0.05)

fsspec.register_implementation("disk", Disk)
import warnings
warnings.simplefilter("ignore")
from jtsm_jax.data import files
path = files.data_path("disk://" + sys.argv[1])
assert not files.is_local(path)
assert files.fetch(path).read_bytes() == pathlib.Path(sys.argv[1]).read_bytes()
"""


def test_processes_of_one_machine_fetch_a_file_once(tmp_path):
  file, log = tmp_path / "file", tmp_path / "log"
  file.write_bytes(os.urandom(10_000))
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", FETCH, file, log],
      env=os.environ | {"JTSM_CACHE_DIR": str(tmp_path / "copies")},
      cwd=pathlib.Path(files.__file__).parents[2],
    )
    for _ in range(3)
  ]
  assert [p.wait(120) for p in processes] == [0] * 3
  assert log.read_text() == "fetched\n"


def test_where_copies_lie(monkeypatch, tmp_path):
  monkeypatch.delenv("JTSM_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert files.cache_folder() == tmp_path / "jtsm_jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert files.cache_folder() == pathlib.Path.home() / ".cache" / "jtsm_jax"
  monkeypatch.setenv("JTSM_CACHE_DIR", "/copies")
  assert files.cache_folder() == pathlib.Path("/copies")
