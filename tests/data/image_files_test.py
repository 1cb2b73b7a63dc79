"""Tests of the images to predict: which they are, and what they are called."""

import io

import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import image_files
from jtsm_jax.types import InputError
from tests.data.buckets import upload


def png(size=(4, 6), seed=0):
  rng = np.random.default_rng(seed)
  data = io.BytesIO()
  pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(data, format="PNG")
  return data.getvalue()


@pytest.fixture
def root(tmp_path):
  for n, name in enumerate(("b c.png", "a.PNG", "sub/a.png", "sub/x/-d.jpg")):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed=n))
  (tmp_path / "notes.txt").write_text("none")
  (tmp_path / "folder.png").mkdir()
  return tmp_path


def names(where, root):
  _, found = image_files.find_images(where)
  return {n: p.relative_to(root).as_posix() for n, p in found.items()}


def test_a_folder_without_its_subfolders(root):
  (root / "folder.png").rmdir()
  assert names(root, root) == {"a": "a.PNG", "b_c": "b c.png"}


def test_one_image(root):
  assert names(root / "sub" / "a.png", root) == {"a": "sub/a.png"}


def test_patterns(root):
  assert names(f"{root}/sub/*", root) == {"a": "sub/a.png"}
  assert names(f"{root}/**/[ab]*", root) == {
    "a": "a.PNG",
    "b_c": "b c.png",
    "sub_a": "sub/a.png",
  }
  assert names(f"{root}/*/x/*", root) == {"sub_x_-d": "sub/x/-d.jpg"}


def test_the_folder_of_a_pattern(root, monkeypatch):
  monkeypatch.chdir(root / "sub")
  for where, folder in {
    "*": ".",
    "../**/*": "..",
    "./x/*": "x",
    f"{root}/s*/x/*": str(root),
    f"{root}/sub": f"{root}/sub",
    "a.png": ".",
  }.items():
    assert str(image_files.find_images(where)[0]) == folder


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_folder_in_a_pattern_may_have_brackets(tmp_path, bucket, in_bucket):
  for name in ("x[1]/al [2]/a.png", "x[1]/al [2]/s[3]/b.png", "x1/c.png"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
  place = upload(tmp_path, bucket) if in_bucket else tmp_path
  album = f"{place}/x[1]/al [2]"
  for pattern, folder, wanted in (
    (f"{album}/*.png", album, {"a"}),
    (f"{album}/**/*", album, {"a", "s_3__b"}),
    (f"{album}/s*/[ab].png", album, {"s_3__b"}),
    (f"{album}/s[3]/?.png", f"{album}/s[3]", {"b"}),
  ):
    found_folder, found = image_files.find_images(pattern)
    assert str(found_folder) == folder
    assert set(found) == wanted
  # Where there is no such folder they are a wildcard.
  folder, found = image_files.find_images(f"{place}/x[12]/*")
  assert (str(folder), set(found)) == (str(place), {"x1_c"})


def test_a_pattern_in_a_bucket(root, bucket):
  for path in root.rglob("*"):
    if path.is_file():
      name = path.relative_to(root).as_posix()
      bucket.fs.pipe_file(f"{bucket.path}/{name}", path.read_bytes())
  folder, found = image_files.find_images(f"{bucket}/**/*.png")
  assert set(found) == {"b_c", "sub_a"}
  assert str(folder) == str(bucket)
  source = image_files.ImageFiles(found, num_classes=2)
  assert source[source.names.index("sub_a")].image == png(seed=2)
  assert set(image_files.find_images(str(bucket))[1]) == {"a", "b_c"}
  with pytest.raises(InputError, match="no such file or folder"):
    image_files.find_images("memory://bucket/none")


def test_folders_that_are_passed_over_are_told(tmp_path, capsys):
  (tmp_path / "a.png").write_bytes(png())
  (tmp_path / ".thumbnails").mkdir()  # no pattern would look into it
  image_files.find_images(tmp_path)
  assert capsys.readouterr().err == ""
  (tmp_path / "day 1").mkdir()
  (tmp_path / "day 2").mkdir()
  image_files.find_images(tmp_path)
  assert capsys.readouterr().err == (
    f"{tmp_path}: only its own images are taken; for those in its 2 folders"
    f" give '{tmp_path}/**/*'\n"
  )
  for where in (f"{tmp_path}/*", f"{tmp_path}/**/*", tmp_path / "a.png"):
    image_files.find_images(where)
    assert capsys.readouterr().err == ""


def test_what_is_no_image_is_told(root, bucket, capsys):
  (root / "folder.png").rmdir()
  for name in ("1.HEIC", "2.heic", "sub/3.heic", "README"):
    (root / name).write_bytes(b"what nobody here can read")
  for place in (root, upload(root, bucket)):
    image_files.find_images(place)
    assert capsys.readouterr().err == (
      f"{place}: only its own images are taken; for those in its 1 folders give"
      f" '{place}/**/*'\n"
      f"{place}: 4 files are no images that can be read here: .heic (2), no"
      " ending (1), .txt (1); images among them have to be converted\n"
    )
    image_files.find_images(f"{place}/**/*")
    assert "5 files are no images" in capsys.readouterr().err
    image_files.find_images(f"{place}/**/*.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", image_files.SUFFIXES)
def test_all_kinds_are_read(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  Image.new("RGB", (6, 4), (200, 30, 40)).save(path)
  _, found = image_files.find_images(tmp_path)
  assert image_files.ImageFiles(found, num_classes=1).sizes.tolist() == [[4, 6]]


@pytest.mark.parametrize(
  ("where", "message"),
  [
    ("none", r"none: no such file or folder; --input wants"),
    ("folder.png", r"folder.png: there is no image \(\.jpg,.*; found nothing$"),
    ("notes.txt", r"there is no image \(.*\); found \.txt \(1\)$"),
    ("*.gif", "there is no image"),
    ("notes*", r"there is no image \(.*\); found \.txt \(1\)$"),
    (
      "albums",
      r"no image \(.*\); found no ending \(1\); for those in its 2 folders give"
      r" '.*/albums/\*\*/\*'$",
    ),
  ],
)
def test_nothing_to_predict(root, where, message):
  for name in ("day 1", "day 2"):
    (root / "albums" / name).mkdir(parents=True)
  (root / "albums" / "README").write_text("none")
  with pytest.raises(InputError, match=message):
    image_files.find_images(root / where)


def test_files_of_one_name_are_all_told(root):
  for name in ("b_c.jpg", "b+c.jpg", "a.jpg"):
    (root / name).write_bytes(png())
  with pytest.raises(InputError, match="2 names") as raised:
    image_files.find_images(root)
  for name in ("a.PNG", "a.jpg", "b c.png", "b+c.jpg", "b_c.jpg"):
    assert str(root / name) in str(raised.value)


def test_names_of_any_script(tmp_path):
  for name in ("日本.jpg", "中国.jpg", "cafe\u0301.jpg"):
    (tmp_path / name).write_bytes(png())
  assert set(image_files.find_images(tmp_path)[1]) == {"日本", "中国", "café"}


def test_bad_images_are_left_out_with_a_message(root, capsys):
  (root / "cut.png").write_bytes(png()[:50])
  (root / "empty.jpg").write_bytes(b"")
  _, files = image_files.find_images(f"{root}/*.*")
  files["gone"] = root / "gone.png"
  source = image_files.ImageFiles(files, num_classes=3)
  assert source.names == ("a", "b_c")
  assert source.left_out == ["cut", "empty", "gone"]
  err = capsys.readouterr().err
  for name in ("cut.png", "empty.jpg", "gone.png"):
    assert f"left out: {root / name}" in err or name in err
  assert source.sizes.tolist() == [[4, 6], [4, 6]]
  assert source.tags.shape == (2, 3)


def test_ids_change_with_the_content(root):
  _, files = image_files.find_images(root / "sub")
  before = image_files.ImageFiles(files, num_classes=1).image_ids
  assert image_files.ImageFiles(files, num_classes=1).image_ids == before
  (root / "sub" / "a.png").write_bytes(png(seed=9))
  assert image_files.ImageFiles(files, num_classes=1).image_ids != before


def test_none_at_all():
  source = image_files.ImageFiles({}, num_classes=2)
  assert len(source) == 0
  assert source.sizes.shape == (0, 2)
