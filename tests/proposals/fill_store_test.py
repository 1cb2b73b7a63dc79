"""Tests of filling a store."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import pickle
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jtsm_jax import workers
from jtsm_jax.data import files
from jtsm_jax.proposals import fill_store as lib
from jtsm_jax.proposals import generate, store
from jtsm_jax.types import InputError, Record
from tests.proposals.record_format_test import assert_equal

SETTINGS = generate.preset_settings(
  "fast", num_superpixels=12, max_proposals=20
)


class Images(list):
  """Records with what a source has."""

  @property
  def image_ids(self):
    return tuple(r.image_id for r in self)


def png(seed):
  rng = np.random.default_rng(seed)
  image = np.full((20, 24, 3), 90, np.uint8)
  image[5:15, 6:18] = rng.integers(0, 256, 3)
  return cv2.imencode(".png", image)[1].tobytes()


def make_source(count=5, broken=()):
  return Images(
    Record(
      image_id=f"im-{n}",
      image=b"not an image" if n in broken else png(n),
      height=20,
      width=24,
      tags=(),
    )
    for n in range(count)
  )


def fill(source, path, settings=SETTINGS, **options):
  options = dict(num_workers=0, report=lambda _: None) | options
  return lib.fill_store(source, path, lib.generator(settings), **options)


def expected(record):
  image = cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR)
  return generate.propose(np.ascontiguousarray(image[..., ::-1]), SETTINGS)


def test_shards_and_resume_make_only_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(lib, "SHARD_SIZE", 2)
  monkeypatch.setattr(store, "MAX_OPEN_SHARDS", 1)
  source = make_source(7)
  calls = []
  real = generate.propose

  def counted(image, settings):
    if len(calls) == 5:
      raise KeyboardInterrupt
    calls.append(1)
    return real(image, settings)

  monkeypatch.setattr(generate, "propose", counted)
  with pytest.raises(KeyboardInterrupt):
    fill(source, tmp_path)
  assert len(store.open_store(tmp_path)) == 5  # the interrupted shard too

  # What a kill leaves: a shard that was not renamed.
  stale = "proposals-0000-00003.array_record.partial-1"
  (tmp_path / stale).write_bytes(b"half")
  monkeypatch.setattr(generate, "propose", real)
  assert len(store.open_store(tmp_path)) == 5
  done = fill(source, tmp_path)
  assert (done.made, done.kept) == (2, 5)
  assert not list(tmp_path.glob("*.partial-*"))
  found = store.open_store(tmp_path)
  assert sorted(found.ids) == [r.image_id for r in source]
  for record in source:
    assert_equal(found.get(record.image_id), expected(record))
  done = fill(source, tmp_path)
  assert (done.made, done.kept) == (0, 7)


def test_worker_processes_give_the_same(tmp_path):
  source = make_source(3)
  fill(source, tmp_path, num_workers=1)
  found = store.open_store(tmp_path)
  for record in source:
    assert_equal(found.get(record.image_id), expected(record))


class Killed(concurrent.futures.ThreadPoolExecutor):
  """A pool whose processes the system has killed."""

  def submit(self, *_):
    raise BrokenProcessPool


@pytest.mark.parametrize(
  ("num_workers", "remedy"),
  [
    (16, "--config.proposals.num_workers=8"),
    (2, "--config.proposals.num_workers=1"),
    (1, "a smaller --config.proposals.max_side"),
  ],
)
def test_what_helps_where_the_memory_is_too_small(
  tmp_path, monkeypatch, num_workers, remedy
):
  def start(number):
    return contextlib.nullcontext(Killed())

  monkeypatch.setattr(workers, "start_processes", start)
  with pytest.raises(InputError, match=f"want of memory; give {remedy} and"):
    fill(make_source(), tmp_path, num_workers=num_workers)


def test_one_bad_image_is_quarantined_and_tried_again(tmp_path):
  messages = []
  done = fill(make_source(broken=[2]), tmp_path, report=messages.append)
  assert (done.made, done.quarantined) == (4, ("im-2",))
  assert len(messages) == 1
  assert "im-2" in messages[0]
  lines = (tmp_path / "quarantine-0000.txt").read_text().splitlines()
  assert [line.split("\t")[0] for line in lines] == ["im-2"]
  done = fill(make_source(), tmp_path)  # repaired by the user
  assert (done.made, done.kept, done.quarantined) == (1, 4, ())
  assert not (tmp_path / "quarantine-0000.txt").exists()


def test_too_many_bad_images_stop_the_run(tmp_path):
  with pytest.raises(InputError, match=r"2 images of 5 got no proposals"):
    fill(make_source(broken=[1, 3]), tmp_path)
  assert store.open_store(tmp_path).ids == ("im-0", "im-2")
  done = fill(make_source(broken=[1, 3]), tmp_path, max_bad_fraction=0.5)
  assert done.quarantined == ("im-1", "im-3")


def test_duplicate_ids_are_refused(tmp_path):
  source = make_source(2)
  with pytest.raises(InputError, match=r"'im-0' occurs twice"):
    fill(Images([*source, source[0]]), tmp_path)


def test_second_writer_is_refused(tmp_path):
  with (
    lib._locked(tmp_path, 0),
    pytest.raises(InputError, match=r"another run is doing shard 0"),
  ):
    fill(make_source(1), tmp_path)


def test_runs_that_need_nothing_do_not_wait_for_one_another(tmp_path):
  fill(make_source(2), tmp_path)
  with lib._locked(tmp_path, 0):
    assert fill(make_source(2), tmp_path).kept == 2


def test_the_first_shard_may_be_written_while_another_is(tmp_path):
  with lib._locked(tmp_path, 1):
    fill(make_source(1), tmp_path)


def test_shards_share_the_work(tmp_path):
  source = make_source(7)
  for shard in (2, 0, 1):
    done = fill(source, tmp_path, shard=shard, num_shards=3)
    assert done.made == (2, 2, 3)[shard]
  found = store.open_store(tmp_path)
  for record in source:
    assert_equal(found.get(record.image_id), expected(record))
  assert fill(source, tmp_path).kept == 7


def test_the_images_of_a_shard_are_neighbours(tmp_path):
  source = make_source(5)
  fill(source, tmp_path, shard=1, num_shards=2)
  assert store.open_store(tmp_path).ids == ("im-2", "im-3", "im-4")


def test_a_store_in_a_bucket(bucket, monkeypatch):
  monkeypatch.setattr(lib, "SHARD_SIZE", 2)
  source = make_source(7, broken=[1])
  done = fill(source, bucket, shard=1, num_shards=2)
  assert (done.made, done.kept) == (4, 0)
  done = fill(source, bucket, shard=0, num_shards=2)
  assert done.quarantined == ("im-1",)
  lines = files.read_file(bucket / "quarantine-0000.txt").decode()
  assert lines.startswith("im-1\t")
  found = store.open_store(bucket)
  for record in source[:1] + source[2:]:
    assert_equal(found.get(record.image_id), expected(record))
  copy = pickle.loads(pickle.dumps(found))
  assert_equal(copy.get("im-3"), expected(source[3]))
  # A shard knows its own files, a run without shards all of them.
  done = fill(source, bucket, shard=1, num_shards=2)
  assert (done.made, done.kept) == (0, 4)
  assert fill(make_source(7), bucket).made == 1
  assert len(store.open_store(bucket)) == 7
  with pytest.raises(InputError, match=r"max_proposals.*delete the folder"):
    fill(source, bucket, generate.ProposalSettings())


def test_two_runs_of_one_shard_in_a_bucket_lose_nothing(bucket, monkeypatch):
  """There is no lock; here each thinks that it begins."""
  monkeypatch.setattr(lib, "SHARD_SIZE", 2)
  source, real = make_source(5), generate.propose

  def overtaken(*args):
    monkeypatch.setattr(generate, "propose", real)
    assert fill(Images(source[:3]), bucket).made == 3
    return real(*args)

  monkeypatch.setattr(generate, "propose", overtaken)
  assert fill(source, bucket).made == 5
  found = store.open_store(bucket)
  for record in source:
    assert_equal(found.get(record.image_id), expected(record))


def test_a_bucket_that_fails_on_the_way(bucket, monkeypatch):
  monkeypatch.setattr(lib, "SHARD_SIZE", 2)
  source, written = make_source(5), []
  real = MemoryFileSystem.put_file

  def put_file(self, draft, path, **kwargs):
    if len(written) == 2:
      raise ConnectionError("reset by peer")
    written.append(path)
    real(self, draft, path, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(MemoryFileSystem, "put_file", put_file)
    with pytest.raises(InputError, match=r"cannot be written .*reset by peer"):
      fill(source, bucket)
  done = fill(source, bucket)
  assert (done.made, done.kept) == (3, 2)


@pytest.mark.parametrize(("shard", "num_shards"), [(-1, 2), (2, 2), (0, 0)])
def test_impossible_shards(tmp_path, shard, num_shards):
  with pytest.raises(InputError, match="num_shards"):
    fill(make_source(1), tmp_path, shard=shard, num_shards=num_shards)


def test_proposals_of_another_image_are_quarantined(tmp_path):
  source = make_source(2)
  source[1] = dataclasses.replace(source[1], height=21)
  done = fill(source, tmp_path)
  assert done.quarantined == ("im-1",)
  text = (tmp_path / "quarantine-0000.txt").read_text()
  assert "20 x 24 pixels, it has 21 x 24" in text


def test_keys_depend_on_the_settings():
  other = generate.preset_settings("fast", max_proposals=21)
  assert lib.generator(SETTINGS).key == generate.settings_key(SETTINGS)
  assert lib.generator(SETTINGS).key != lib.generator(other).key
