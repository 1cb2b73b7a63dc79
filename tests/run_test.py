"""Modes within this process; end_to_end_test.py runs the whole program."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from jtsm_jax import modes, run
from jtsm_jax.data import prepared
from jtsm_jax.data.folder import folder_source
from jtsm_jax.data.pipeline import inference_batches
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.shapes import SHAPES_CATEGORIES, shapes_source
from jtsm_jax.data.things import things_only
from jtsm_jax.modes.data import data_settings
from jtsm_jax.train import setup
from jtsm_jax.types import Categories, InputError
from tests.configs import tiny
from tests.prediction_test import nothing
from tests.proposals.importers_test import entries_of, random_masks


def _config(root: pathlib.Path, data: str) -> ml_collections.ConfigDict:
  config = tiny.get_config("")
  config.data.prepared = str(root / data)
  config.proposals.store = str(root / "proposals")
  config.proposals.num_workers = 1
  return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Two data sets of equal names, ids and sizes, with other images."""
  root = tmp_path_factory.mktemp("run")
  for seed in (0, 1):
    source = shapes_source(seed=seed, num_train=2, num_val=1, side=64)
    prepare(source, root / f"data{seed}")
  return root


def test_data_sets_that_share_a_store_have_proposals_of_their_own(root):
  maps = []
  for seed in (0, 1, 0):
    config = _config(root, f"data{seed}")
    data = prepared.open_prepared(config.data.prepared)
    store = run.propose(config, root / "workdir", data)
    assert data.splits["train"].image_ids[0] == "train_00000"
    maps.append(store.get("train_00000").superpixels)
  assert maps[0].shape == maps[1].shape
  assert not np.array_equal(maps[0], maps[1])
  np.testing.assert_array_equal(maps[0], maps[2])


def test_proposals_from_elsewhere_that_have_changed(
  root, tmp_path, monkeypatch
):
  here = functools.partial(modes.proposals.fill_store_of, num_workers=0)
  monkeypatch.setattr(modes.proposals, "fill_store_of", here)
  config = _config(root, "data0")
  config.proposals.source = str(tmp_path / "sam.json")
  config.proposals.store = ""
  data = prepared.open_prepared(config.data.prepared)
  masks = random_masks(3, (64, 64))

  def propose(*chosen, **others):
    entries = [
      entry
      for split in data.splits.values()
      for image_id in (*split.image_ids, *others)
      for entry in entries_of(masks[list(chosen)], [1.0], image_id)
    ]
    (tmp_path / "sam.json").write_text(json.dumps(entries))
    store = run.propose(config, tmp_path, data)
    proposals = store.get("train_00000")
    np.testing.assert_array_equal(proposals.mask(0), masks[chosen[0]])
    return store.path.name

  first = propose(0)
  assert propose(1) != first
  assert propose(0) == first
  assert propose(0, new=True) == first  # of an image that is to be predicted


def _val_with(instances_of_record, directory, *, num_val=2):
  """Data of the task "instance" whose validation images have other truth."""
  source = things_only(shapes_source(num_train=1, num_val=num_val, side=64))
  val = [
    dataclasses.replace(record, instances=instances_of_record(record))
    for record in source.splits["val"]
  ]
  splits = {**source.splits, "val": val}
  prepare(dataclasses.replace(source, splits=splits), directory)
  return prepared.open_prepared(directory)


def test_quality_of_proposals_with_masks_of_instances_alone(
  tmp_path, monkeypatch, capsys
):
  here = functools.partial(modes.proposals.fill_store_of, num_workers=0)
  monkeypatch.setattr(modes.proposals, "fill_store_of", here)
  config = _config(tmp_path, "data")
  data = _val_with(lambda record: record.instances, tmp_path / "data")
  assert not data.splits["val"].has_targets
  modes.proposals.report_proposals(config, tmp_path, data)
  output = tmp_path / "proposal_quality"
  found = json.loads((output / "quality.json").read_text())["groups"]
  assert "stuff" not in found
  counts = [len(data.splits["val"].instances(n).category) for n in (0, 1)]
  assert found["things"]["segments"] == sum(counts) > 0
  assert found["things"]["J_i"][-1] > 0.3
  assert list((output / "images").glob("*.jpg"))
  assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(("pictures", "count"), [(0, 0), (2, 2), (9, 3)])
def test_there_are_as_many_pictures_as_were_asked_for(
  tmp_path, monkeypatch, pictures, count
):
  here = functools.partial(modes.proposals.fill_store_of, num_workers=0)
  monkeypatch.setattr(modes.proposals, "fill_store_of", here)
  config = _config(tmp_path, "data")
  config.evaluation.pictures = pictures
  data = _val_with(lambda r: r.instances, tmp_path / "data", num_val=3)
  modes.proposals.report_proposals(config, tmp_path, data)
  images = (tmp_path / "proposal_quality" / "images").glob("*.jpg")
  assert len(list(images)) == count

  def evaluate(predictions, source, *_, on_prediction, **options):
    for n, size in enumerate(source.sizes.tolist()):
      on_prediction(nothing(n, size, data.categories))
    return {}

  monkeypatch.setattr(modes.evaluation, "evaluate", evaluate)
  monkeypatch.setattr(modes.evaluation, "predictions", lambda *_: None)
  modes.evaluation._evaluate_val(
    config, tmp_path, None, None, data, {}, None, made_with={}
  )
  overlays = (tmp_path / "evaluation" / "overlays").glob("*.jpg")
  assert len(list(overlays)) == count


@pytest.mark.parametrize("truth", ["boxes alone", "no validation images"])
def test_quality_of_proposals_without_masks(tmp_path, truth):
  def without(record):
    has_boxes = truth == "boxes alone"
    boxes = dataclasses.replace(record.instances, rles=())
    return boxes if has_boxes else None

  data = _val_with(without, tmp_path / "data")
  with pytest.raises(InputError, match=f"{data.name!r} ha(s|ve) {truth}"):
    modes.proposals.report_proposals(_config(tmp_path, "data"), tmp_path, data)


def test_workdir_is_bound_to_data_that_lie_elsewhere(root, tmp_path):
  config = _config(root, "data0")
  run.claim_workdir(tmp_path, config)
  config.data.shapes.seed = 5
  with pytest.raises(InputError, match=r"data\.shapes\.seed = 5, there 0"):
    run.claim_workdir(tmp_path, config)
  # As long as nothing is prepared, nothing is fixed.
  config.data.prepared = str(root / "none")
  run.claim_workdir(tmp_path, config)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "data.shapes.seed",
      5,
      "data.shapes.seed = 0, and the configuration has 5",
    ),
    (
      "task",
      "detection",
      "classes = 'all', and the configuration has 'things'",
    ),
    ("data.name", "folder", "data.name = 'shapes'"),
  ],
)
def test_data_that_another_run_has_prepared(tmp_path, field, value, message):
  config = _config(tmp_path, "data")
  run.prepare(config, tmp_path / "a")
  run.prepare(config, tmp_path / "b")
  config.update_from_flattened_dict({field: value})
  with pytest.raises(InputError, match=f"{tmp_path}/data: .* with {message}"):
    run.prepare(config, tmp_path / "c")


def _one_image(root, names):
  """A folder of one's own, of one image that has all tags; cows are things."""
  (root / "images").mkdir(parents=True)
  Image.new("RGB", (8, 6)).save(root / "images" / "a.png")
  (root / "train_tags.json").write_text(json.dumps({"a.png": names}))
  classes = [
    {"id": n, "name": name, "isthing": int(name == "cow")}
    for n, name in enumerate(names)
  ]
  (root / "classes.json").write_text(json.dumps(classes))


@pytest.mark.parametrize(
  ("names", "task", "message"),
  [
    (
      ["cow"],
      "panoptic",
      "one class, 'cow'; wanted at least two.*no other tag$",
    ),
    (["cow", "grass"], "detection", "one class, 'cow'; .*stuff counts with"),
    (["grass"], "instance", "no class; .*stuff counts with"),
  ],
)
def test_one_class_cannot_be_learned(tmp_path, names, task, message):
  config, root = _config(tmp_path, "data"), tmp_path / "mine"
  _one_image(root, names)
  config.data.name, config.data.root, config.task = "folder", str(root), task
  with pytest.raises(InputError, match=f"'mine' has {message}"):
    run.prepare(config, tmp_path / "run")
  assert not (tmp_path / "data").exists()


def test_one_class_that_is_prepared_cannot_be_learned(tmp_path):
  config = _config(tmp_path, "data")
  _one_image(tmp_path / "mine", ["cow"])
  config.data.name, config.data.root = "folder", str(tmp_path / "mine")
  prepare(folder_source(config.data.root), tmp_path / "data")
  with pytest.raises(InputError, match="'mine' has one class, 'cow'; wanted"):
    run.prepare(config, tmp_path / "run")


def test_settings_tell_voc_sets_apart():
  config = _config(pathlib.Path(), "data")
  config.data.name = "voc_panoptic"
  config.data.sbd = "somewhere"
  settings = data_settings(config)
  config.data.sbd = "elsewhere"
  assert data_settings(config) == settings
  for field, value in [
    ("data.sbd", ""),
    ("data.year", "2007"),
    ("data.annotation_source", "sbd"),
    ("data.train_set", "train"),
    ("data.name", "voc_detection"),
    ("task", "instance"),
  ]:
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({field: value})
    assert data_settings(other) != settings, field


def test_caches_of_a_trained_workdir_may_move(root, tmp_path, monkeypatch):
  config = _config(root, "data0")
  run.claim_workdir(tmp_path, config)
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  config.backbone.cache_dir = config.reestimation.cache_dir = "elsewhere"
  run.claim_workdir(tmp_path, config)
  config.reestimation.iterations += 1
  with pytest.raises(InputError, match=r"reestimation\.iterations = "):
    run.claim_workdir(tmp_path, config)


def test_first_weights_may_be_left_out_once_there_is_a_checkpoint(
  root, tmp_path, monkeypatch
):
  config = _config(root, "data0")
  plain = config.copy_and_resolve_references()
  for name in ("a", "b"):  # before the first checkpoint the last one counts
    config.train.init_from, config.train.init_skip = name, ("params/heads/",)
    run.claim_workdir(tmp_path, config)
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  run.claim_workdir(tmp_path, plain)
  run.claim_workdir(tmp_path, config)  # and what it began with is still known
  for field, value, message in (
    ("init_from", "c", r"train\.init_from = 'c', there 'b'"),
    ("init_skip", ("params/",), r"train\.init_skip = \['params/'\], there"),
  ):
    other = config.copy_and_resolve_references()
    other.train[field] = value
    with pytest.raises(InputError, match=message):
      run.claim_workdir(tmp_path, other)


@pytest.mark.parametrize("field", ["data.root", "data.sbd", "proposals.source"])
def test_paths_are_the_same_in_any_spelling(root, tmp_path, monkeypatch, field):
  def claim(value):
    config = _config(root, "data0")
    config.update_from_flattened_dict({field: value})
    run.claim_workdir(tmp_path / "run", config)

  (tmp_path / "mine").mkdir()
  (tmp_path / "link").symlink_to("mine")
  monkeypatch.chdir(tmp_path)
  claim("mine")
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  for value in ("mine/", "./mine", "link", f"{tmp_path}/other/../mine"):
    claim(value)
  for value in ("other", "mine/mine", "memory://mine"):
    with pytest.raises(InputError, match=f"{field} = '{value}', there 'mine'"):
      claim(value)


def test_paths_lead_to_the_same_place_from_other_folders(
  root, tmp_path, monkeypatch
):
  home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
  for folder in (home / "models", elsewhere):
    folder.mkdir(parents=True)
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setattr(run, "audit_data", lambda config, _: seen.append(config))
  seen = []
  config = _config(root, "data0")
  config.data.root, config.proposals.store = "mine", "memory://proposals"
  config.backbone.pretrained = "~/models/weights.safetensors"
  config.backbone.width, config.backbone.norm = 1.0, "frozen"
  monkeypatch.chdir(home)
  run.run(config, tmp_path / "run", mode="audit")
  assert seen[0].data.root == str(home / "mine")
  assert seen[0].proposals.store == "memory://proposals"
  assert config.data.root == "mine"  # the caller's stays
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  monkeypatch.chdir(elsewhere)
  config.data.root = ""
  config.backbone.pretrained = str(home / "models/weights.safetensors")
  run.run(config, tmp_path / "run", mode="audit")
  assert seen[1].data.root == str(home / "mine")
  config.data.root = "mine"
  with pytest.raises(InputError, match=r"data\.root"):
    run.run(config, tmp_path / "run", mode="audit")


def test_names_of_weights_are_no_paths(root, tmp_path, monkeypatch):
  monkeypatch.setattr(run, "audit_data", lambda config, _: seen.append(config))
  seen = []
  config = _config(root, "data0")
  config.backbone.name, config.backbone.pretrained = (
    "efficientnet_lite0",
    "imagenet",
  )
  config.backbone.stride, config.backbone.outputs = 16, ("head",)
  run.run(config, tmp_path, mode="audit")
  assert seen[0].backbone.pretrained == "imagenet"


def test_urls_are_compared_as_they_are(root, tmp_path, monkeypatch):
  config = _config(root, "data0")
  config.data.root = "gs://bucket/mine"  # and nothing is asked of it
  run.claim_workdir(tmp_path, config)
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  run.claim_workdir(tmp_path, config)
  config.data.root = "gs://bucket/other"
  with pytest.raises(InputError, match=r"data\.root = 'gs://bucket/other'"):
    run.claim_workdir(tmp_path, config)


def test_a_trained_workdir_knows_where_its_data_lie(
  root, tmp_path, monkeypatch
):
  config = _config(root, "data0")
  plain = config.copy_and_resolve_references().lock()
  config.data.root, config.data.sbd = "mine", "sbd"
  run.claim_workdir(tmp_path, config)
  with pytest.raises(InputError, match=r"data\.root = '', there 'mine'"):
    run.claim_workdir(tmp_path, plain)
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  found = run.claim_workdir(tmp_path, plain)
  assert (found.data.root, found.data.sbd) == ("mine", "sbd")
  assert plain.data.root == ""
  # What a mode is given is that.
  given = []
  monkeypatch.setattr(run, "export", lambda config, _: given.append(config))
  run.run(plain, tmp_path, mode="export")
  assert given[0].data.root == "mine"
  # It is not known where other settings are.
  plain.proposals.preset = "fast"
  with pytest.raises(InputError, match=r"proposals\.preset = 'fast', there"):
    run.claim_workdir(tmp_path, plain)


def test_a_schedule_is_checked_until_something_is_trained(
  root, tmp_path, monkeypatch
):
  config = _config(root, "data0")
  config.reestimation.start = config.train.steps
  with pytest.raises(InputError, match=r"config\.reestimation\.start is 12"):
    run.run(config, tmp_path, mode="audit")
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  run.run(config, tmp_path, mode="audit")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"backbone.freeze": "all", "backbone.pretrained": ""},
      r"config\.backbone: .*stays random",
    ),
    (
      {"backbone.pretrained": "nothing.pth"},
      r"config\.backbone\.pretrained: there is no file .*nothing\.pth",
    ),
    (
      {"train.init_from": "nothing"},
      "--init_from=.*nothing: there is no check",
    ),
  ],
)
@pytest.mark.parametrize("mode", ["all", "train"])
def test_what_a_training_starts_with_is_looked_for_before_anything_is_made(
  root, tmp_path, monkeypatch, fields, message, mode
):
  monkeypatch.chdir(tmp_path)
  config = _config(root, "data0")
  config.backbone.update(width=1.0, norm="frozen")
  config.warm_up.steps = 0
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=message):
    run.run(config, tmp_path / "work", mode=mode)
  assert not [*tmp_path.iterdir()]
  # What needs no weights is done all the same.
  run.run(config, tmp_path / "work", mode="audit")


def test_settings_of_a_run_that_trains_stay(root, tmp_path, monkeypatch):
  config = _config(root, "data0")
  run.propose(config, tmp_path, prepared.open_prepared(config.data.prepared))
  path = tmp_path / "config.json"

  def told():
    return json.loads(path.read_text())["train"]["learning_rate"]

  rate = config.train.learning_rate
  second = config.copy_and_resolve_references()
  second.train.learning_rate = rate / 2

  def train_while_others_start(*args, **kwargs):
    assert told() == rate
    with pytest.raises(InputError, match="another process trains there"):
      run.run(second, tmp_path, mode="train")
    run.run(second, tmp_path, mode="propose")
    assert told() == rate
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)

  monkeypatch.setattr(run, "run_training", train_while_others_start)
  # Before it trains, they may still change.
  run.claim_workdir(tmp_path, second)
  run.run(config, tmp_path, mode="train")
  run.claim_workdir(tmp_path, config)


def test_settings_are_compared_again_before_training(
  root, tmp_path, monkeypatch
):
  # Another one has trained in the time that the proposals have taken.
  config = _config(root, "data0")
  other = config.copy_and_resolve_references()
  other.train.learning_rate /= 2
  propose = run.propose

  def propose_while_another_trains(*args):
    run.claim_workdir(tmp_path, other)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    return propose(*args)

  monkeypatch.setattr(run, "propose", propose_while_another_trains)
  with pytest.raises(InputError, match="belongs to a run of other settings"):
    run.run(config, tmp_path, mode="train")


@pytest.fixture(scope="module")
def trained(root):
  """(configuration, workdir) of a run of two steps. Only to be read."""
  config = _config(root, "data0")
  config.warm_up.steps = config.train.evaluate_every = 0
  config.train.steps, config.train.checkpoint_every = 2, 1
  config.reestimation.start, config.reestimation.lag = 0, 1
  config.evaluation.calibrate = False
  run.run(config, root / "trained", mode="train")
  return config, root / "trained"


def test_a_finished_run_tells_that_it_learns_nothing(trained, root, capsys):
  config, workdir = trained
  run.run(config, workdir, mode="train")
  assert capsys.readouterr().out.endswith("train: all 2 steps are done\n")
  config = config.copy_and_resolve_references()
  config.data.prepared = str(root / "data1")
  run.run(config, workdir, mode="train")
  said = capsys.readouterr().out.splitlines()[-1]
  assert "all 2 steps are done, with other training images" in said
  assert "nothing is learned from" in said
  assert said.endswith(f"another --workdir, with --init_from={workdir}")


def test_a_finished_run_tells_that_its_proposals_are_others(
  trained, tmp_path, monkeypatch, capsys
):
  shutil.copytree(trained[1], tmp_path / "run")
  monkeypatch.setattr("jtsm_jax.proposals.generate.VERSION", "next")
  run.run(trained[0], tmp_path / "run", mode="train")
  said = capsys.readouterr().out.splitlines()[-1]
  assert "with other training images, tags or proposals than before" in said


def test_segments_of_images_before_are_not_those_of_new_ones(
  trained, root, tmp_path, monkeypatch, capsys
):
  config = trained[0].copy_and_resolve_references()
  begun, batches_from = [], setup.batches_from

  def spy(run, step, **options):
    begun.append(step)
    return batches_from(run, step, **options)

  monkeypatch.setattr(setup, "batches_from", spy)
  for data, steps in (("data0", [0, 1]), ("data1", [1])):
    shutil.copytree(trained[1], tmp_path / data)
    shutil.rmtree(tmp_path / data / "checkpoints" / "2")
    config.data.prepared = str(root / data)
    begun.clear()
    run.run(config, tmp_path / data, mode="train")
    said = capsys.readouterr().out
    assert ("from step 1 of 2, with other training" in said) == (len(steps) < 2)
    assert begun == steps  # those before are of segments that wait


@pytest.mark.parametrize("mode", ["train", "evaluate", "report"])
def test_classes_in_another_order_are_refused(trained, root, tmp_path, mode):
  config, workdir = trained
  source = shapes_source(seed=0, num_train=2, num_val=1, side=64)
  items = list(source.categories.items)
  items[0], items[1] = items[1], items[0]
  swapped = dataclasses.replace(source, categories=Categories(tuple(items)))
  prepare(swapped, tmp_path / "data")
  config = config.copy_and_resolve_references()
  config.data.prepared = str(tmp_path / "data")
  with pytest.raises(InputError, match=r"the weights are of .* things\[0\] is"):
    run.run(config, workdir, mode=mode)


def test_predictions_and_exports_need_no_data(trained, tmp_path, monkeypatch):
  config, workdir = trained[0].copy_and_resolve_references(), tmp_path / "run"
  shutil.copytree(trained[1], workdir)
  config.data.prepared = str(tmp_path / "none")
  Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
  here = functools.partial(modes.proposals.fill_store_of, num_workers=0)
  found = nothing(0, (32, 48), SHAPES_CATEGORIES)
  exported = []
  for module, name, value in (
    (modes.prediction, "fill_store_of", here),
    (modes.prediction, "predict", lambda *_, **__: [found]),
    (modes.export, "export_model", lambda *_, **given: exported.append(given)),
  ):
    monkeypatch.setattr(module, name, value)
  run.run(config, workdir, mode="predict", images=str(tmp_path / "a.png"))
  (panoptic,) = (workdir / "predictions").glob("*/panoptic.json")
  told = json.loads(panoptic.read_text())["categories"]
  assert Categories.from_list(told) == SHAPES_CATEGORIES
  run.run(config, workdir, mode="export")
  assert exported[0]["categories"] == SHAPES_CATEGORIES
  # Older checkpoints do not tell their classes.
  monkeypatch.setattr("jtsm_jax.train.origin.told_by", lambda path: {})
  with pytest.raises(InputError, match="none: holds no prepared data set"):
    run.run(config, workdir, mode="export")
  run.run(trained[0], workdir, mode="export")
  assert exported[1]["categories"] == SHAPES_CATEGORIES


def test_the_devices_are_told_once(root, tmp_path, monkeypatch, capsys):
  config = _config(root, "data0")
  line = f"devices: {jax.device_count()} x cpu (cpu)"
  for name in ("run_training", "run_evaluation"):
    monkeypatch.setattr(run, name, lambda *args, **kwargs: None)
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  for mode in ("train", "evaluate", "all"):
    run.run(config, tmp_path, mode=mode)
    assert capsys.readouterr().out.splitlines().count(line) == 1
  run.run(config, tmp_path, mode="propose")
  assert "devices" not in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """What a mesh looks at."""

  id: int
  process_index: int = 0
  device_kind: str = "H100"
  platform: str = "gpu"


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"train.batch_size": 8}, "8 x H100 (cpu)"),
    (
      {"train.batch_size": 4},
      "4 of 8 x H100 (cpu); config.train.batch_size=8 would use all",
    ),
    (
      {"train.batch_size": 12, "train.accumulation": 2},
      "6 of 8 x H100 (cpu); config.train.batch_size=16 would use all",
    ),
    (
      {"train.batch_size": 2, "train.model_parallel": 2},
      "4 of 8 x H100 (cpu); config.train.batch_size=4 would use all",
    ),
    (
      {"train.batch_size": 8, "warm_up.batch_size": 12, "warm_up.steps": 1},
      "4 of 8 x H100 (cpu); config.warm_up.batch_size=16 would use all",
    ),
    (
      {"train.batch_size": 3, "warm_up.batch_size": 6, "warm_up.steps": 1},
      "3 of 8 x H100 (cpu); config.train.batch_size=8 and"
      " config.warm_up.batch_size=8 would use all",
    ),
  ],
)
def test_devices_that_are_idle_are_told(
  root, tmp_path, monkeypatch, capsys, fields, told
):
  gpus = [_Gpu(n) for n in range(8)]
  monkeypatch.setattr(jax, "devices", lambda: gpus)
  monkeypatch.setattr(jax, "device_count", lambda: len(gpus))
  for name in ("run_training", "run_evaluation"):
    monkeypatch.setattr(run, name, lambda *args, **kwargs: None)
  config = _config(root, "data0")
  config.update_from_flattened_dict({"warm_up.steps": 0} | fields)
  run.run(config, tmp_path, mode="train")
  assert f"devices: {told}" in capsys.readouterr().out.splitlines()
  config.update_from_flattened_dict(setup.sizes_for_all_devices(config))
  assert setup.mesh_of(config).size == 8
  monkeypatch.setattr(run, "_is_trained", lambda workdir: True)
  run.run(config, tmp_path / "trained", mode="evaluate")
  assert "devices: 1 of 8 x H100 (cpu)" in capsys.readouterr().out.splitlines()


def test_a_first_checkpoint_that_was_not_finished_binds_nothing(root, tmp_path):
  config = _config(root, "data0")
  run.claim_workdir(tmp_path, config)
  # What a killed process leaves: a folder without its last rename.
  (tmp_path / "checkpoints" / "500.orbax-checkpoint-tmp").mkdir(parents=True)
  config.train.learning_rate = 0.5
  run.claim_workdir(tmp_path, config)
  with pytest.raises(InputError, match="there are no checkpoints"):
    run.run(config, tmp_path, mode="evaluate")
  (tmp_path / "checkpoints" / "500").mkdir()
  config.train.learning_rate = 0.25
  with pytest.raises(InputError, match=r"learning_rate = 0\.25, there 0\.5"):
    run.claim_workdir(tmp_path, config)


def test_data_and_proposals_in_a_bucket(root, bucket, tmp_path, monkeypatch):
  """All that training needs of them, with nothing of their own on the disk."""
  config = _config(bucket, "data")
  data = run.prepare(config, tmp_path, shard=0, num_shards=1)
  store = run.propose(config, tmp_path, data)
  assert not list(tmp_path.glob("data*")) + list(tmp_path.glob("proposals*"))
  assert len(store) == sum(map(len, data.splits.values()))
  split = data.splits["train"]
  canvas, options = (64, 64), {"max_proposals": 32, "max_superpixels": 24}
  batches = inference_batches(
    split, store, canvases=(canvas,), batch_size=2, **options
  )
  assert sum(batch.valid.any(1).sum() for batch in batches) == len(split) == 12
  run.audit_data(config, tmp_path)
  run.verify_data(config, tmp_path)
  # The raw data are no longer asked for.
  monkeypatch.setattr("jtsm_jax.modes.data.data_source", None)
  assert run.prepare(config, tmp_path).fingerprint == data.fingerprint
