"""Tests of reading a store."""

from __future__ import annotations

import json
import pickle
import random

import pytest

from jtsm_jax.proposals import generate, record_format, store
from jtsm_jax.types import InputError
from tests.data.array_records_test import files_no_longer_than
from tests.proposals.fill_store_test import Images, expected, fill, make_source
from tests.proposals.record_format_test import assert_equal, random_proposals


def test_round_trip_of_a_folder(tmp_path):
  source = make_source()
  done = fill(source, tmp_path)
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
  fill(make_source(1), tmp_path)
  with pytest.raises(InputError, match=r"no proposals for image 'im-9'"):
    store.open_store(tmp_path).get("im-9")


def test_corrupt_record_is_named(tmp_path):
  fill(make_source(2), tmp_path)
  good = record_format.encode_proposals("im-0", random_proposals())
  shard = tmp_path / "proposals-0000-00000.array_record"
  store.write_shard(shard, [("im-0", good), ("im-1", good[:-9])])
  found = store.open_store(tmp_path)
  found.get("im-0")
  with pytest.raises(InputError, match=r"'im-1' is damaged.*delete the folder"):
    found.get("im-1")
  store.write_shard(shard, [("im-7", good)])
  with pytest.raises(InputError, match=r"belongs to image 'im-0'"):
    store.open_store(tmp_path).get("im-7")


def test_a_full_disk_is_told(tmp_path):
  path = tmp_path / "proposals-0000-00000.array_record"
  message = f"{path}: cannot be written .*File too large"
  content = random.Random(0).randbytes(99_000)
  with files_no_longer_than(90_000), pytest.raises(InputError, match=message):
    store.write_shard(path, [("im-0", content)])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_shard_is_named(tmp_path, damage):
  fill(make_source(3), tmp_path)
  shard = tmp_path / "proposals-0000-00000.array_record"
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
  with pytest.raises(InputError, match=r"0000-00000.*delete the folder"):
    store.open_store(tmp_path).get("im-0")


def test_a_store_is_of_one_setting_and_version(tmp_path):
  fill(make_source(1), tmp_path)
  with pytest.raises(InputError, match=r"max_proposals.*delete the folder"):
    fill(make_source(1), tmp_path, generate.ProposalSettings())
  file = tmp_path / "settings.json"
  content = json.loads(file.read_text())
  file.write_text(json.dumps(content | {"format": "0"}))
  with pytest.raises(InputError, match=r"format is '0'"):
    store.open_store(tmp_path)
  file.write_text("{")
  with pytest.raises(InputError, match=r"settings.json is damaged"):
    store.open_store(tmp_path)


def test_missing_and_empty_stores(tmp_path):
  with pytest.raises(InputError, match=r"run the propose mode"):
    store.open_store(tmp_path / "nowhere")
  fill(Images(), tmp_path)
  with pytest.raises(InputError, match=r"it is empty"):
    store.open_store(tmp_path)
