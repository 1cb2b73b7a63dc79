"""Tests of reading MATLAB files: right ones are read, others never crash."""

import io

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from jtsm_jax.data.mat_files import read_mat

CONTENT = dict(
  numbers=np.arange(6, dtype=np.uint16).reshape(2, 3),
  real=np.array([[0.5, np.inf]]),
  text="cow",
  cells=np.array([np.ones((1, 2)), np.zeros((0, 0))], dtype=object),
  nested={"inner": {"values": np.array([[7]])}},
  sparse=scipy.sparse.csc_matrix(np.eye(3)),
)


def mat(content=CONTENT, **options):
  data = io.BytesIO()
  scipy.io.savemat(data, content, **options)
  return data.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_is_read(packed):
  found = read_mat(
    mat(do_compression=packed), ["numbers", "text", "nested"], max_bytes=1000
  )
  np.testing.assert_array_equal(found["numbers"], CONTENT["numbers"])
  assert found["text"].tolist() == ["cow"]
  assert found["nested"]["inner"][0, 0]["values"][0, 0].tolist() == [[7]]
  assert "cells" not in found
  every = read_mat(mat(do_compression=packed), [*CONTENT], max_bytes=1000)
  assert set(CONTENT) <= set(every)


@pytest.mark.parametrize("packed", [False, True])
def test_no_damage_ends_the_process(packed):
  data = mat({"a": CONTENT["cells"], "b": [[1, 2]]}, do_compression=packed)
  refused = 0
  for n in range(len(data)):
    for damaged in (
      data[:n],
      data[:n] + bytes([data[n] ^ 0x45]) + data[n + 1 :],
    ):
      try:
        read_mat(damaged, ["a", "b"], max_bytes=10_000)
      except ValueError:
        refused += 1
  assert refused > len(data)


def test_a_bomb_is_not_unpacked():
  data = mat({"zeros": np.zeros((2000, 2000))}, do_compression=True)
  assert len(data) < 100_000
  with pytest.raises(ValueError, match="unpacks to over 1000000 bytes"):
    read_mat(data, ["zeros"], max_bytes=1_000_000)


@pytest.mark.parametrize("data", [b"", b"MATLAB 7.3", bytes(200)])
def test_other_files(data):
  with pytest.raises(ValueError, match="no header of MATLAB 5 to 7"):
    read_mat(data, ["x"], max_bytes=1000)
