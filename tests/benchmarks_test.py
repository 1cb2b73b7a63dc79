"""Benchmarks call what there is: they are too slow to run in a test."""

import ast
import importlib
import inspect
import pathlib
import types

import pytest

FILES = sorted((pathlib.Path(__file__).parents[1] / "benchmarks").glob("*.py"))
PACKAGES = ("jtsm_jax", "pallas_kernels", "configs")


def _imported(tree: ast.Module) -> dict[str, object]:
  """What the names are that a file imports from the packages."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
      for alias in node.names:
        found[alias.asname or alias.name] = _member(
          importlib.import_module(node.module), alias.name
        )
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if _is_ours(alias.name) and (alias.asname or "." not in alias.name):
          module = importlib.import_module(alias.name)
          found[alias.asname or alias.name] = module
  return found


def _is_ours(module: str | None) -> bool:
  return (module or "").split(".")[0] in PACKAGES


def _member(module: types.ModuleType, name: str) -> object:
  if not hasattr(module, name):  # a module that nothing has imported yet
    return importlib.import_module(f"{module.__name__}.{name}")
  return getattr(module, name)


def _resolve(node: ast.expr, imported: dict[str, object]) -> object | None:
  """The object of `name` or `module.name`; None where it is not ours."""
  if isinstance(node, ast.Name):
    return imported.get(node.id)
  if isinstance(node, ast.Attribute):
    owner = _resolve(node.value, imported)
    if isinstance(owner, types.ModuleType) and _is_ours(owner.__name__):
      return _member(owner, node.attr)
  return None


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_names_and_keywords_exist(file):
  tree = ast.parse(file.read_text())
  imported = _imported(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      _resolve(node, imported)  # raises where there is no such thing
    if isinstance(node, ast.Call):
      function = _resolve(node.func, imported)
      if not callable(function):
        continue
      keywords = {k.arg: None for k in node.keywords if k.arg}
      inspect.signature(function).bind_partial(**keywords)


def test_a_name_that_is_not_there_is_found():
  tree = ast.parse("from jtsm_jax.train import build\nbuild.open_nothing()")
  imported = _imported(tree)
  call = tree.body[1].value
  with pytest.raises(ModuleNotFoundError, match=r"build\.open_nothing"):
    _resolve(call.func, imported)
