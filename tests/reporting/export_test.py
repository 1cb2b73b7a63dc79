"""Tests of the exported model: run without this package, in a new process."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from jtsm_jax.evaluation.class_calibration import ClassCalibration
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import DetectionSettings, make_steps
from jtsm_jax.evaluation.predict import PredictionSettings, predict
from jtsm_jax.proposals.generate import preset_settings
from jtsm_jax.reporting import export
from jtsm_jax.types import Categories, Category, InputError
from tests import tiny

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "export.md"
CANVASES = ((64, 64), (64, 80))
CATEGORIES = Categories(
  tuple(
    Category(i + 7, f"class {i}", i < tiny.NUM_THINGS) for i in range(tiny.K)
  )
)
CALIBRATION = ClassCalibration(
  np.linspace(0, 0.1, tiny.K, dtype=np.float32),
  np.linspace(0.1, 1, tiny.K, dtype=np.float32),
)
SETTINGS = PredictionSettings(
  canvases=CANVASES,
  batch_size=2,
  max_proposals=tiny.P,
  max_superpixels=tiny.S,
  flip=True,
  show_present=True,
  detection=DetectionSettings(nms_iou=0.3),
  fusion=FusionSettings(stuff_area=0.01),
)
PROPOSALS = preset_settings(
  "fast", max_proposals=tiny.P, num_superpixels=tiny.S
)


def make_batch(canvas, batch_size):
  batch = tiny.make_batch(batch_size, canvas=canvas)
  return batch.replace(superpixels=batch.superpixels.astype(np.int16))


def write(folder, model, variables, **options):
  export.export_model(
    folder,
    model,
    variables,
    categories=CATEGORIES,
    calibration=CALIBRATION,
    settings=SETTINGS,
    proposals=PROPOSALS,
    mil_share=0.3,
    **options,
  )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The folder and the steps that were written into it."""
  folder = tmp_path_factory.mktemp("export")
  model = tiny.make_model(cells=True)
  variables = tiny.make_variables(model, tiny.make_batch())
  write(folder, model, variables)
  return folder, make_steps(model, variables, mil_share=0.3)


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_loaded_gives_what_was_exported(exported, canvas, batch_size):
  folder, steps = exported
  batch = make_batch(canvas, batch_size)
  loaded = export.load_exported(folder).steps
  found, wanted = loaded.score(batch), steps.score(batch)
  for name in ("proposals", "image", "semantic", "features"):
    np.testing.assert_allclose(
      getattr(found, name), getattr(wanted, name), atol=1e-6
    )
  boxes = batch.boxes[:, :5]
  category = np.tile(np.arange(5, dtype=np.int32) % 3, (batch_size, 1))
  np.testing.assert_allclose(
    loaded.masks(found.features, boxes, category),
    steps.masks(wanted.features, boxes, category),
    atol=1e-6,
  )


SCRIPT = """
inputs = dict(np.load(sys.argv[2]))
info, functions = load(sys.argv[1])
assert info["classes"][0] == {"id": 7, "name": "class 0", "isthing": 1}
for name, x in inputs.items():
  said = info["functions"]["score-64x80"][name]
  assert said["dtype"] == x.dtype.name
  assert said["shape"] == ["b", *x.shape[1:]]
found = functions["score-64x80"](inputs)
boxes = {
  "features": found["features"],
  "boxes": inputs["boxes"][:, :5],
  "category": np.ones((2, 5), np.int32),
}
masks = functions["masks-64x80"](boxes)
np.savez(sys.argv[3], masks=masks, **found)
strange = {m.partition(".")[0] for m in sys.modules} & {
  "jtsm_jax", "pallas_kernels", "flax", "safetensors"
}
assert not strange, strange
"""


def test_the_loader_of_the_docs_in_a_fresh_process(exported, tmp_path):
  folder, steps = exported
  batch = make_batch((64, 80), 2)
  inputs = {name: getattr(batch, name) for name in export.INPUTS}
  np.savez(tmp_path / "inputs.npz", **inputs)
  loader, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
  assert len(loader.splitlines()) < 40
  (tmp_path / "script.py").write_text(f"import sys\n{loader}\n{SCRIPT}")
  paths = [tmp_path / n for n in ("script.py", "inputs.npz", "found.npz")]
  subprocess.run(
    [sys.executable, "-P", paths[0], folder, *paths[1:]],
    check=True,
    cwd=tmp_path,
  )
  wanted = steps.score(batch)
  masks = steps.masks(
    wanted.features, batch.boxes[:, :5], np.ones((2, 5), np.int32)
  )
  with np.load(paths[2]) as found:
    assert set(found) == {
      "proposals", "image", "semantic", "features", "masks"
    }  # fmt: skip
    np.testing.assert_allclose(found["masks"], masks, atol=1e-5)
    for name in ("proposals", "image", "semantic"):
      np.testing.assert_allclose(found[name], getattr(wanted, name), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_proposals_a_few_at_a_time(exported, tmp_path, batch_size):
  model = tiny.make_model(cells=True)
  variables = tiny.make_variables(model, tiny.make_batch())
  write(tmp_path, model, variables, proposal_block=8)
  batch = make_batch(CANVASES[0], batch_size)
  found = export.load_exported(tmp_path).steps.score(batch)
  wanted = exported[1].score(batch)
  np.testing.assert_allclose(found.proposals, wanted.proposals, atol=1e-6)
  name = f"score-{CANVASES[0][0]}x{CANVASES[0][1]}.stablehlo"

  def loops(folder):
    data = bytearray((folder / name).read_bytes())
    return jax.export.deserialize(data).mlir_module().count("stablehlo.while")

  assert loops(tmp_path) == loops(exported[0]) + 1


def test_it_runs_on_every_platform(exported):
  for path in exported[0].glob("*.stablehlo"):
    found = jax.export.deserialize(bytearray(path.read_bytes()))
    assert set(found.platforms) == {"cpu", "cuda", "tpu"}


def test_branches_that_are_not_there(tmp_path):
  model = tiny.make_model(instance=False, semantic=False)
  batch = make_batch(CANVASES[0], 2)
  variables = tiny.make_variables(model, batch)
  write(tmp_path, model, variables)
  loaded = export.load_exported(tmp_path).steps
  assert loaded.masks is None
  assert loaded.score(batch).semantic is None
  names = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
  assert not any("tag_head" in name for name in names)


def test_files_that_are_missing_or_damaged(exported, tmp_path):
  with pytest.raises(InputError, match=r"no exported model.*--mode=export"):
    export.load_exported(tmp_path)
  for path in exported[0].iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "weights.safetensors").write_bytes(b"x" * 30)
  with pytest.raises(InputError, match=r"no exported model"):
    export.load_exported(tmp_path)
  (tmp_path / "model.json").write_text('{"format": "0"}')
  with pytest.raises(InputError, match=r"of format 0, here it is"):
    export.load_exported(tmp_path)


def test_from_photographs_to_panoptic_maps(exported, tmp_path, monkeypatch):
  folder, steps = exported
  rng = np.random.default_rng(0)
  for name, size in (("a", (48, 64)), ("b", (60, 60))):
    pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    path = tmp_path / "photos" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
  (tmp_path / "runs" / "mine").mkdir(parents=True)
  (tmp_path / "runs" / "mine" / "export").symlink_to(folder)
  monkeypatch.chdir(tmp_path)
  _, example = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
  names = {}
  exec(example, names)
  model = names["model"]
  assert model.settings == SETTINGS
  assert model.proposals == PROPOSALS
  assert model.categories == CATEGORIES
  for name, values in vars(CALIBRATION).items():
    np.testing.assert_array_equal(getattr(model.calibration, name), values)

  wanted = predict(
    steps,
    names["images"],
    names["proposals"],
    calibration=CALIBRATION,
    num_things=tiny.NUM_THINGS,
    settings=SETTINGS,
  )
  wanted = {names["images"].names[x.index]: x.panoptic for x in wanted}
  assert set(names["maps"]) == {"a", "b"} == set(wanted)
  for name, found in names["maps"].items():
    np.testing.assert_array_equal(found.ids, wanted[name].ids)
