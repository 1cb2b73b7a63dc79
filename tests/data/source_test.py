"""Tests of data sets before they are prepared."""

import pytest

from jtsm_jax.data.source import LazyRecords
from tests.data.small_set import TRAIN


def test_records_are_read_when_they_are_asked_for():
  read = []

  def one(i):
    read.append(i)
    return TRAIN[i]

  records = LazyRecords(len(TRAIN), one)
  assert len(records) == 4
  assert read == []
  assert records[2] is TRAIN[2]
  assert read == [2]
  assert list(records) == TRAIN
  for i in (-1, 4):
    with pytest.raises(IndexError, match=f"record {i} of 4"):
      records[i]
