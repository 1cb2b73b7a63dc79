"""The package depends on jax and the standard library only, wherever it is."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import pallas_kernels

ROOT = pathlib.Path(pallas_kernels.__file__).parent

VENDORED = """
import sys
sys.modules["absl"] = None  # jax does not bring it
import numpy as np
from mine.parts import pooling

pooled = pooling.roi_pool(
  np.ones((3, 4, 2), "f"),
  np.array([[0, 0, 2, 3]]),
  implementation="pallas_triton",
  interpret=True,
)
assert pooled.shape == (1, 7, 7, 2)
try:
  pooling.roi_pool(
    np.ones((3, 4, 2), "f"),
    np.array([[0, 0, 2, 3]]),
    implementation="pallas_mosaic_gpu",
  )
except ModuleNotFoundError as error:
  assert "pip install absl-py" in str(error)
except ValueError as error:  # newer jax does not need it
  assert "CPU" in str(error)
else:
  raise AssertionError
assert "pallas_kernels" not in sys.modules
"""


def test_imports():
  allowed = {"jax", *sys.stdlib_module_names}
  files = list(ROOT.rglob("*.py"))
  assert files
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      else:
        continue
      for name in names:
        assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


def test_the_folder_may_lie_in_another_package(tmp_path):
  shutil.copytree(ROOT, tmp_path / "mine" / "parts" / "pooling")
  ended = subprocess.run(
    [sys.executable, "-c", VENDORED],
    cwd=tmp_path,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr[-3000:]
