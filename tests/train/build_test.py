"""Configurations to models."""

import functools
import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

import configs
from configs import ablations, base, variants
from jtsm_jax.backbones import pretrained
from jtsm_jax.backbones.resnet_ws import ResNetWS
from jtsm_jax.modes.trained import prediction_settings
from jtsm_jax.train import build, cost, fields, step
from jtsm_jax.types import Batch, Categories, Category, InputError

CATEGORIES = Categories(
  tuple(Category(i, f"class {i}", i < 3) for i in range(5))
)
# Every file of configs/, and the names that it takes after a colon.
FILES = sorted(
  path.stem
  for path in pathlib.Path(configs.__file__).parent.glob("*.py")
  if path.stem not in ("__init__", "variants")
)
CONFIGS = [
  (file, *name)
  for file in FILES
  for name in (
    [(row,) for row in ablations.ROWS]
    if file == "ablations"
    else [(name,) for name in variants.NAMES]
    if file.startswith(("voc", "coco"))
    else [()]
  )
]


def _batch(canvas, *, P=4, S=6):
  return Batch(
    image_index=np.zeros(1, np.int32),
    images=np.zeros((1, *canvas, 3), np.uint8),
    features=None,
    colour=None,
    size=np.array([canvas], np.int32),
    flip=np.zeros(1, bool),
    window=np.array([[0, 0, *canvas]], np.int32),
    tags=np.zeros((1, len(CATEGORIES)), np.float32),
    superpixels=np.zeros((1, *canvas), np.int32),
    member_bits=np.zeros((1, S, -(-P // 8)), np.uint8),
    boxes=np.zeros((1, P, 4), np.float32),
    valid=np.ones((1, P), bool),
  )


def _params(config):
  model = build.build_model(config, CATEGORIES)
  batch = _batch(min(config.data.canvases))
  return model, jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


@pytest.mark.parametrize("names", CONFIGS, ids=":".join)
def test_every_configuration_builds(names):
  file, *arguments = names
  config = importlib.import_module(f"configs.{file}").get_config(*arguments)
  fields.check_schedule(config)
  model, params = _params(config)
  has_instance = config.instance.enabled and config.task != "detection"
  has_semantic = config.semantic.enabled and config.task == "panoptic"
  assert (model.instance is not None) == has_instance
  assert (model.semantic is not None) == has_semantic
  optimizer = build.main_optimizer(config, params)
  jax.eval_shape(optimizer.init, params)
  warm_up = build.warm_up_optimizer(config, params)
  assert (warm_up is not None) == (config.warm_up.steps > 0)
  tags = np.array([[1, 0, 0, 1, 1]])  # a thing, and three segments a stuff
  mining = build.mining_settings(config, num_things=3, tags=tags)
  assert mining.num_slots == 1 + 2 * config.mining.segments_per_stuff
  assert mining.score_ratio == config.mining.score_ratio
  losses = build.loss_settings(config)
  assert losses.mask_stride == config.losses.mask_stride
  sides = np.array([*config.data.canvases, *config.evaluation.canvases])
  assert not (sides % config.backbone.stride).any()
  assert not (sides % config.losses.mask_stride).any()


@pytest.mark.parametrize("file", ["voc2012_panoptic", "ablations"])
def test_names_that_are_not_there_are_told(file):
  module = importlib.import_module(f"configs.{file}")
  with pytest.raises(ValueError, match=r"'resnet19'.*wanted one of .*, "):
    module.get_config("resnet19")


def test_a_detector_draws_no_outlines():
  # Its boxes are measured, and those of what GrabCut leaves would differ.
  config = importlib.import_module("configs.folder").get_config()
  assert prediction_settings(config).outline_rounds > 0
  config.task = "detection"
  assert prediction_settings(config).outline_rounds == 0


def test_layers_of_the_paper():
  model, params = _params(base.get_config())
  heads = {k: v["kernel"].shape[1] for k, v in params["heads"].items()}
  assert heads == {
    "mil_classes": 5,
    "mil_proposals": 5,
    **{f"refinement_{r}": 6 for r in (1, 2, 3, 4)},
  }
  assert params["neck"]["fc1"]["kernel"].shape == (512 * 7 * 7, 4096)
  assert params["neck"]["fc2"]["kernel"].shape == (4096, 4096)
  assert params["instance"]["conv1"]["kernel"].shape == (3, 3, 512, 256)
  assert params["semantic"]["predictor"]["kernel"].shape == (256, 3)
  assert model.extractor.stride == 8
  assert model.proposal_features.pooling == "moi"


def test_branches_without_classes_are_left_out():
  config = base.get_config()
  things = Categories(CATEGORIES.items[:3])
  stuff = Categories(CATEGORIES.items[3:])
  assert build.build_model(config, things).semantic is None
  assert build.build_model(config, things).instance is not None
  assert build.build_model(config, stuff).instance is None


def test_no_model_is_built_of_unknown_fields():
  config = base.get_config()
  config.backbone.name = "vgg16"
  with pytest.raises(InputError, match="vgg16"):
    build.build_model(config, CATEGORIES)


def test_weights_are_of_the_kind_that_a_backbone_takes(tmp_path):
  config = base.get_config()
  config.backbone.name = "resnet"
  config.backbone.pretrained = "w.pkl"
  with pytest.raises(InputError, match=r"w\.pkl.* for resnet\. .*\.pth or"):
    build.load_pretrained(config, tmp_path)
  config.backbone.pretrained = "w.pth"
  fields.check_fields(config)  # a trained model does without the file
  with pytest.raises(InputError, match=r"cannot read the weights w\.pth"):
    build.load_pretrained(config, tmp_path)
  # Where another run has all that it would give, it need not be there.
  anew = {"backbone_anew": False, "neck_anew": False}
  assert build.load_pretrained(config, tmp_path, **anew) is None
  for part in anew:
    with pytest.raises(InputError, match="cannot read the weights"):
      build.load_pretrained(config, tmp_path, **anew | {part: True})
  for field, value in (("width", 0.5), ("norm", "group")):
    config = base.get_config()
    config.backbone.pretrained = "w.pth"
    config.backbone[field] = value
    with pytest.raises(InputError, match=rf"{field} is .*{value}.*weights are"):
      fields.check_fields(config)


@pytest.fixture(scope="module")
def weights_of_resnet_ws():
  """Shapes are enough: no value is looked at."""
  variables = jax.eval_shape(
    lambda key, x: ResNetWS().init(key, x, train=False),
    jax.random.key(0),
    np.zeros((1, 32, 32, 3), np.float32),
  )
  zeros = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), variables
  )
  shapes = {"fc1": (7 * 7 * 512, 4096), "fc2": (4096, 4096)}
  neck = {
    name: {
      "kernel": np.broadcast_to(np.float32(0), shape),
      "bias": np.zeros(shape[1], np.float32),
    }
    for name, shape in shapes.items()
  }
  return pretrained.Weights(zeros, neck)


def test_weights_of_the_authors_fill_backbone_and_neck(
  tmp_path, monkeypatch, capsys, weights_of_resnet_ws
):
  asked = []

  def load(path, **options):
    asked.append((path, options))
    return weights_of_resnet_ws

  monkeypatch.setattr(pretrained, "load_resnet_ws", load)
  config = base.get_config()
  config.backbone.pretrained = "~/w.pkl"
  found = build.load_pretrained(config, tmp_path)
  assert asked == [("~/w.pkl", {"depth": 18, "cache_dir": tmp_path})]
  model = build.build_model(config, CATEGORIES)
  batch = _batch(min(config.data.canvases))
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)
  wanted = {
    "params": {
      "extractor": {
        "backbone": variables["params"]["extractor"]["backbone"],
      },
      "neck": variables["params"]["neck"],
    },
    "batch_stats": variables["batch_stats"],
  }
  assert jax.tree.map(np.shape, found) == jax.tree.map(
    lambda x: x.shape, wanted
  )
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "neck.widths",
      (4096, 1024),
      r"starts at random: .*\(4096, 1024\), .*4096\)",
    ),
    (
      "neck.widths",
      (),
      r"neck of w\.pkl is not used: config\.neck\.widths is \(\)",
    ),
    ("backbone.outputs", ("res4", "res5"), "starts at random: .*outputs"),
    ("backbone.projection", 64, "starts at random: .*projection is 64"),
    ("pooling.output_size", (4, 4), r"starts at random: .*\(4, 4\)"),
    ("pooling.reduce", "mean", "starts at random: .*'mean'.*'flatten'"),
    ("pooling.average", True, "starts at random: .*average is True"),
  ],
)
def test_a_neck_that_does_not_fit_is_told(
  tmp_path, monkeypatch, capsys, weights_of_resnet_ws, field, value, message
):
  monkeypatch.setattr(
    pretrained, "load_resnet_ws", lambda *_, **__: weights_of_resnet_ws
  )
  config = base.get_config()
  config.backbone.pretrained = "w.pkl"
  config.update_from_flattened_dict({field: value})
  found = build.load_pretrained(config, tmp_path)
  assert set(found["params"]) == {"extractor"}
  (line,) = capsys.readouterr().out.splitlines()
  assert re.search(message, line)
  if "starts at random" in message:
    build.load_pretrained(config, tmp_path, neck_anew=False)
    assert not capsys.readouterr().out


def test_weights_without_a_neck_are_told(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
    pretrained,
    "load_resnet",
    lambda path, **options: pretrained.Weights({"params": {}}, {}),
  )
  config = base.get_config()
  config.backbone.name = "resnet"
  config.backbone.pretrained = "w.pth"
  found = build.load_pretrained(config, tmp_path)
  assert found == {"params": {"extractor": {"backbone": {}}}}
  out = capsys.readouterr().out
  assert out == "train: the neck starts at random: 'w.pth' has none\n"
  config.neck.widths = ()
  build.load_pretrained(config, tmp_path)
  assert not capsys.readouterr().out


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_torchvisions_network_is_a_backbone(stride):
  config = base.get_config()
  config.backbone.name, config.backbone.depth = "resnet", 50
  config.backbone.stride = stride
  config.data.canvases = config.evaluation.canvases = ((128, 192),)
  model, params = _params(config)
  assert params["extractor"]["backbone"]["stem"]["conv"]["kernel"].shape == (
    *(7, 7),
    *(3, 64),
  )
  images = np.zeros((1, 128, 192, 3), np.uint8)
  features = jax.eval_shape(
    lambda key: model.init_with_output(key, images, method="extract")[0],
    jax.random.key(0),
  )
  assert features.shape == (1, 128 // stride, 192 // stride, 2048)
  optimizer = build.main_optimizer(config, params)
  jax.eval_shape(optimizer.init, params)


@pytest.mark.parametrize(
  ("freeze", "norm", "moving"),
  [
    ("all", "frozen", set()),
    ("res4", "group", {"res5_0", "res5_1"}),
    ("stem", "frozen", {f"res{s}_{i}" for s in range(2, 6) for i in (0, 1)}),
  ],
)
def test_frozen_stages_get_no_update(freeze, norm, moving):
  config = base.get_config()
  config.backbone.freeze, config.backbone.norm = freeze, norm
  backbone = jax.eval_shape(
    lambda key: ResNetWS(width=0.125, norm=norm).init(
      key, np.zeros((1, 32, 32, 3), np.float32), train=False
    ),
    jax.random.key(0),
  )["params"]
  shapes = {
    "extractor": {"backbone": backbone},
    "neck": {"fc1": {"bias": jax.ShapeDtypeStruct((2,), np.float32)}},
    "tag_head": {"Dense_0": {"bias": jax.ShapeDtypeStruct((2,), np.float32)}},
  }
  params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
  optimizer = build.main_optimizer(config, params)
  updates, _ = jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p))(
    params
  )
  assert np.all(updates["neck"]["fc1"]["bias"] < 0)
  assert not np.any(updates["tag_head"]["Dense_0"]["bias"])
  layers = jax.tree_util.tree_leaves_with_path(updates["extractor"]["backbone"])
  for path, update in layers:
    names = [k.key for k in path]
    moves = names[0] in moving and not (norm == "frozen" and "norm" in names)
    assert bool(np.all(update != 0)) == moves, names
    assert bool(np.any(update != 0)) == moves, names


@pytest.mark.parametrize("remat", ["", "backbone"])
@pytest.mark.parametrize(
  ("name", "freeze"),
  [
    ("resnet_ws", "res4"),
    ("resnet", "res4"),
    ("efficientnet_lite0", "stage6"),
  ],
)
def test_the_backward_pass_ends_at_the_last_frozen_stage(name, freeze, remat):
  config = base.get_config()
  config.backbone.name, config.backbone.freeze = name, freeze
  config.backbone.outputs = tuple(fields.STAGES[name])[-1:]
  config.train.remat = remat
  model = build.build_model(config, CATEGORIES)
  images = np.zeros((1, 64, 64, 3), np.uint8)
  variables = jax.eval_shape(
    lambda key: model.init(key, images, method="extract"), jax.random.key(0)
  )

  def loss(params, others, frozen):
    variables = {"params": step.stop_gradients(params, frozen), **others}
    return model.apply(variables, images, method="extract").sum()

  def flops(frozen):
    others = {k: tree for k, tree in variables.items() if k != "params"}
    gradient = jax.grad(functools.partial(loss, frozen=frozen))
    return cost.matmul_flops(gradient, variables["params"], others)

  assert flops(("extractor/",)) == 0
  assert 0 < flops(build.frozen_parameters(config)) < 0.8 * flops(())


def test_every_part_of_the_model_learns():
  config = base.get_config()
  config.cells.enabled = True
  config.neck.widths = (8, 8)
  _, shapes = _params(config)
  params = {
    name: jax.tree.map(lambda s: np.ones(s.shape, s.dtype), tree)
    for name, tree in shapes.items()
    if name not in ("extractor", "tag_head")  # one frozen, one of the warm-up
  }
  optimizer = build.main_optimizer(config, params)
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  assert set(updates) == {"neck", "heads", "instance", "semantic", "cells"}
  assert all(np.all(update) for update in jax.tree.leaves(updates))


def test_norms_of_a_network_without_a_choice_of_them_learn_with_it():
  config = base.get_config()
  config.backbone.name, config.backbone.outputs = (
    "efficientnet_lite0",
    ("head",),
  )
  config.backbone.freeze = "none"
  moving = {}
  for norm in ("frozen", "batch"):  # both ResNets' alone
    config.backbone.norm = norm
    _, shapes = _params(config)
    shapes = {"extractor": shapes["extractor"]}
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    optimizer = build.main_optimizer(config, params)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moving[norm] = jax.tree.map(lambda update: bool(np.all(update)), updates)
  assert all(jax.tree.leaves(moving["batch"]))
  assert moving["frozen"] == moving["batch"]


@pytest.mark.parametrize("backbone", fields.STAGES)
def test_stages_share_out_the_parameters(backbone):
  config = base.get_config()
  config.backbone.name = backbone
  config.backbone.outputs = tuple(fields.STAGES[backbone])[-1:]
  _, params = _params(config)
  stages = fields.STAGES[config.backbone.name]
  for layer in params["extractor"]["backbone"]:
    hits = [s for s, start in stages.items() if re.match(start, f"{layer}/")]
    assert len(hits) == 1, (layer, hits)


def test_a_backbone_that_would_stay_random_is_refused(tmp_path):
  config = base.get_config()
  with pytest.raises(InputError, match=r"backbone.*stays random"):
    build.load_pretrained(config, tmp_path)
  assert build.load_pretrained(config, tmp_path, backbone_anew=False) is None
  config.warm_up.steps = 1
  assert build.load_pretrained(config, tmp_path) is None
