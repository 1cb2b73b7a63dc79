"""Which measures each task has, and that they see the right ground truth."""

import dataclasses

import numpy as np
import pytest

from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.data.things import instances_of
from jtsm_jax.evaluation import evaluate as evaluation
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.evaluation.tables import (
  MAIN_MEASURE,
  final_table,
  main_measures,
)
from jtsm_jax.types import (
  Categories,
  Category,
  Detections,
  InputError,
  PanopticMap,
  Segment,
)
from tests.run_lengths import pack

CATEGORIES = Categories(
  (
    Category(1, "cow", True),
    Category(2, "dog", True),
    Category(3, "sky", False),
  )
)
IDS = np.zeros((40, 60), np.int32)
IDS[5:20, 5:30], IDS[25:40, 35:55], IDS[:4] = 1, 2, 3
TRUTH = PanopticMap(
  IDS,
  (
    Segment(1, 0, True, 1.0, 15 * 25),
    Segment(2, 1, True, 1.0, 15 * 20),
    Segment(3, 2, False, 1.0, 4 * 60),
  ),
)


@dataclasses.dataclass
class Truth:
  """A split of one image."""

  panoptic: PanopticMap | None = None
  things: object = None
  image_ids = ("a",)

  def __len__(self):
    return len(self.image_ids)

  def target(self, i):
    return self.panoptic

  def instances(self, i):
    return self.things

  @property
  def has_targets(self):
    return self.panoptic is not None

  @property
  def has_instances(self):
    return self.things is not None


def predictions():
  """The cow is right, the dog is found a quarter too large, the sky missed."""
  masks = np.stack([IDS == 1, IDS == 2])
  masks[1, 25:40, 30:35] = True
  ids = np.where(masks[0], 1, np.where(masks[1], 2, 0)).astype(np.int32)
  detections = Detections(
    proposal=np.array([0, 1], np.int32),
    category=np.array([0, 1], np.int32),
    score=np.array([0.9, 0.8], np.float32),
    boxes=np.array([[5, 5, 20, 30], [25, 30, 40, 55]], np.int32),
    **pack(masks),
  )
  yield Prediction(
    index=0,
    panoptic=PanopticMap(
      ids, (Segment(1, 0, True, 0.9, 375), Segment(2, 1, True, 0.8, 375))
    ),
    detections=detections,
    best=detections,
    scores=np.zeros((2, 3), np.float32),
    image_scores=np.zeros(3, np.float32),
  )


def run(truth, task, **options):
  return evaluation.evaluate(
    predictions(), truth, CATEGORIES, task=task, **options
  )


def test_panoptic_by_hand():
  seen = []
  result = run(Truth(TRUTH), "panoptic", on_prediction=seen.append)
  assert len(seen) == 1
  # IoU 1 and 300 / 375; the sky is missed. The void that the dog covers is
  # taken out of its union: 300 / 300.
  assert result["things"]["pq"] == pytest.approx(100)
  assert result["all"]["pq"] == pytest.approx(100 * 2 / 3)
  assert result["voc"]["map75"] == 100
  # The dog counts at 0.5, 0.55, ... 0.8: 7 of 10.
  assert result["coco"]["ap"] == pytest.approx(100 * (1 + 0.7) / 2, abs=0.01)
  assert main_measures(result)["pq"] == result["all"]["pq"]
  assert next(iter(main_measures(result))) == MAIN_MEASURE["panoptic"]
  assert main_measures(result)["corloc"] == 100  # both boxes are right
  table = final_table(result)
  assert "mIoU" in table
  assert "AP@50 100.0" in table


def test_what_is_mined_in_the_wrong_place():
  # The dog is where the cow was found, and the cow where the dog was.
  ids = np.where(IDS == 2, 1, np.where(IDS == 1, 2, IDS)).astype(np.int32)
  swapped = PanopticMap(ids, TRUTH.segments)
  result = run(Truth(swapped), "panoptic")
  assert result["localisation"]["corloc"] == 0


def test_instances_come_from_the_map_or_from_their_own_file():
  wanted = run(Truth(TRUTH), "instance")
  assert "all" not in wanted
  assert run(Truth(things=instances_of(TRUTH)), "instance") == wanted
  lines = final_table(wanted).splitlines()
  assert lines[0].split() == ["AP@25", "AP@50", "AP@70", "AP@75", "objects"]
  assert lines[4].split() == ["cow", "100.0", "100.0", "100.0", "100.0", "1"]
  # Of 375 and 300 pixels: both are small.
  coco = "COCO: AP 85.0  AP50 100.0  AP75 100.0  AP small 85.0  AP medium -"
  assert lines[-1] == f"masks of things, {coco}  AP large -"
  assert next(iter(main_measures(wanted).values())) == 100


def test_instances_alone_measure_things_of_the_panoptic_task():
  things = Truth(things=instances_of(TRUTH))
  result = run(things, "panoptic")
  assert result == run(things, "instance")
  assert next(iter(main_measures(result))) == MAIN_MEASURE[result["task"]]
  assert "AP@50" in final_table(result)


def test_boxes_need_no_masks():
  things = dataclasses.replace(instances_of(TRUTH), rles=())
  result = run(Truth(things=things), "detection", voc_metric="11point")
  assert result["voc"]["metric"] == "11point"
  assert result["voc"]["map"] == pytest.approx(100)
  corloc = evaluation.localisation(
    predictions(), Truth(things=things), CATEGORIES
  )
  assert corloc["corloc"] == 100
  lines = final_table(result, corloc).splitlines()
  assert lines[0].split() == ["AP", "objects", "CorLoc"]
  assert lines[4].split() == ["cow", "100.0", "1", "100.0"]
  lines = final_table({"task": "detection"}, corloc).splitlines()
  assert lines[0].split() == ["CorLoc", "images"]
  assert lines[4].split() == ["cow", "100.0", "1"]


@pytest.mark.parametrize("task", ["panoptic", "instance", "detection"])
def test_there_is_no_figure_of_no_object(task):
  nothing = PanopticMap(np.zeros_like(IDS), ())
  result = run(Truth(nothing), task)
  corloc = result["localisation"]
  table = final_table(result, corloc)
  assert "0.0" not in table
  ends = {
    "panoptic": "masks of things, VOC: AP@25 -  AP@50 -  AP@70 -  AP@75 -",
    "instance": "masks of things",
    "detection": "boxes",
  }
  assert ends[task] in table
  sizes = "AP -  AP50 -  AP75 -  AP small -  AP medium -  AP large -"
  assert table.endswith(f"COCO: {sizes}")
  lines = final_table({"task": task}, corloc).splitlines()
  assert lines[2].split() == ["Mean", "-", "0"]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_boxes_alone_measure_the_detections_of_other_tasks(task):
  boxes = Truth(things=dataclasses.replace(instances_of(TRUTH), rles=()))
  result = run(boxes, task)
  assert result == run(boxes, "detection")
  assert result["task"] == "detection"


def data_of(val):
  return PreparedData("mine", CATEGORIES, {"val": val})


def test_what_is_not_there():
  nothing = Truth()
  for task, what in (("panoptic", "panoptic map"), ("detection", "boxes")):
    assert not evaluation.has_truth(data_of(nothing))
    with pytest.raises(InputError, match=f"image a has no {what}"):
      run(nothing, task)
  boxes = Truth(things=instances_of(TRUTH))
  assert evaluation.has_truth(data_of(boxes))
  assert evaluation.has_truth(data_of(Truth(TRUTH)))
  assert not evaluation.has_truth(PreparedData("mine", CATEGORIES, {}))
  with pytest.raises(ValueError, match="task is 'other'"):
    run(boxes, "other")
