"""Predicting within this process, with a made-up model."""

import functools
import json
import types

import numpy as np
import pytest
import scipy.io
from PIL import Image

from jtsm_jax.evaluation.class_calibration import ClassCalibration
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.modes import prediction
from jtsm_jax.modes.proposals import fill_store_of
from jtsm_jax.types import Detections, InputError, PanopticMap
from tests.configs import tiny
from tests.proposals.importers_test import entries_of, mat_content
from tests.reporting.predictions_test import CATEGORIES


def save(path, value=0, size=(20, 24)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def nothing(index, size, categories=CATEGORIES):
  """The prediction of an image in which nothing was found."""
  none = np.zeros(0, np.int32)
  return Prediction(
    index=index,
    panoptic=PanopticMap(np.zeros(size, np.int32), ()),
    detections=Detections(
      proposal=none,
      category=none,
      score=none.astype(np.float32),
      boxes=np.zeros((0, 4), np.int32),
      rles=(),
      size=tuple(size),
    ),
    best=None,
    scores=np.zeros((0, len(categories)), np.float32),
    image_scores=np.zeros(len(categories), np.float32),
  )


@pytest.fixture
def workdir(tmp_path):
  return tmp_path / "run"


@pytest.fixture
def predict(monkeypatch, workdir):
  """Predicts an input; proposals by the names of what was not done already."""
  config = tiny.get_config()
  todo = {}

  def made_up(steps, source, store, **settings):
    for n, (name, id_) in enumerate(
      zip(source.names, source.image_ids, strict=True)
    ):
      todo[name] = store.get(id_) if id_ in store else None
      yield nothing(n, source.sizes[n].tolist())

  trained = types.SimpleNamespace(
    categories=CATEGORIES,
    key={"step": 1},
    model=None,
    variables=None,
    calibration=ClassCalibration.neutral(len(CATEGORIES)),
  )
  for name, value in {
    "load_trained": lambda *_: trained,
    "steps_of": lambda *_: None,
    "fill_store_of": functools.partial(fill_store_of, num_workers=0),
    "predict": made_up,
  }.items():
    monkeypatch.setattr(f"jtsm_jax.modes.prediction.{name}", value)

  def function(
    where,
    *,
    step=1,
    instance_score=0.5,
    calibrate=True,
    threshold=0.0,
    scale=1.0,
    **proposals,
  ):
    todo.clear()
    config.evaluation.calibrate = calibrate
    trained.key["step"] = step
    trained.calibration.tag_threshold[-1] = threshold
    trained.calibration.score_scale[-1] = scale
    config.evaluation.instance_score = instance_score
    config.proposals.update(proposals)
    prediction.predict_images(config, workdir, str(where))
    return todo.copy()

  return function


def listed(folder):
  """Names and file names that panoptic.json tells."""
  images = json.loads((folder / "panoptic.json").read_text())["images"]
  return {image["id"]: image["file_name"] for image in images}


def test_inputs_of_one_name_have_folders_of_their_own(
  predict, workdir, tmp_path, monkeypatch
):
  for day in ("day1", "day2"):
    save(tmp_path / day / "images" / "a.png")
    assert [*predict(tmp_path / day / "images")] == ["a"]
  first = workdir / "predictions" / "images"
  (second,) = set(first.parent.iterdir()) - {first}
  assert second.name.startswith("images-")
  for day, folder in (("day1", first), ("day2", second)):
    images = tmp_path / day / "images"
    assert (folder / "input.txt").read_text() == f"{images}\n"
    assert listed(folder) == {"a": "a.png"}
    # By any spelling it is found again, and what is done is done.
    before = (folder / "records" / "a.json").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path / day)
    for where in ("images", f"{images}/", "images/*", images / "a.png"):
      assert not predict(where)
    assert (folder / "records" / "a.json").stat().st_mtime_ns == before
  assert len(list(first.parent.iterdir())) == 2


def test_a_folder_that_nobody_claims_is_left_alone(predict, workdir, tmp_path):
  old = workdir / "predictions" / "images"
  (old / "records").mkdir(parents=True)
  (old / "records" / "a.json").write_text("{}")
  save(tmp_path / "images" / "a.png")
  assert [*predict(tmp_path / "images")] == ["a"]
  assert (old / "records" / "a.json").read_text() == "{}"
  assert len(list(old.parent.iterdir())) == 2


def test_a_pattern_belongs_to_the_folder_before_its_first_star(
  predict, workdir, tmp_path, monkeypatch
):
  photos, folder = tmp_path / "photos", workdir / "predictions" / "photos"
  save(photos / "a" / "1.png")
  assert [*predict(photos / "**" / "*.png")] == ["a_1"]
  assert listed(folder) == {"a_1": "a/1.png"}
  save(photos / "b" / "1.png")
  save(photos / "2.png")
  monkeypatch.chdir(tmp_path)
  assert [*predict("photos/**/*")] == ["2", "b_1"]
  everything = {"2": "2.png", "a_1": "a/1.png", "b_1": "b/1.png"}
  assert listed(folder) == everything
  # The folder alone says nothing of those in its folders, but of its own.
  (photos / "2.png").unlink()
  save(photos / "3.png")
  assert [*predict(photos)] == ["3"]
  del everything["2"]
  assert listed(folder) == everything | {"3": "3.png"}


def test_results_of_other_settings_or_of_no_image_are_not_listed(
  predict, workdir, tmp_path, capsys
):
  photos, folder = tmp_path / "photos", workdir / "predictions" / "photos"
  for name in ("1", "2", "sub/3", "sub/4"):
    save(photos / f"{name}.png")

  def told():
    """What panoptic.json lists, and how many images it is said to lack."""
    out = capsys.readouterr().out
    lines = [x for x in out.splitlines() if x.startswith("not listed")]
    return [*listed(folder)], [int(line.split()[2]) for line in lines]

  everything = photos / "**" / "*"
  predict(everything)
  assert told() == (["1", "2", "sub_3", "sub_4"], [])
  (photos / "2.png").unlink()
  predict(everything)
  assert told() == (["1", "sub_3", "sub_4"], [1])
  save(photos / "sub" / "4.png", 9)  # is another picture now
  predict(photos)
  assert told() == (["1", "sub_3"], [2])
  for change in (
    {"step": 2},
    {"instance_score": 0.9},
    {"threshold": 0.1},
    {"scale": 0.9},
  ):
    predict(photos / "1.png", **change)
    assert told() == (["1"], [3])
  # What a call before left is no hindrance, and is there again with its own.
  (folder / "records" / "2.json").write_text("{")
  assert [*predict(photos / "1.png")] == ["1"]
  assert told() == (["1", "sub_3"], [2])


@pytest.mark.parametrize("calibrate", [False, True])
def test_records_that_do_not_tell_their_calibration(
  predict, workdir, tmp_path, calibrate
):
  save(tmp_path / "photos" / "a.png")
  assert [*predict(tmp_path / "photos", calibrate=calibrate)] == ["a"]
  path = workdir / "predictions" / "photos" / "records" / "a.json"
  record = json.loads(path.read_text())
  record["made_with"].pop("calibration", None)  # as in older versions
  path.write_text(json.dumps(record))
  found = predict(tmp_path / "photos", calibrate=calibrate)
  assert [*found] == ["a"] * calibrate  # without one there is none to tell


def test_a_result_is_not_overwritten_by_another_image_of_its_name(
  predict, workdir, tmp_path
):
  photos = tmp_path / "photos"
  save(photos / "a" / "1.png")
  save(photos / "a_1.jpg", 9)
  predict(photos)
  with pytest.raises(InputError, match=r"(?s)a/1\.png' and .*a_1\.jpg' would"):
    predict(photos / "a*" / "*")
  assert listed(workdir / "predictions" / "photos") == {"a_1": "a_1.jpg"}
  # Unless that is gone, even if it is the same picture.
  (photos / "a_1.jpg").rename(photos / "a" / "1.png")
  assert [*predict(photos / "a*" / "*")] == ["a_1"]
  assert listed(workdir / "predictions" / "photos") == {"a_1": "a/1.png"}


def test_images_of_one_name_in_a_bucket(predict, workdir, tmp_path, bucket):
  save(tmp_path / "1.png")
  for day in ("day1", "day2"):
    place = bucket / day / "images" / "sub" / "1.png"
    place.fs.pipe_file(place.path, (tmp_path / "1.png").read_bytes())
    assert [*predict(f"{bucket}/{day}/images/**/*")] == ["sub_1"]
    assert [*predict(f"{bucket}/{day}/images/**/*")] == []
  folders = list((workdir / "predictions").iterdir())
  assert len(folders) == 2
  for folder in folders:
    assert listed(folder) == {"sub_1": "sub/1.png"}


@pytest.mark.parametrize("form", ["mat", "json"])
def test_proposals_from_elsewhere(predict, tmp_path, form):
  for n, name in enumerate(("a.png", "sub/b c.png", "sub/007.jpg")):
    save(tmp_path / "photos" / name, n)
  where = tmp_path / "photos" / "**" / "*"
  names = ["a", "sub_007", "sub_b_c"]
  mask = np.zeros((20, 24), bool)
  mask[3:9, 5:20] = True
  if form == "mat":
    source = tmp_path / "mcg"
    source.mkdir()
    content = mat_content()
    cells = content["superpixels"].repeat(7, 0).repeat(6, 1)[:20]
    for name in names:
      scipy.io.savemat(source / f"{name}.mat", content | {"superpixels": cells})
  else:
    source = tmp_path / "sam.json"
    entries = [e for name in names for e in entries_of([mask], [1], name)]
    source.write_text(json.dumps(entries))
  found = predict(where, source=str(source))
  assert sorted(found) == names
  assert all(len(proposals) for proposals in found.values())
  if form == "json":
    p = found["sub_b_c"]
    np.testing.assert_array_equal(p.mask(0), mask)
    # Those of one image are corrected: it is predicted again, with them.
    assert not predict(where)
    entries[-1] = entries_of([~mask], [1], names[-1])[0]
    source.write_text(json.dumps(entries))
    found = predict(where)
    assert [*found] == ["sub_b_c"]
    np.testing.assert_array_equal(found["sub_b_c"].mask(0), ~mask)
  # Another image needs some of its own.
  save(tmp_path / "photos" / "new.png")
  assert predict(where) == {"new": None}
