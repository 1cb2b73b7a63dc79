"""Random numbers belong to images, not to places in a batch."""

import jax
import numpy as np

from jtsm_jax.train.random_keys import (
  AUGMENT,
  CELLS,
  INSTANCES,
  NECK,
  dropout_keys,
  image_keys,
)

KEY = jax.random.key(4)


def _data(step, images, stream, *, key=KEY):
  keys = image_keys(key, step, np.array(images, np.int32), stream=stream)
  return [tuple(row) for row in jax.random.key_data(keys).tolist()]


def test_an_image_has_its_key_wherever_it_stands():
  whole = _data(3, [7, 2, 9, -1], NECK)
  assert len(set(whole)) == 4
  assert _data(3, [9], NECK) == whole[2:3]
  assert _data(3, [-1, 2], NECK) == [whole[3], whole[1]]


def test_steps_streams_and_runs_differ():
  found = [
    _data(step, [5], stream, key=key)[0]
    for key in (KEY, jax.random.key(5))
    for step in (0, 1, 2)
    for stream in (NECK, INSTANCES, AUGMENT, CELLS)
  ]
  assert len(set(found)) == len(found)


def test_dropout_has_a_stream_for_each_part():
  images = np.array([5, 8], np.int32)
  found = dropout_keys(KEY, 3, images)
  for keys, stream in ((found.neck, NECK), (found.cells, CELLS)):
    wanted = image_keys(KEY, 3, images, stream=stream)
    np.testing.assert_array_equal(
      jax.random.key_data(keys), jax.random.key_data(wanted)
    )
