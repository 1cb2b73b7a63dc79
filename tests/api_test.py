"""Rules that hold for every module, read from the sources."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
  path.relative_to(ROOT)
  for package in ("jtsm_jax", "pallas_kernels")
  for path in (ROOT / package).rglob("*.py")
  if path.name != "__init__.py"
)
TESTED_ELSEWHERE = {
  **{
    f"jtsm_jax/modes/{name}.py": "tests/end_to_end_test.py"
    for name in (
      "data",
      "evaluation",
      "export",
      "prediction",
      "proposals",
      "report",
      "trained",
      "training",
    )
  },
  "jtsm_jax/models/mixed_precision.py": "tests/train/precision_test.py",
  "jtsm_jax/train/loop.py": "tests/end_to_end_test.py",
  "jtsm_jax/train/objectives.py": "tests/train/step_test.py",
  "jtsm_jax/train/warm_up.py": "tests/train/step_test.py",
  # Data types: every test makes some.
  "jtsm_jax/types.py": "tests/data/panoptic_files_test.py",
  # The implementations of one operator, compared with each other.
  **{
    f"pallas_kernels/moi_pool/{name}.py": (
      "tests/pallas_kernels/moi_pool/moi_pool_test.py"
    )
    for name in ("api", "reference", "vjp", "xla")
  },
  **{
    f"pallas_kernels/moi_pool/pallas_{name}.py": (
      "tests/pallas_kernels/moi_pool/kernels_test.py"
    )
    for name in ("tpu", "triton", "mosaic_gpu")
  },
  "jtsm_jax/evaluation/tables.py": "tests/evaluation/evaluate_test.py",
  "pallas_kernels/roi_pool.py": (
    "tests/pallas_kernels/moi_pool/moi_pool_test.py"
  ),
}


def _mirror(module):
  """tests/models/jtsm_test.py of jtsm_jax/models/jtsm.py."""
  inner = (
    module if module.parts[0] != "jtsm_jax" else module.relative_to("jtsm_jax")
  )
  return pathlib.Path("tests") / inner.with_name(f"{inner.stem}_test.py")


def _public(module):
  """Public classes and functions of a module, with methods: (name, node)."""

  def walk(body, prefix):
    for node in body:
      if not isinstance(node, ast.ClassDef | ast.FunctionDef):
        continue
      if node.name.startswith("_") and node.name != "__call__":
        continue
      yield prefix + node.name, node
      if isinstance(node, ast.ClassDef):
        yield from walk(node.body, f"{prefix}{node.name}.")

  return list(walk(ast.parse((ROOT / module).read_text()).body, ""))


def _ids(module):
  return str(module)


@pytest.mark.parametrize("module", MODULES, ids=_ids)
def test_every_module_has_a_test(module):
  mirror, elsewhere = _mirror(module), TESTED_ELSEWHERE.get(str(module))
  if elsewhere is None:
    assert (ROOT / mirror).is_file(), f"{module} has no {mirror}"
  else:
    assert (ROOT / elsewhere).is_file(), f"{module} names {elsewhere}"
    assert not (ROOT / mirror).is_file(), f"{module} needs no entry above"


def test_every_entry_of_the_list_is_a_module():
  assert set(TESTED_ELSEWHERE) <= {str(module) for module in MODULES}


def _is_plain(node):
  """A property of one line, or a method that flax or a protocol asks for."""
  decorators = [getattr(d, "id", None) for d in node.decorator_list]
  short = len(node.body) == 1
  return node.name == "setup" or (short and "property" in decorators)


@pytest.mark.parametrize("module", MODULES, ids=_ids)
def test_public_names_have_docstrings(module):
  tree = ast.parse((ROOT / module).read_text())
  missing = [] if ast.get_docstring(tree) else ["the module"]
  protocols = {
    name
    for name, node in _public(module)
    if isinstance(node, ast.ClassDef)
    and any(getattr(base, "id", None) == "Protocol" for base in node.bases)
  }
  for name, node in _public(module):
    stub = name.split(".")[0] in protocols and "." in name
    fitting = isinstance(node, ast.FunctionDef) and _is_plain(node)
    # A module of one sentence describes its only method in the class.
    one_method = node.name == "__call__"
    if not (stub or fitting or one_method or ast.get_docstring(node)):
      missing.append(name)
  assert not missing, f"{module}: no docstring for {missing}"


@pytest.mark.parametrize("module", MODULES, ids=_ids)
def test_options_of_long_signatures_are_given_by_name(module):
  # f(image, 0.5, True) cannot be read: in functions of more than three
  # parameters every switch and fraction has to be named, and whatever has a
  # default, unless it comes first or is text to be shown.
  wrong = []
  for name, node in _public(module):
    if not isinstance(node, ast.FunctionDef):
      continue
    positional = node.args.posonlyargs + node.args.args
    if len(positional) + len(node.args.kwonlyargs) <= 3:
      continue
    first_default = len(positional) - len(node.args.defaults)
    for i, argument in enumerate(positional):
      kind = ast.unparse(argument.annotation) if argument.annotation else ""
      optional = i >= max(first_default, 1) and "str" not in kind
      if optional or kind in ("float", "bool"):
        wrong.append(f"{name}({argument.arg})")
  assert not wrong, f"{module}: not keyword-only: {wrong}"


def test_only_public_names_of_the_kernels_are_used():
  # That they import nothing but jax is checked by their own package_test.
  for module in MODULES:
    if module.parts[0] == "pallas_kernels":
      continue
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      inner = [n for n in names if n.startswith("pallas_kernels.")]
      assert not inner, f"{module} imports {inner}"
