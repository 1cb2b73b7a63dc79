"""What tests of several folders share."""

import fsspec
import pytest
from upath import UPath


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """An empty bucket in the memory of this process, and no local copies."""
  monkeypatch.setenv("JTSM_CACHE_DIR", str(tmp_path / "copies"))
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  memory.pseudo_dirs[:] = [""]
  yield UPath("memory://bucket")
  memory.store.clear()
  memory.pseudo_dirs[:] = [""]
