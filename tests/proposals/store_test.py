"""Tests of the proposal store."""

from __future__ import annotations

import dataclasses
import json
import pickle

import cv2
import numpy as np
import pytest

from jtsm_jax.proposals import generate, store
from jtsm_jax.types import InputError, Proposals, Record

SETTINGS = generate.preset_settings(
  "fast", num_superpixels=12, max_proposals=20
)


def png(seed):
  rng = np.random.default_rng(seed)
  image = np.full((20, 24, 3), 90, np.uint8)
  image[5:15, 6:18] = rng.integers(0, 256, 3)
  return cv2.imencode(".png", image)[1].tobytes()


def make_source(count=5, broken=()):
  return [
    Record(
      image_id=f"im-{n}",
      image=b"not an image" if n in broken else png(n),
      height=20,
      width=24,
      tags=(),
    )
    for n in range(count)
  ]


def propose(source, path, **options):
  options = dict(settings=SETTINGS, num_workers=0, report=lambda _: None) | (
    options
  )
  return store.propose_all(source, path, **options)


def assert_equal(a, b):
  for field in dataclasses.fields(Proposals):
    x, y = getattr(a, field.name), getattr(b, field.name)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def expected(record):
  image = cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR)
  return generate.propose(np.ascontiguousarray(image[..., ::-1]), SETTINGS)


def random_proposals(height=7, width=9, count=5, superpixels=11):
  rng = np.random.default_rng(0)
  boxes = np.stack(
    [
      rng.integers(0, 3, count),
      rng.integers(0, 4, count),
      rng.integers(4, height + 1, count),
      rng.integers(5, width + 1, count),
    ],
    1,
  )
  return Proposals(
    superpixels=rng.integers(0, superpixels, (height, width)).astype(np.int32),
    membership=rng.random((count, superpixels)) < 0.5,
    boxes=boxes.astype(np.int32),
    scores=np.sort(rng.random(count).astype(np.float32))[::-1].copy(),
  )


@pytest.mark.parametrize("superpixels", [1, 8, 11, 3000])
@pytest.mark.parametrize("count", [1, 5])
def test_encoding_is_exact(superpixels, count):
  proposals = random_proposals(superpixels=superpixels, count=count)
  data = store.encode_proposals("a/ü", proposals)
  image_id, found = store.decode_proposals(data)
  assert image_id == "a/ü"
  assert_equal(found, proposals)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(superpixels=np.full((7, 9), 11, np.int32)), "superpixel ids"),
    (dict(superpixels=np.full((7, 9), -1, np.int32)), "superpixel ids"),
    (dict(boxes=np.full((5, 4), 3, np.int32)), "a box is empty"),
    (dict(boxes=np.tile([0, 0, 8, 9], (5, 1)).astype(np.int32)), "a box"),
    (dict(boxes=np.zeros((4, 4), np.int32)), "boxes are"),
    (dict(scores=np.full(5, np.nan, np.float32)), "not finite"),
  ],
)
def test_impossible_proposals_are_not_written(change, message):
  proposals = dataclasses.replace(random_proposals(), **change)
  with pytest.raises(ValueError, match=message):
    store.encode_proposals("x", proposals)


def test_every_damaged_byte_is_noticed_or_harmless():
  """No damage may pass as other proposals or raise another error."""
  proposals = random_proposals()
  data = store.encode_proposals("x", proposals)
  for n in range(len(data)):
    damaged = data[:n] + bytes([data[n] ^ 0x41]) + data[n + 1 :]
    try:
      found = store.decode_proposals(damaged)[1]
    except ValueError:
      continue
    # Only the header's texts (id, version) carry no check of their own; the
    # store compares the id with its index.
    assert_equal(found, proposals)
  for n in range(len(data)):
    with pytest.raises(ValueError, match=r"."):
      store.decode_proposals(data[:n])


def test_round_trip_of_a_folder(tmp_path):
  source = make_source()
  done = propose(source, tmp_path)
  assert (done.made, done.kept, done.quarantined) == (5, 0, ())
  with store.open_store(tmp_path) as found:
    assert found.ids == tuple(r.image_id for r in source)
    assert "im-2" in found
    assert "im-9" not in found
    for record in reversed(source):
      assert_equal(found.get(record.image_id), expected(record))
    copy = pickle.loads(pickle.dumps(found))
  assert_equal(copy.get("im-3"), expected(source[3]))


def test_unknown_id(tmp_path):
  propose(make_source(1), tmp_path)
  with pytest.raises(InputError, match=r"no proposals for image 'im-9'"):
    store.open_store(tmp_path).get("im-9")


def test_shards_and_resume_make_only_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(store, "SHARD_SIZE", 2)
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
    propose(source, tmp_path)
  assert len(store.open_store(tmp_path)) == 5  # the interrupted shard too

  # What a kill leaves: a shard that was not renamed.
  (tmp_path / "proposals-00003.array_record.tmp").write_bytes(b"half")
  monkeypatch.setattr(generate, "propose", real)
  assert len(store.open_store(tmp_path)) == 5
  done = propose(source, tmp_path)
  assert (done.made, done.kept) == (2, 5)
  assert not list(tmp_path.glob("*.tmp"))
  found = store.open_store(tmp_path)
  assert sorted(found.ids) == [r.image_id for r in source]
  for record in source:
    assert_equal(found.get(record.image_id), expected(record))
  done = propose(source, tmp_path)
  assert (done.made, done.kept) == (0, 7)


def test_worker_processes_give_the_same(tmp_path):
  source = make_source(3)
  propose(source, tmp_path, num_workers=1)
  found = store.open_store(tmp_path)
  for record in source:
    assert_equal(found.get(record.image_id), expected(record))


def test_one_bad_image_is_quarantined_and_tried_again(tmp_path):
  messages = []
  done = propose(make_source(broken=[2]), tmp_path, report=messages.append)
  assert (done.made, done.quarantined) == (4, ("im-2",))
  assert len(messages) == 1
  assert "im-2" in messages[0]
  lines = (tmp_path / "quarantine.txt").read_text().splitlines()
  assert [line.split("\t")[0] for line in lines] == ["im-2"]
  done = propose(make_source(), tmp_path)  # repaired by the user
  assert (done.made, done.kept, done.quarantined) == (1, 4, ())
  assert not (tmp_path / "quarantine.txt").exists()


def test_too_many_bad_images_stop_the_run(tmp_path):
  with pytest.raises(InputError, match=r"2 images of 5 could not be decoded"):
    propose(make_source(broken=[1, 3]), tmp_path)
  assert store.open_store(tmp_path).ids == ("im-0", "im-2")
  done = propose(make_source(broken=[1, 3]), tmp_path, max_bad_fraction=0.5)
  assert done.quarantined == ("im-1", "im-3")


def test_duplicate_ids_are_refused(tmp_path):
  source = make_source(2)
  with pytest.raises(InputError, match=r"'im-0' occurs twice"):
    propose([*source, source[0]], tmp_path)


def test_corrupt_record_is_named(tmp_path):
  propose(make_source(2), tmp_path)
  good = store.encode_proposals("im-0", random_proposals())
  shard = tmp_path / "proposals-00000.array_record"
  store.write_shard(shard, [("im-0", good), ("im-1", good[:-9])])
  found = store.open_store(tmp_path)
  found.get("im-0")
  with pytest.raises(InputError, match=r"'im-1' is damaged.*delete the folder"):
    found.get("im-1")
  store.write_shard(shard, [("im-7", good)])
  with pytest.raises(InputError, match=r"belongs to image 'im-0'"):
    store.open_store(tmp_path).get("im-7")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_shard_is_named(tmp_path, damage):
  propose(make_source(3), tmp_path)
  shard = tmp_path / "proposals-00000.array_record"
  data = bytearray(shard.read_bytes())
  if damage == "flipped":
    data[250:450] = b"\x55" * 200  # within the first record
  damaged = {
    "empty": b"",
    "text": b"hello " * 50,
    "cut": bytes(data[: len(data) // 2]),
    "flipped": bytes(data),
  }[damage]
  shard.write_bytes(damaged)
  with pytest.raises(InputError, match=r"proposals-00000.*delete the folder"):
    store.open_store(tmp_path).get("im-0")


def test_a_store_is_of_one_setting_and_version(tmp_path):
  propose(make_source(1), tmp_path)
  with pytest.raises(InputError, match=r"max_proposals.*delete the folder"):
    propose(make_source(1), tmp_path, settings=generate.ProposalSettings())
  file = tmp_path / "settings.json"
  content = json.loads(file.read_text())
  file.write_text(json.dumps(content | {"version": "0"}))
  with pytest.raises(InputError, match=r"version '0'"):
    store.open_store(tmp_path)
  file.write_text("{")
  with pytest.raises(InputError, match=r"settings.json is damaged"):
    store.open_store(tmp_path)


def test_missing_and_empty_stores(tmp_path):
  with pytest.raises(InputError, match=r"run the propose mode"):
    store.open_store(tmp_path / "nowhere")
  propose([], tmp_path)
  with pytest.raises(InputError, match=r"it is empty"):
    store.open_store(tmp_path)


def test_second_writer_is_refused(tmp_path):
  with (
    store._locked(tmp_path),
    pytest.raises(InputError, match=r"another process is writing"),
  ):
    propose(make_source(1), tmp_path)


def test_store_path_depends_on_settings(tmp_path):
  path = store.store_path(tmp_path, SETTINGS)
  assert path.parent == tmp_path
  assert path.name == generate.settings_key(SETTINGS)
