"""Tests of JSON files from strangers."""

import pytest

from jtsm_jax.data.json_files import json_field, json_key, read_json
from jtsm_jax.types import InputError


def test_json_with_a_byte_order_mark_and_with_twins(tmp_path):
  path = tmp_path / "a.json"
  path.write_bytes(b'\xef\xbb\xbf{"a": {"b": 1, "b": 2}}')
  assert read_json(path) == {"a": {"b": 2}}
  with pytest.raises(InputError, match=r"a\.json: the key 'b' occurs twice"):
    read_json(path, unique_keys=True)
  path.write_text("[" * 100_000)
  with pytest.raises(InputError, match="is no readable JSON"):
    read_json(path)


def test_fields_are_there_and_of_their_type(tmp_path):
  entry = {"id": 7, "name": "x" * 100}
  assert json_field(entry, "id", tmp_path, "an image", kind=int) == 7
  with pytest.raises(InputError, match=r"an image has no 'size'; found \['id'"):
    json_field(entry, "size", tmp_path, "an image")
  with pytest.raises(InputError, match="an image has no 'size'; found 3"):
    json_field(3, "size", tmp_path, "an image")
  with pytest.raises(InputError, match=r"'xx+\.\.\.; it must .* type int") as e:
    json_field(entry, "name", tmp_path, "an image", kind=int)
  assert "x" * 60 not in str(e.value)


def test_what_can_be_no_key():
  assert [json_key(v) for v in (3, "a", 2.5)] == [3, "a", 2.5]
  assert [json_key(v) for v in ([1], {}, None)] == [None] * 3
