"""What a pickle names is on the list, or nothing is made of it."""

import io
import pickle

import pytest

from jtsm_jax.backbones.restricted_pickle import Unpickler
from jtsm_jax.types import InputError


def _load(data, allowed):
  return Unpickler(io.BytesIO(data), allowed).load()


class _Call:
  def __init__(self, function, *arguments):
    self.reduced = function, arguments

  def __reduce__(self):
    return self.reduced


def _not_to_be_called(*_):
  raise AssertionError


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_stand_ins_are_called_and_never_what_they_stand_for(protocol):
  data = pickle.dumps({"a": _Call(_not_to_be_called, 7)}, protocol)
  name = f"{_not_to_be_called.__module__}.{_not_to_be_called.__name__}"
  allowed = {name: lambda *arguments: ("stood in", arguments)}
  assert _load(data, allowed) == {"a": ("stood in", (7,))}
  with pytest.raises(
    InputError, match=r"names .*called, .*nothing was executed"
  ):
    _load(data, {})


def test_a_name_is_not_looked_into():
  # Protocol 4 has names with dots, which pickle follows as attributes.
  data = b"\x80\x04\x8c\x03abc\x8c\x09allow.one\x93."
  assert _load(data, {"abc.allow.one": 7}) == 7
  with pytest.raises(InputError, match=r"names abc\.allow\.one"):
    _load(data, {"abc.allow": object()})


def test_names_of_python_2_are_not_translated():
  data = b"\x80\x02c__builtin__\neval\n."
  with pytest.raises(InputError, match=r"names __builtin__\.eval"):
    _load(data, {"builtins.eval": 1})


def test_text_of_python_2_keeps_every_byte():
  data = b"\x80\x02T\0\1\0\0" + bytes(range(256)) + b"."
  assert _load(data, {}).encode("latin1") == bytes(range(256))


def test_the_memo_reserves_no_memory():
  slot = (2**31 - 1).to_bytes(4, "little")
  assert _load(b"\x80\x02}r" + slot + b"j" + slot + b".", {}) == {}


def test_pickles_are_read_one_after_the_other():
  file = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("b", 2) + b"rest")
  assert Unpickler(file, {}).load() == [1]
  assert Unpickler(file, {}).load() == "b"
  assert file.read() == b"rest"
