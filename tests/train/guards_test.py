"""What a run with bad numbers leaves behind for a closer look."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.train.guards import check_finite
from tests import tiny

BATCH = tiny.make_batch(3)
SOURCE = types.SimpleNamespace(image_ids=("cow_1", "cow_2", "cow_3"))
GOOD = {
  "loss/mil": 2.0,
  "gradient/norm": 0.5,
  "params/norm": 7.0,
  "mining/score": float("nan"),  # of a batch without segments
}


def check(metrics, workdir, **batches):
  check_finite(
    {name: jnp.float32(value) for name, value in metrics.items()},
    step=31,
    batches={"batch": BATCH} | batches,
    source=SOURCE,
    workdir=workdir,
  )


def test_good_numbers_pass(tmp_path):
  check(GOOD, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["loss/mil", "gradient/norm", "params/norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_number_is_told_with_its_images(name, value, tmp_path):
  padded = BATCH.replace(image_index=np.array([2, -1, 0], np.int32))
  with pytest.raises(FloatingPointError) as error:
    check(GOOD | {name: value}, tmp_path, branches=padded)
  path = tmp_path / "nonfinite_step_31.npz"
  for part in ("step 31", f"no finite {name}:", "cow_2", str(path)):
    assert part in str(error.value)
  report = json.loads(path.with_suffix(".json").read_text())
  assert report["step"] == 31
  assert report["images"] == {
    "batch": ["cow_1", "cow_2", "cow_3"],
    "branches": ["cow_3", "cow_1"],
  }
  assert report["metrics"] == {
    k: v if np.isfinite(v) else str(v)
    for k, v in (GOOD | {name: value}).items()
  }
  with np.load(path) as found:
    for field in dataclasses.fields(BATCH):
      expected = getattr(padded, field.name)
      if expected is not None:
        np.testing.assert_array_equal(found[f"branches/{field.name}"], expected)


def test_each_process_writes_its_own_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  bad = GOOD | {"loss/mil": np.nan}
  for process, ids in enumerate([[0, 2], [1, -1]]):
    monkeypatch.setattr(jax, "process_index", lambda k=process: k)
    rows = tiny.make_batch(2, seed=process)
    rows = rows.replace(image_index=np.array(ids, np.int32))
    with pytest.raises(FloatingPointError) as error:
      check(bad, tmp_path, batch=rows)
    path = tmp_path / f"nonfinite_step_31_process_{process}.npz"
    assert str(path) in str(error.value)
    assert f"images of process {process}" in str(error.value)
  for process, ids in enumerate([["cow_1", "cow_3"], ["cow_2"]]):
    path = tmp_path / f"nonfinite_step_31_process_{process}.npz"
    assert json.loads(path.with_suffix(".json").read_text())["images"] == {
      "batch": ids
    }
    with np.load(path) as found:
      rows = tiny.make_batch(2, seed=process)
      np.testing.assert_array_equal(found["batch/images"], rows.images)
