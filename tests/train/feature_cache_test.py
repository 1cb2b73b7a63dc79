"""The cache on disk; the images that are read tell whether it is asked."""

import os
import pathlib
import subprocess
import sys
import threading

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.data.pipeline import images_on_canvas
from jtsm_jax.data.sampling import BatchPlan
from jtsm_jax.train import feature_cache
from jtsm_jax.train.feature_cache import FeatureCache, cache_bytes
from jtsm_jax.types import InputError, Record
from tests import tiny

MODEL = tiny.make_model()
BATCH = tiny.make_batch(3)
BLIND = BATCH.replace(images=None)
VARIABLES = tiny.make_variables(MODEL, BATCH)


class Images:
  """As much of a RecordSource as the cache looks at; notes what is read."""

  def __init__(self, count=5, *, seed=0):
    rng = np.random.default_rng(seed)
    self.image_ids = tuple(f"image_{i}" for i in range(count))
    self.fingerprint = f"{seed}-{count}"
    self.reads = []
    self._files = [
      cv2.imencode(".png", rng.integers(0, 256, (40, 48, 3), np.uint8))[1]
      for _ in range(count)
    ]

  def __len__(self):
    return len(self._files)

  def __getitem__(self, i):
    self.reads.append(int(i))
    return Record(self.image_ids[i], self._files[i].tobytes(), 40, 48, ())


def _open(folder, source, *, variables=VARIABLES, split="train"):
  return FeatureCache(
    folder, model=MODEL, variables=variables, split=split, source=source
  )


def _direct(batch, variables=VARIABLES, **source):
  plan = BatchPlan(
    batch.superpixels.shape[1:], batch.image_index, batch.flip, batch.window
  )
  images = images_on_canvas(plan, Images(**source))
  return np.asarray(MODEL.apply(variables, images, method="extract"))


def _assert_features(found, expected):
  # float16 has 11 significant bits.
  assert found.images is None
  assert found.features.dtype == np.float16
  np.testing.assert_allclose(found.features, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch", [BLIND, BATCH], ids=["blind", "images"])
def test_first_look_computes_and_the_next_ones_read(tmp_path, batch):
  source = Images()
  cache = _open(tmp_path, source)
  _assert_features(cache.attach(batch), _direct(batch))
  _assert_features(cache.attach(batch), _direct(batch))
  assert source.reads == [0, 1, 2]
  # Another run, images in another order.
  order = np.array([2, 0])
  again = batch.replace(image_index=batch.image_index[order])
  again = again.replace(flip=again.flip[order])
  found = _open(tmp_path, source).attach(again)
  _assert_features(found, _direct(batch)[order])
  assert source.reads == [0, 1, 2]


def test_what_is_computed_once_equals_what_is_read_later(tmp_path):
  cache = _open(tmp_path, Images())
  first, second = cache.attach(BLIND), cache.attach(BLIND)
  np.testing.assert_array_equal(first.features, second.features)


def test_only_missing_images_are_read(tmp_path):
  source = Images()
  cache = _open(tmp_path, source)
  cache.attach(BLIND)
  mixed = BLIND.replace(image_index=np.array([1, 4, 0], np.int32))
  _assert_features(cache.attach(mixed), _direct(mixed))
  assert source.reads == [0, 1, 2, 4]


@pytest.mark.parametrize(
  "change", ["flip", "canvas", "split", "weights", "data"]
)
def test_other_inputs_have_other_rows(tmp_path, change):
  first, source = Images(), Images()
  _open(tmp_path, first).attach(BLIND)
  other, variables, split, data = BLIND, VARIABLES, "train", {}
  if change == "flip":
    other = BLIND.replace(flip=~BLIND.flip)
  elif change == "canvas":
    other = BLIND.replace(superpixels=BLIND.superpixels[:, :48])
  elif change == "split":
    split = "val"
  elif change == "data":
    data = {"seed": 1}
    source = Images(**data)
  else:
    variables = tiny.make_variables(MODEL, BATCH, seed=1)
  cache = _open(tmp_path, source, variables=variables, split=split)
  expected = _direct(other, variables, **data)
  _assert_features(cache.attach(other), expected)
  assert source.reads == [0, 1, 2]
  # And the first ones are still there.
  _assert_features(_open(tmp_path, first).attach(BLIND), _direct(BLIND))
  assert first.reads == [0, 1, 2]
  if change != "split":
    assert not np.allclose(expected[:, :6], _direct(BLIND)[:, :6], rtol=0.1)


def test_padding_examples_are_zero_and_not_written(tmp_path):
  source = Images()
  cache = _open(tmp_path, source)
  padded = BLIND.replace(image_index=np.array([-1, 1, -1], np.int32))
  expected = _direct(BLIND).copy()
  expected[[0, 2]] = 0
  _assert_features(cache.attach(padded), expected)
  # Image 0, whose row padding shares, is computed when it comes.
  _assert_features(cache.attach(BLIND), _direct(BLIND))
  assert source.reads == [1, 0, 2]


@pytest.mark.parametrize("suffix", [".f16", ".marks"])
def test_file_of_another_size_is_made_again(tmp_path, suffix):
  source = Images()
  _open(tmp_path, source).attach(BLIND)
  [path] = tmp_path.rglob(f"*{suffix}")
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  _assert_features(_open(tmp_path, source).attach(BLIND), _direct(BLIND))
  assert path.stat().st_size == len(content)
  assert source.reads == [0, 1, 2] * 2


def test_cache_bytes_is_the_size_of_the_files(tmp_path):
  _open(tmp_path, Images()).attach(BLIND)
  [path] = tmp_path.rglob("*.f16")
  found = cache_bytes(MODEL, VARIABLES, canvases=(tiny.CANVAS,), num_images=5)
  # Both ways round, 8 x 8 cells of 8 channels of 2 bytes.
  assert found == path.stat().st_size == 2 * 5 * 64 * 8 * 2
  two = cache_bytes(
    MODEL, VARIABLES, canvases=(tiny.CANVAS, (32, 64)), num_images=5
  )
  assert two == found * 3 // 2


def test_bfloat16_has_a_folder_of_its_own_and_loses_nothing(tmp_path):
  source = Images()
  _open(tmp_path, source).attach(BLIND)
  model = tiny.make_model(dtype=jnp.bfloat16)
  cache = FeatureCache(
    tmp_path, model=model, variables=VARIABLES, split="train", source=source
  )
  found = cache.attach(BLIND)
  assert len(list(tmp_path.iterdir())) == 2
  assert found.features.dtype == np.float16
  # Its 8 significant bits are among the 11 of float16.
  direct = model.apply(VARIABLES, found, method="features")
  assert direct.dtype == jnp.bfloat16
  np.testing.assert_array_equal(direct.astype(np.float16), found.features)
  other = _open(tmp_path, source).attach(BLIND).features
  np.testing.assert_allclose(found.features, other, rtol=0.05, atol=0.05)
  assert not np.array_equal(found.features, other)


def test_other_ways_to_use_the_same_weights_have_a_folder_of_their_own(
  tmp_path,
):
  normalise = MODEL.extractor.normalise

  def brighter(images):
    return normalise(images) + 1

  source = Images()
  dim = _open(tmp_path, source).attach(BLIND).features
  model = MODEL.clone(extractor=MODEL.extractor.clone(normalise=brighter))
  for _ in range(2):
    cache = FeatureCache(
      tmp_path, model=model, variables=VARIABLES, split="train", source=source
    )
    bright = cache.attach(BLIND).features
  assert not np.array_equal(bright, dim)
  assert len(list(tmp_path.iterdir())) == 2


def test_features_beyond_float16_are_an_error_and_not_marked(tmp_path):
  normalise = MODEL.extractor.normalise
  model = MODEL.clone(
    extractor=MODEL.extractor.clone(normalise=lambda x: 1e6 * normalise(x))
  )
  cache = FeatureCache(
    tmp_path, model=model, variables=VARIABLES, split="train", source=Images()
  )
  for _ in range(2):
    with pytest.raises(InputError) as error:
      cache.attach(BLIND)
    for part in (str(tmp_path), "image_0", "65504", "backbone.cache=False"):
      assert part in str(error.value)
  [marks] = tmp_path.rglob("*.marks")
  assert not any(marks.read_bytes())


def test_another_run_waits_while_the_files_are_made(tmp_path, monkeypatch):
  take_room = feature_cache._take_room
  caches = [_open(tmp_path, Images()) for _ in range(2)]
  entered, found = threading.Event(), []
  second = threading.Thread(
    target=lambda: found.append(caches[1].attach(BLIND))
  )

  def slowly(*args, **options):
    if threading.current_thread() is second:
      entered.set()
    elif not second.ident:
      second.start()
      # It would truncate what is mapped here, or keep what is half made.
      assert not entered.wait(timeout=2)
    take_room(*args, **options)

  monkeypatch.setattr(feature_cache, "_take_room", slowly)
  found.append(caches[0].attach(BLIND))
  second.join()
  assert entered.is_set()
  for batch in (*found, _open(tmp_path, Images()).attach(BLIND)):
    _assert_features(batch, _direct(BLIND))


FULL = """
import pathlib, resource, sys
from jtsm_jax.types import InputError
from tests.train.feature_cache_test import BLIND, Images, _open

cache = _open(pathlib.Path(sys.argv[1]), Images())
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file is longer
try:
  cache.attach(BLIND)
except InputError as error:
  print(error)
"""


def test_a_full_disk_is_told_before_a_row_is_written(tmp_path):
  # A memory map of a file without blocks would end the process with SIGBUS.
  ended = subprocess.run(
    [sys.executable, "-c", FULL, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
  )
  assert ended.returncode == 0, ended.stderr
  assert f"{tmp_path}" in ended.stdout
  assert "features cannot be kept (File too large)" in ended.stdout
  assert "--config.backbone.cache_dir" in ended.stdout
  assert {p.suffix for p in tmp_path.rglob("*.*")} == {".lock"}  # room again


def test_a_file_with_holes_gets_its_blocks(tmp_path):
  _open(tmp_path, Images()).attach(BLIND)
  [path] = tmp_path.rglob("*.f16")
  size = path.stat().st_size
  assert path.stat().st_blocks * 512 >= size
  os.truncate(path, 0)
  os.truncate(path, size)
  assert path.stat().st_blocks == 0
  _open(tmp_path, Images()).attach(BLIND)
  assert path.stat().st_size == size
  assert path.stat().st_blocks * 512 >= size
