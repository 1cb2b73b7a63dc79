"""The package depends on jax and the standard library only."""

import ast
import pathlib
import sys

import pallas_kernels


def test_imports():
  root = pathlib.Path(pallas_kernels.__file__).parent
  allowed = {"jax", "pallas_kernels", *sys.stdlib_module_names}
  files = list(root.rglob("*.py"))
  assert files
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module]
      else:
        continue
      for name in names:
        assert name.split(".")[0] in allowed, f"{file.name} imports {name}"
