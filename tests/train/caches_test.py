"""Where a run keeps what it computes once, and when it keeps features."""

import pathlib
import types

import jax
import pytest

from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.data.shapes import shapes_source
from jtsm_jax.train import build, caches
from tests import tiny as small
from tests.configs import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("caches") / "data"
  prepare(shapes_source(seed=0, num_train=3, num_val=2, side=64), folder)
  return open_prepared(folder)


@pytest.fixture(scope="module")
def model(data):
  """The model of the tiny configuration and its variables."""
  model = build.build_model(tiny.get_config("frozen"), data.categories)
  batch = small.make_batch(1, canvas=(64, 64))
  return model, jax.jit(model.init)(jax.random.key(0), batch)


def _open(data, model, workdir, *, split="train", learning=None, **fields):
  config = tiny.get_config("frozen")
  config.update_from_flattened_dict(fields)
  args = config, model[0], model[1], data.splits[split]
  learning = split == "train" if learning is None else learning
  says = caches.caches_features(*args, learning=learning)
  found = caches.open_feature_cache(
    config, workdir, *args[1:], split=split, learning=learning
  )
  assert says == (found is not None)
  return found


def test_features_of_a_frozen_backbone_are_kept_in_the_workdir(
  data, model, tmp_path
):
  _open(data, model, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["features"]
  other = {"backbone.cache_dir": str(tmp_path / "other")}
  _open(data, model, tmp_path / "mine", **other)
  assert [*(tmp_path / "other").iterdir()]
  assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
  "field",
  [
    {"backbone.freeze": "none"},
    {"backbone.freeze": "res5"},
    {"backbone.cache": False},
    {"data.colour_factor": 1.2},
    {"data.crop": 0.9},
  ],
)
def test_features_that_change_are_not_kept(data, model, tmp_path, field):
  assert _open(data, model, tmp_path, **field) is None
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  "field", [{"data.colour_factor": 1.2}, {"data.crop": 0.9}]
)
def test_images_that_are_evaluated_keep_their_colours_and_their_edges(
  data, model, tmp_path, field
):
  assert _open(data, model, tmp_path, split="val", **field) is not None


def test_features_larger_than_allowed_are_computed_every_time(
  data, model, tmp_path, caplog
):
  field = {"backbone.cache_gib": 1e-6}
  assert _open(data, model, tmp_path, **field) is None
  assert "cache_gib = 0.0: they are computed every time" in caplog.text


def test_what_is_learned_from_does_not_depend_on_the_evaluation(
  data, model, tmp_path
):
  # A cache keeps float16: with it a training learns from other numbers.
  fields = {
    "evaluation.canvases": ((6400, 6400),),
    "backbone.cache_gib": 0.01,
  }
  assert _open(data, model, tmp_path, **fields) is not None
  assert _open(data, model, tmp_path, **fields, learning=False) is None
  fields["data.canvases"] = fields.pop("evaluation.canvases")
  assert _open(data, model, tmp_path, **fields) is None
  assert _open(data, model, tmp_path, **fields, learning=False) is not None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_pseudo_masks_are_filed_by_images_and_proposals(
  data, tmp_path, monkeypatch, elsewhere
):
  made = {}
  monkeypatch.setattr(
    caches, "MaskReestimator", lambda **options: made.update(options)
  )
  config = tiny.get_config("frozen")
  folder = tmp_path / "masks"
  if elsewhere:
    folder = tmp_path / "shared"
    config.reestimation.cache_dir = str(folder)
  store = types.SimpleNamespace(path=pathlib.Path("proposals/of/these"))
  source = data.splits["train"]
  caches.open_reestimator(config, tmp_path, source, store)
  assert made["cache_dir"] == folder / source.fingerprint / "these"
  assert made["longest_side"] == config.reestimation.longest_side
  assert made["workers"] >= 1
