"""The cache on disk; images of another content tell whether it is asked."""

import numpy as np
import pytest

from jtsm_jax.train.feature_cache import FeatureCache, cache_bytes
from jtsm_jax.types import Record
from tests import tiny

MODEL = tiny.make_model()
BATCH = tiny.make_batch(3)
OTHER = BATCH.replace(images=255 - BATCH.images)
VARIABLES = tiny.make_variables(MODEL, BATCH)


class Images:
  """As much of a RecordSource as the cache looks at."""

  def __init__(self, *images):
    self.image_ids = tuple(f"image_{i}" for i in range(len(images)))
    self._images = images

  def __len__(self):
    return len(self._images)

  def __getitem__(self, i):
    return Record(self.image_ids[i], self._images[i], 1, 1, ())


SOURCE = Images(b"a", b"b", b"c", b"d", b"e")


def _open(folder, *, variables=VARIABLES, split="train", source=SOURCE):
  return FeatureCache(
    folder,
    model=MODEL,
    variables=variables,
    split=split,
    source=source,
  )


def _direct(batch, variables=VARIABLES):
  return np.asarray(MODEL.apply(variables, batch.images, method="extract"))


def _assert_features(found, expected):
  # float16 has 11 significant bits.
  assert found.images is None
  assert found.features.dtype == np.float16
  np.testing.assert_allclose(found.features, expected, rtol=1e-3, atol=1e-6)


def test_first_look_computes_and_the_next_ones_read(tmp_path):
  cache = _open(tmp_path)
  _assert_features(cache.attach(BATCH), _direct(BATCH))
  _assert_features(cache.attach(OTHER), _direct(BATCH))
  # Another run, images in another order.
  order = [2, 0]
  again = OTHER.replace(
    image_index=BATCH.image_index[order],
    images=OTHER.images[order],
    flip=BATCH.flip[order],
  )
  found = _open(tmp_path).attach(again)
  _assert_features(found, _direct(BATCH)[order])
  assert not np.allclose(_direct(BATCH), _direct(OTHER), rtol=0.1)


def test_what_is_computed_once_equals_what_is_read_later(tmp_path):
  cache = _open(tmp_path)
  first, second = cache.attach(BATCH), cache.attach(BATCH)
  np.testing.assert_array_equal(first.features, second.features)


def test_only_missing_images_are_computed(tmp_path):
  cache = _open(tmp_path)
  cache.attach(BATCH)
  mixed = OTHER.replace(image_index=np.array([1, 4, 0], np.int32))
  expected = _direct(BATCH)[[1, 1, 0]]
  expected[1] = _direct(OTHER)[1]
  _assert_features(cache.attach(mixed), expected)


@pytest.mark.parametrize(
  "change", ["flip", "canvas", "split", "weights", "data"]
)
def test_other_inputs_have_other_rows(tmp_path, change):
  cache, other, variables = _open(tmp_path), OTHER, VARIABLES
  cache.attach(BATCH)
  if change == "flip":
    other = OTHER.replace(flip=~OTHER.flip)
  elif change == "canvas":
    other = OTHER.replace(images=OTHER.images[:, :48])
  elif change == "split":
    cache = _open(tmp_path, split="val")
  elif change == "data":
    cache = _open(tmp_path, source=Images(b"A", b"b", b"c", b"d", b"e"))
  else:
    variables = tiny.make_variables(MODEL, BATCH, seed=1)
    cache = _open(tmp_path, variables=variables)
  _assert_features(cache.attach(other), _direct(other, variables))
  # And the first ones are still there.
  _assert_features(_open(tmp_path).attach(OTHER), _direct(BATCH))


def test_padding_examples_are_zero_and_not_written(tmp_path):
  cache = _open(tmp_path)
  padded = OTHER.replace(image_index=np.array([-1, 1, -1], np.int32))
  expected = _direct(OTHER).copy()
  expected[[0, 2]] = 0
  _assert_features(cache.attach(padded), expected)
  # Image 0, whose row padding shares, is computed when it comes.
  expected = _direct(BATCH).copy()
  expected[1] = _direct(OTHER)[1]
  _assert_features(cache.attach(BATCH), expected)


@pytest.mark.parametrize("suffix", [".f16", ".marks"])
def test_file_of_another_size_is_made_again(tmp_path, suffix):
  _open(tmp_path).attach(OTHER)
  [path] = tmp_path.rglob(f"*{suffix}")
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  _assert_features(_open(tmp_path).attach(BATCH), _direct(BATCH))
  assert path.stat().st_size == len(content)


def test_split_that_has_grown_is_made_again(tmp_path):
  _open(tmp_path).attach(OTHER)
  grown = Images(b"a", b"b", b"c", b"d", b"e", b"f")
  cache = _open(tmp_path, source=grown)
  _assert_features(cache.attach(BATCH), _direct(BATCH))


def test_cache_bytes_is_the_size_of_the_files(tmp_path):
  _open(tmp_path).attach(BATCH)
  [path] = tmp_path.rglob("*.f16")
  found = cache_bytes(MODEL, VARIABLES, canvases=(tiny.CANVAS,), num_images=5)
  # Both ways round, 8 x 8 cells of 8 channels of 2 bytes.
  assert found == path.stat().st_size == 2 * 5 * 64 * 8 * 2
  two = cache_bytes(
    MODEL, VARIABLES, canvases=(tiny.CANVAS, (32, 64)), num_images=5
  )
  assert two == found * 3 // 2
