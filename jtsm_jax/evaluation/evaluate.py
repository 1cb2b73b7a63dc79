"""Runs a split with ground truth and reports the measures of a task."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from jtsm_jax.data.prepared import PreparedData, RecordSource
from jtsm_jax.data.things import instances_of
from jtsm_jax.evaluation import instance_ap
from jtsm_jax.evaluation.instance_ap import InstanceAP, VocInstanceAP
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.evaluation.semantic_iou import SemanticIoU
from jtsm_jax.evaluation.voc_detection import CorLoc, VocDetection
from jtsm_jax.types import Categories, InputError, Instances

TASKS = ("panoptic", "instance", "detection")


def evaluate(
  predictions: Iterable[Prediction],
  source: RecordSource,
  categories: Categories,
  *,
  task: str,
  voc_metric: str = "area",
  on_prediction: Callable[[Prediction], None] = lambda prediction: None,
) -> dict[str, Any]:
  """The measures that the literature reports of a task.

  Args:
    predictions: of the images of `source`.
    source: with ground truth.
    categories: the classes.
    task: "panoptic": PQ, SQ and RQ, mIoU, and what "instance" has;
      "instance": COCO's AP of masks, and mAP^r of VOC;
      "detection": COCO's AP of boxes, and mAP of VOC.
      What is measured is that of `measured_task`.
    voc_metric: of VOC's mAP of boxes: "11point" for 2007, "area" from 2010 on.
    on_prediction: called with each prediction, to keep or draw it.

  Returns:
    {"task": the measured one}, the result of `PanopticQuality` and {"semantic":
    `SemanticIoU`, "coco": `InstanceAP`, "voc": `VocInstanceAP` or
    `VocDetection`}, what the task has of them; and {"localisation": `CorLoc`},
    which tells, of the images that have a thing, how many have it mined.

  Raises:
    InputError: an image of the split has no ground truth for the task.
    ValueError: there is no such task.
  """
  if task not in TASKS:
    raise ValueError(f"task is {task!r}, wanted one of {TASKS}")
  task = measured_task(source, task)
  of_masks = task != "detection"
  quality, semantic = PanopticQuality(categories), SemanticIoU(categories)
  coco = InstanceAP(
    categories,
    kind="segm" if of_masks else "bbox",
    fast=instance_ap.hotcoco is not None,
  )
  voc = (
    VocInstanceAP(categories)
    if of_masks
    else VocDetection(categories, metric=voc_metric)
  )
  corloc = CorLoc(categories)
  for prediction in predictions:
    image_id = source.image_ids[prediction.index]
    if task == "panoptic":
      target = source.target(prediction.index)
      if target is None:
        raise _no_truth(image_id, "panoptic map")
      quality.add(prediction.panoptic, target)
      semantic.add(prediction.panoptic, target)
    instances = truth_of_things(source, prediction.index)
    if instances is None or (of_masks and not _has_masks(instances)):
      raise _no_truth(image_id, "masks" if of_masks else "boxes")
    coco.add(image_id, prediction.detections, instances)
    voc.add(image_id, prediction.detections, instances)
    corloc.add(image_id, prediction.best, instances)
    on_prediction(prediction)
  result = {
    "task": task,
    "coco": coco.result(),
    "voc": voc.result(),
    "localisation": corloc.result(),
  }
  if task == "panoptic":
    result |= quality.result() | {"semantic": semantic.result()}
  return result


def localisation(
  predictions: Iterable[Prediction],
  source: RecordSource,
  categories: Categories,
) -> dict[str, Any]:
  """CorLoc of a split whose images have boxes; see `CorLoc.result`."""
  corloc = CorLoc(categories)
  for prediction in predictions:
    image_id = source.image_ids[prediction.index]
    instances = truth_of_things(source, prediction.index)
    if instances is None:
      raise _no_truth(image_id, "boxes")
    corloc.add(image_id, prediction.best, instances)
  return corloc.result()


def has_truth(data: PreparedData) -> bool:
  """Whether there are validation images, and all have ground truth."""
  source = data.splits.get("val")
  return source is not None and (source.has_targets or source.has_instances)


def measured_task(source: RecordSource, task: str) -> str:
  """The task that the ground truth of a split can measure.

  Without panoptic maps "panoptic" is measured as "instance", and without masks
  both as "detection".
  """
  if task == "panoptic" and source.has_instances and not source.has_targets:
    task = "instance"
  if task == "instance" and not source.has_targets:
    found = (source.instances(i) for i in range(len(source)))
    first = next((x for x in found if x is not None and len(x.category)), None)
    if first is not None and not _has_masks(first):
      task = "detection"
  return task


def truth_of_things(source: RecordSource, index: int) -> Instances | None:
  """The instances of a record, from its panoptic map if it has no others."""
  instances = source.instances(index)
  if instances is None and (target := source.target(index)) is not None:
    instances = instances_of(target)
  return instances


def write_metrics(path: pathlib.Path, metrics: dict[str, Any]) -> None:
  """Writes the metrics as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(metrics, indent=1))


def _has_masks(instances: Instances) -> bool:
  return len(instances.rles) == len(instances.category)


def _no_truth(image_id: str, what: str) -> InputError:
  return InputError(
    f"image {image_id} has no {what} to compare with; use --mode=predict, or "
    "another config.task"
  )
