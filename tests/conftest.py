"""What tests of several folders share."""

import os

import fsspec
import pytest
from upath import UPath

# Compiled soon rather than well: most of a test's time is XLA's. It is read
# when jax first computes, and handed on to the processes that tests start.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)


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
