"""Tests of the batches: content, padding, determinism and resume."""

import gc
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from jtsm_jax.data import pipeline, prepared, sampling
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.source import Source
from jtsm_jax.types import (
  Categories,
  InputError,
  Proposals,
  Record,
  pack_members,
)

CATEGORIES = Categories.from_list(
  [
    {"id": i, "name": name, "isthing": i < 2}
    for i, name in enumerate(["cow", "dog", "sky"])
  ]
)
SIZES = [(6, 8), (8, 6), (6, 8), (5, 5), (8, 6), (6, 8), (6, 8)]
TAGS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
CANVASES = ((12, 16), (16, 12), (18, 24))


def pixels(i):
  return (
    np.random.default_rng(i).integers(0, 256, (*SIZES[i], 3)).astype(np.uint8)
  )


def encode(i):
  data = io.BytesIO()
  Image.fromarray(pixels(i)).save(data, format="PNG")
  return data.getvalue()


def proposals_of(i, *, count=3):
  """Left and right halves, then `count` - 1 times the right half alone."""
  height, width = SIZES[i]
  superpixels = np.zeros((height, width), np.int32)
  superpixels[:, width // 2 :] = 1
  membership = np.array([[True, True]] + [[False, True]] * (count - 1))
  boxes = np.array(
    [[0, 0, height, width]] + [[0, width // 2, height, width]] * (count - 1)
  )
  return Proposals(
    superpixels,
    pack_members(membership),
    boxes,
    -np.arange(count, dtype=np.float32),
  )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data") / "set"
  records = [
    Record(f"image{i}", encode(i), 0, 0, TAGS[i]) for i in range(len(SIZES))
  ]
  prepare(Source("s", CATEGORIES, {"train": records}), directory)
  return prepared.open_prepared(directory).splits["train"]


STORE = {f"image{i}": proposals_of(i) for i in range(len(SIZES))}
STATIC = dict(batch_size=2, max_proposals=4, max_superpixels=5)


def start(source, store=STORE, **options):
  settings = dict(seed=1, canvases=CANVASES, num_steps=14, **STATIC)
  return pipeline.make_pipeline(source, store, **(settings | options))


def assert_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_batches_follow_the_plan(source):
  steps = list(start(source))
  assert [step for step, _ in steps] == list(range(14))
  for step, batch in steps:
    plan = sampling.batch_plan(
      step, seed=1, sizes=source.sizes, canvases=CANVASES, batch_size=2
    )
    np.testing.assert_array_equal(batch.image_index, plan.indices)
    np.testing.assert_array_equal(batch.flip, plan.flips)
    assert batch.images.shape == (2, *plan.canvas, 3)
    assert batch.images.dtype == np.uint8
    assert batch.superpixels.shape == (2, *plan.canvas)
    assert batch.superpixels.dtype == np.int16
    assert batch.membership.shape == (2, 4, 5)
    assert batch.boxes.shape == (2, 4, 4)
    assert batch.boxes.dtype == np.float32
    assert batch.features is None


def test_content_by_hand(source):
  # All canvases are whole multiples of the 6 x 8 and 8 x 6 images.
  seen = set()
  for _, batch in start(source):
    for b, i in enumerate(batch.image_index.tolist()):
      wanted = np.zeros(3)
      wanted[list(TAGS[i])] = 1
      np.testing.assert_array_equal(batch.tags[b], wanted)
      np.testing.assert_array_equal(batch.valid[b], [1, 1, 1, 0])
      np.testing.assert_array_equal(
        batch.membership[b, :3, :2], proposals_of(i).membership
      )
      assert not batch.membership[b, 3].any()
      assert not batch.membership[b, :, 2:].any()
      np.testing.assert_array_equal(batch.boxes[b, 3], [0, 0, 1, 1])
      height, width = batch.size[b]
      np.testing.assert_array_equal(batch.boxes[b, 0], [0, 0, height, width])
      if SIZES[i] == (5, 5):
        continue
      factor = height // SIZES[i][0]
      big = proposals_of(i).superpixels.repeat(factor, 0).repeat(factor, 1)
      x0, x1 = (0, width / 2) if batch.flip[b] else (width / 2, width)
      np.testing.assert_array_equal(batch.boxes[b, 1], [0, x0, height, x1])
      np.testing.assert_array_equal(
        batch.superpixels[b], big[:, ::-1] if batch.flip[b] else big
      )
      picture = batch.images[b]
      if batch.flip[b]:
        picture = picture[:, ::-1]
      if factor in (2, 3):  # Linear enlargement keeps the mean of the corners.
        corner = pixels(i)[0, 0]
        np.testing.assert_allclose(picture[0, 0], corner, atol=1)
      seen.add((i, bool(batch.flip[b])))
  assert len(seen) > 6


def test_images_on_canvas_are_those_of_the_batch(source):
  for _, batch in start(source):
    indices = batch.image_index.copy()
    indices[1] = -1
    plan = sampling.BatchPlan(
      batch.images.shape[1:3], indices, batch.flip, batch.window
    )
    images = pipeline.images_on_canvas(plan, source)
    np.testing.assert_array_equal(images[0], batch.images[0])
    assert not images[1].any()


def test_two_runs_are_equal_whatever_the_threads(source):
  one = list(start(source, colour_factor=1.5, num_threads=1, prefetch=1))
  two = list(start(source, colour_factor=1.5, num_threads=4, prefetch=9))
  assert_equal(one, two)


def test_start_step_continues_the_run(source):
  steps = list(start(source, colour_factor=1.5))
  assert_equal(steps[9:], list(start(source, start_step=9, colour_factor=1.5)))


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 17, 49])
def test_state_resumes_exactly(source, stop):
  """The next 50 batches, over several epochs, ids and bytes."""
  options = dict(colour_factor=1.5, crop=0.7, num_steps=stop + 50)
  iterator = start(source, **options)
  for _ in range(stop):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  wanted = list(iterator)
  assert len(wanted) == 50
  resumed = start(source, **options)
  next(resumed)
  resumed.set_state(state)
  found = list(resumed)
  assert [step for step, _ in found] == list(range(stop, stop + 50))
  assert_equal(wanted, found)
  assert isinstance(iterator, grain.DatasetIterator)


@pytest.fixture
def no_garbage():
  """Python 3.13.0 complains of semaphores that it frees as it starts others."""
  gc.collect()
  gc.disable()
  yield
  gc.enable()
  gc.collect()


def test_worker_processes_change_nothing(source, no_garbage):
  flags.FLAGS.mark_as_parsed()  # grain's workers read them
  expected = list(start(source, colour_factor=1.5))
  options = dict(colour_factor=1.5, num_workers=2, num_threads=1)
  steps = start(source, **options)
  found = [next(steps) for _ in range(5)]
  state = steps.get_state()
  found += list(steps)
  again = start(source, **options)
  again.set_state(json.loads(json.dumps(state)))
  resumed = list(again)
  steps.close()
  again.close()
  for part, wanted in ((found, expected), (resumed, expected[5:])):
    assert [step for step, _ in part] == [step for step, _ in wanted]
    for (_, a), (_, b) in zip(part, wanted, strict=True):
      assert_equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_none_that_makes_batches(
  source, number, no_garbage
):
  """Ctrl-C is sent to the whole group; the run saves and ends them itself."""
  flags.FLAGS.mark_as_parsed()  # grain's workers read them
  before = set(multiprocessing.active_children())
  steps = start(source, num_steps=40, num_workers=2, num_threads=1)
  found = [next(steps), next(steps)]  # one from each: both have begun
  workers = set(multiprocessing.active_children()) - before
  assert len(workers) == 2
  for worker in workers:
    os.kill(worker.pid, number)
  found += list(steps)
  steps.close()
  assert_equal(found, list(start(source, num_steps=40)))


PROCESS = """
import sys
import jax
from jtsm_jax.data.pipeline import make_pipeline
from jtsm_jax.data.prepared import open_prepared
directory, port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
steps = make_pipeline(
  open_prepared(directory).splits["train"], {}, seed=1, canvases=((24, 24),),
  batch_size=2, max_proposals=1, max_superpixels=1, num_steps=6,
  process_index=jax.process_index(), process_count=jax.process_count())
for step, batch in steps:
  print(step, *batch.image_index.tolist())
"""


def test_two_processes_on_loopback_read_the_epoch(tmp_path):
  records = [Record(f"i{n}", encode(0), 0, 0, TAGS[0]) for n in range(12)]
  prepare(Source("s", CATEGORIES, {"train": records}), tmp_path / "set")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, tmp_path / "set", str(port), str(k)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    for k in range(2)
  ]
  read = []
  for process in processes:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    rows = [[int(n) for n in line.split()] for line in out.splitlines()]
    assert [row[0] for row in rows] == list(range(6))
    read.append({i for _, *indices in rows for i in indices})
  assert len(read[0]) == len(read[1]) == 6
  assert read[0] | read[1] == set(range(12))


def test_processes_share_a_batch(source):
  whole = list(start(source, batch_size=4, colour_factor=1.5))
  parts = [
    list(
      start(
        source,
        batch_size=4,
        colour_factor=1.5,
        process_index=k,
        process_count=2,
      )
    )
    for k in range(2)
  ]
  for (step, batch), (_, first), (_, second) in zip(whole, *parts, strict=True):
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
    assert_equal(batch, joined)
    assert isinstance(step, int)


def test_crops_show_parts_of_the_same_images(source):
  """Pixels, superpixels, boxes and tags of each window, from its numbers."""
  some_cut = 0
  for (_, plain), (_, batch) in zip(
    start(source), start(source, crop=0.4), strict=True
  ):
    np.testing.assert_array_equal(batch.image_index, plain.image_index)
    np.testing.assert_array_equal(batch.flip, plain.flip)
    np.testing.assert_array_equal(batch.tags, plain.tags)
    for b, i in enumerate(batch.image_index.tolist()):
      y0, x0, y1, x1 = batch.window[b]
      h, w = SIZES[i]
      assert 0 <= y0 < y1 <= h
      assert 0 <= x0 < x1 <= w
      assert y1 - y0 >= round(0.4 * h)
      assert x1 - x0 >= round(0.4 * w)
      np.testing.assert_array_equal(plain.window[b], [0, 0, h, w])
      height, width = batch.size[b]
      assert height == batch.superpixels.shape[1] or (
        width == batch.superpixels.shape[2]
      )
      rows = (np.arange(height) + 0.5) * (y1 - y0) / height
      columns = (np.arange(width) + 0.5) * (x1 - x0) / width
      part = proposals_of(i).superpixels[y0:y1, x0:x1]
      part = part[rows.astype(int)][:, columns.astype(int)]
      if batch.flip[b]:
        part = part[:, ::-1]
      shown = batch.superpixels[b, :height, :width]
      np.testing.assert_array_equal(shown, part)
      for p in range(3):
        mask = np.asarray(batch.membership[b, p])[shown]
        assert batch.valid[b, p] == mask.any()
        box = [0, 0, 1, 1]
        if mask.any():
          y, x = np.nonzero(mask)
          box = [y.min(), x.min(), y.max() + 1, x.max() + 1]
        np.testing.assert_allclose(batch.boxes[b, p], box, atol=0.5 + 1e-5)
        some_cut += not mask.any()
      mean = pixels(i)[y0:y1, x0:x1].mean()
      image = batch.images[b, :height, :width]
      assert abs(image.mean() - mean) < 12
  assert some_cut


def test_a_proposal_that_a_small_canvas_loses_is_not_valid(source):
  """Of 8 columns every other one is left: a segment in between is not."""
  superpixels = np.zeros((6, 8), np.int32)
  superpixels[:, 4] = 1
  proposals = Proposals(
    superpixels,
    pack_members(np.array([[True, False], [False, True], [True, True]])),
    np.array([[0, 0, 6, 8], [0, 4, 6, 5], [0, 0, 6, 8]]),
    np.zeros(3, np.float32),
  )
  plan = sampling.BatchPlan(
    indices=np.array([0, 0]),
    canvas=(3, 4),
    flips=np.array([False, False]),
    windows=np.array([[0, 0, 6, 8]] * 2),
    colours=None,
  )
  batch = pipeline.make_batch(
    plan,
    source,
    lambda image_id, size: proposals,
    max_proposals=4,
    max_superpixels=5,
    load_images=False,
  )
  assert not (batch.superpixels == 1).any()
  assert batch.valid[0].tolist() == [True, False, True, False]
  np.testing.assert_array_equal(batch.boxes[0, 1], [0, 0, 1, 1])


@pytest.mark.parametrize("crop", [0, -1, 1.01])
def test_impossible_crop(source, crop):
  with pytest.raises(ValueError, match=r"crop is .*\(0, 1\]"):
    start(source, crop=crop)


def test_each_image_has_colours_of_its_own(source):
  plain = list(start(source))
  found = list(start(source, colour_factor=1.5))
  for (_, a), (_, b) in zip(plain, found, strict=True):
    assert a.colour is None
    assert b.colour.dtype == np.float32
    assert_equal(a, b.replace(colour=None))
  factors = np.stack([batch.colour for _, batch in found])
  assert len(np.unique(factors)) == factors.size
  assert factors.min() >= 1 / 1.5
  assert factors.max() <= 1.5


def test_darker_is_as_likely_as_brighter():
  plans = [
    sampling.batch_plan(
      step,
      seed=0,
      sizes=np.array(SIZES),
      canvases=CANVASES,
      batch_size=8,
      colour_factor=1.5,
    )
    for step in range(100)
  ]
  logs = np.log([plan.colours for plan in plans]) / np.log(1.5)
  assert np.abs(logs).max() > 0.99
  assert np.abs(logs.mean((0, 1))).max() < 0.07
  assert np.abs(np.abs(logs).mean((0, 1)) - 0.5).max() < 0.05


@pytest.mark.parametrize("factor", [0.9, 0, -1])
def test_impossible_colour_factor(source, factor):
  with pytest.raises(ValueError, match=f"colour_factor is {factor}"):
    start(source, colour_factor=factor)


def test_without_images_no_record_is_read(source):
  class NoReading:
    sizes, tags, image_ids = source.sizes, source.tags, source.image_ids

    def __len__(self):
      return len(self.image_ids)

  with_images = list(start(source))
  without = list(start(NoReading(), load_images=False))
  for (_, a), (_, b) in zip(with_images, without, strict=True):
    assert b.images is None
    assert_equal(a.replace(images=None), b)


def test_best_proposals_are_kept(source):
  store = {f"image{i}": proposals_of(i, count=9) for i in range(len(SIZES))}
  _, batch = next(start(source, store))
  assert batch.valid.all()
  np.testing.assert_array_equal(
    batch.membership[0, :, :2], proposals_of(0, count=4).membership
  )


def test_image_without_proposals_is_one_proposal(source, capsys):
  store = {k: v for k, v in STORE.items() if k != "image3"}
  batches = [batch for _, batch in start(source, store)]
  places = [
    (batch, b)
    for batch in batches
    for b, i in enumerate(batch.image_index)
    if i == 3
  ]
  assert len(places) > 1
  for batch, b in places:
    height, width = batch.size[b]
    assert batch.valid[b].tolist() == [True, False, False, False]
    assert batch.membership[b].sum() == 1
    assert batch.membership[b, 0, 0]
    np.testing.assert_array_equal(batch.boxes[b, 0], [0, 0, height, width])
    assert (batch.superpixels[b, :height, :width] == 0).all()
  assert capsys.readouterr().err.count("'image3' has no proposals") == 1


def test_too_many_superpixels(source):
  with pytest.raises(InputError, match=r"2 superpixels.*max_superpixels=1"):
    list(start(source, max_superpixels=1))


def test_more_superpixels_than_fit(source):
  with pytest.raises(ValueError, match="32768, must be at most 32767"):
    next(start(source, max_superpixels=32768))


def test_proposals_of_another_image_size(source):
  store = STORE | {f"image{i}": proposals_of(1) for i in (0, 2, 5, 6)}
  with pytest.raises(InputError, match=r"\(8, 6\).*\(6, 8\).*again"):
    list(start(source, store))


@pytest.mark.parametrize("k_of_n", [(0, 3), (2, 2), (-1, 2)])
def test_wrong_process(source, k_of_n):
  with pytest.raises(ValueError, match="number of processes"):
    start(source, process_index=k_of_n[0], process_count=k_of_n[1])


def test_wrong_arguments_fail_at_once(source):
  with pytest.raises(ValueError, match="canvases is empty"):
    start(source, canvases=())


def infer(source, **options):
  settings = dict(canvases=CANVASES, **STATIC) | options
  return list(pipeline.inference_batches(source, STORE, **settings))


def test_inference_shows_each_image_in_its_views(source):
  batches = infer(source)
  found = [b.image_index.tolist() for b in batches]
  landscape = [[0, 2]] * 2 + [[3, 5]] * 2 + [[6, -1]] * 2
  assert found == [*landscape, [1, 4]]
  shapes = [b.images.shape[1:3] for b in batches]
  assert shapes == [(12, 16), (18, 24)] * 3 + [(16, 12)]
  padding = batches[4]
  assert not padding.valid[1].any()
  assert not padding.tags[1].any()
  assert (padding.superpixels[1] == -1).all()
  assert padding.valid[0].any()
  assert not any(b.flip.any() for b in batches)


def test_inference_flip_mirrors(source):
  batches = infer(source, flips=(False, True))
  assert len(batches) == 14
  for plain, mirrored in zip(batches[::2], batches[1::2], strict=True):
    assert mirrored.flip.all()
    for b, (_, width) in enumerate(plain.size):
      if plain.image_index[b] < 0:
        continue
      np.testing.assert_array_equal(
        plain.superpixels[b, :, :width],
        mirrored.superpixels[b, :, :width][:, ::-1],
      )
      np.testing.assert_array_equal(
        plain.images[b, :, :width], mirrored.images[b, :, :width][:, ::-1]
      )


def test_inference_by_two_processes(source):
  whole = infer(source)
  first, second = (
    infer(source, process_index=k, process_count=2) for k in range(2)
  )
  for batch, a, b in zip(whole, first, second, strict=True):
    assert_equal(batch, jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b))
