"""Tests of shards as a pipeline: the result is that of one process."""

import sys
import warnings

import pytest

from jtsm_jax import beam, run
from jtsm_jax.data import prepare as preparation
from jtsm_jax.data import prepared
from jtsm_jax.data.audit import audit
from jtsm_jax.proposals import store as stores
from jtsm_jax.types import InputError
from tests.configs import tiny
from tests.data.prepare_test import content
from tests.proposals.record_format_test import assert_equal

LOCAL = "--runner=DirectRunner"


@pytest.fixture
def _beam():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Beam's own, when it is imported
    pytest.importorskip("apache_beam", reason="pip install 'jtsm_jax[beam]'")


def _config(root):
  config = tiny.get_config("")
  config.data.prepared = f"{root}/data"
  config.proposals.store = f"{root}/proposals"
  return config


# Beam leaves sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_beam")
@pytest.mark.parametrize("place", ["local", "file", "bucket"])
def test_a_pipeline_does_what_one_process_does(
  tmp_path, bucket, monkeypatch, place
):
  monkeypatch.setattr(preparation, "PIECE", 3)
  root = {
    "local": tmp_path / "beam",
    "file": f"file://{tmp_path}/beam",
    "bucket": bucket,
  }[place]
  shards = dict(num_shards=3, beam=LOCAL)
  wanted, found = _config(tmp_path), _config(root)
  assert run.prepare(found, tmp_path, **shards)
  data = run.prepare(wanted, tmp_path)
  assert content(found.data.prepared) == content(wanted.data.prepared)
  assert audit(found.data.prepared).faults == []
  path = run.fill_proposals(found, tmp_path, data, **shards)
  ours, theirs = run.propose(wanted, tmp_path, data), stores.open_store(path)
  assert len(ours) == sum(map(len, data.splits.values()))
  assert sorted(ours.ids) == sorted(theirs.ids)
  for image_id in ours.ids:
    assert_equal(theirs.get(image_id), ours.get(image_id))
  # Once more, and nothing is left to do.
  assert run.prepare(found, tmp_path, **shards)
  assert run.fill_proposals(found, tmp_path, data, **shards) == path
  assert len(stores.open_store(path)) == len(ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_beam")
def test_faults_are_told(tmp_path, monkeypatch):
  with pytest.raises(InputError, match=r"--beam='--x=1': there is no --runner"):
    beam.run_shards(print, 2, "--x=1")
  with pytest.raises(InputError, match="Unexpected pipeline runner: None"):
    beam.run_shards(print, 2, "--runner=None")
  config = _config(tmp_path)
  config.data.name = "folder"
  config.data.root = str(tmp_path / "nowhere")
  with pytest.raises(InputError, match="nowhere: no such folder"):
    run.prepare(config, tmp_path, num_shards=2, beam=LOCAL)
  # Workers that write where this process does not see it.
  monkeypatch.setattr(run, "run_shards", lambda *args: None)
  config = _config(tmp_path)
  with pytest.raises(InputError, match=r"data: .* is not there; .* share"):
    run.prepare(config, tmp_path, num_shards=2, beam=LOCAL)
  data = run.prepare(config, tmp_path)
  with pytest.raises(InputError, match=r"proposals/.* is not there; .* share"):
    run.fill_proposals(config, tmp_path, data, num_shards=2, beam=LOCAL)
  assert prepared.is_prepared(tmp_path / "data")


def test_without_beam(monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(InputError, match=r"pip install 'jtsm_jax\[beam\]'"):
    beam.run_shards(print, 2, LOCAL)
