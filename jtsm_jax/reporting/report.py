"""Gathers what the gallery shows: files of the run, and the model once more.

The validation images show what the evaluation wrote; the training images are
mined anew. The proposals' scores are kept nowhere, so the model runs on the
images that are shown, and on no others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from jtsm_jax.console import progress
from jtsm_jax.data.panoptic_files import read_json, read_panoptic
from jtsm_jax.data.pipeline import ProposalSource, with_fallback
from jtsm_jax.data.prepared import PreparedData, RecordSource
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.evaluate import has_truth
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.reporting.gallery import (
  Group,
  Image,
  Picture,
  Section,
  choose,
  read_curves,
  spread,
  write_page,
)
from jtsm_jax.reporting.mined_images import MinedImage
from jtsm_jax.reporting.visualize import (
  class_colours,
  draw_mask,
  draw_scores,
  sketch_panoptic,
  write_image,
)
from jtsm_jax.types import (
  Categories,
  InputError,
  PanopticMap,
  Proposals,
  Record,
  Segment,
)

PROPOSALS_SHOWN = 20
"""Of each class."""

CLASSES_SHOWN = 8
"""Of whose proposals an image has pictures."""

LONGEST_SIDE = 640
"""Of a picture, pixels."""

COVER_SIDE = 320
"""Of a picture of the overview."""


class Subset:
  """Some records of a split as a split of their own, without ground truth."""

  def __init__(self, source: RecordSource, indices: Sequence[int]):
    self._source = source
    self.indices = list(indices)
    self.image_ids = tuple(source.image_ids[i] for i in self.indices)
    self.sizes = source.sizes[self.indices]
    self.tags = source.tags[self.indices]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, i: int) -> Record:
    return self._source[self.indices[i]]


def write_report(
  workdir: pathlib.Path,
  data: PreparedData,
  store: ProposalSource,
  *,
  weights: dict[str, Any],
  evaluation: dict[str, Any],
  predict: Callable[[Subset], Iterator[Prediction]],
  mine: Callable[[Subset], Iterator[MinedImage]],
  reestimator: MaskReestimator | None,
  num_images: int,
  num_train_images: int,
) -> pathlib.Path:
  """Writes WORKDIR/report: the page and its pictures.

  An older report stays as it is until the new one is complete.

  Args:
    workdir: of the run.
    data: its images; training images, and validation images if there are any.
    store: their proposals.
    weights: what tells them from others: {"step", "weights": their hash}.
    evaluation: the settings of `predict`; shown where nothing was evaluated.
    predict: predicts images of the split "val".
    mine: mines images of the split "train".
    reestimator: of the mined segments; None where nothing learns from masks.
    num_images: most validation images to show.
    num_train_images: most training images to show.

  Returns:
    The page.

  Raises:
    InputError: there is something to measure, and it is not evaluated, or with
      other weights; or a file of the run is damaged.
  """
  val, metrics, predicted = data.splits.get("val"), None, None
  if has_truth(data) or "corloc" in data.splits:
    metrics = read_metrics(
      workdir / "evaluation" / "metrics.json", weights=weights
    )
  if val is not None and val.has_targets:
    folder = workdir / "evaluation" / "predictions"
    if not (folder / "panoptic.json").is_file():
      raise InputError(
        f"{folder / 'panoptic.json'} is missing; run --mode=evaluate again"
      )
    predicted = read_panoptic(
      folder / "panoptic.json", folder / "panoptic", data.categories
    )
  draft, final = workdir / "report.tmp", workdir / "report"
  shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
  sections = []
  if val is not None:
    sections.append(
      validation_section(
        draft,
        val,
        data.categories,
        store,
        predicted=predicted,
        predict=predict,
        limit=num_images,
      )
    )
  sections.append(
    training_section(
      draft,
      data.splits["train"],
      data.categories,
      store,
      mine=mine,
      reestimator=reestimator,
      limit=num_train_images,
    )
  )
  settings = read_json(workdir / "config.json")
  # Those of the training may have changed since; old metrics do not tell.
  if metrics is None:
    settings["evaluation"] = evaluation
  elif "settings" in metrics:
    settings["evaluation"] = metrics["settings"]
  write_page(
    draft / "index.html",
    title=f"Report of {workdir.resolve().name}",
    summary=_summary(data, settings, weights["step"]),
    categories=data.categories,
    metrics=metrics,
    curves=read_curves(workdir / "metrics.jsonl"),
    sections=sections,
    settings=settings,
  )
  old = workdir / "report.old"
  shutil.rmtree(old, ignore_errors=True)
  if final.exists():
    os.rename(final, old)
  os.rename(draft, final)
  shutil.rmtree(old, ignore_errors=True)
  return final / "index.html"


def read_metrics(
  path: pathlib.Path, *, weights: dict[str, Any]
) -> dict[str, Any]:
  """The figures of the evaluation.

  Args:
    path: of metrics.json.
    weights: as of `write_report`.

  Raises:
    InputError: there are none, or they are of other weights.
  """
  remedy = "run --mode=evaluate first"
  try:
    metrics = json.loads(path.read_text())
    found = metrics["step"]
  except OSError as error:
    raise InputError(f"{path}: {error.strerror}; {remedy}") from error
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path} is damaged ({error!r}); {remedy}") from error
  step = weights["step"]
  if found != step:
    raise InputError(
      f"{path} is of the weights of step {found}, the last checkpoint is of"
      f" step {step}; {remedy}"
    )
  # Metrics of older versions tell the step alone.
  if metrics.get("weights", weights["weights"]) != weights["weights"]:
    raise InputError(
      f"{path} is of other weights of step {step} than the last checkpoint;"
      f" {remedy}"
    )
  return metrics


def _summary(data, settings, step) -> list[tuple[str, str]]:
  backbone = settings["backbone"]
  # Of a file the name: others need not know where it lay.
  source = pathlib.Path(backbone["pretrained"]).name
  weights = f", {source} weights" * bool(source)
  things = data.categories.num_things
  return [
    ("Data set", data.name),
    ("Training images", f"{len(data.splits['train']):,}"),
    *(
      [("Validation images", f"{len(data.splits['val']):,}")]
      if "val" in data.splits
      else []
    ),
    ("Classes", f"{things} things, {len(data.categories) - things} stuff"),
    ("Backbone", backbone["name"] + weights),
    ("Steps", f"{step:,}"),
    ("Seed", str(settings["seed"])),
  ]


# Validation images -----------------------------------------------------------


def validation_section(
  folder: pathlib.Path,
  source: RecordSource,
  categories: Categories,
  store: ProposalSource,
  *,
  predicted: Mapping[str, PanopticMap] | None,
  predict: Callable[[Subset], Iterator[Prediction]],
  limit: int,
) -> Section:
  """Photograph, prediction, ground truth, and scored proposals.

  Args:
    folder: of the page; pictures go below it.
    source: the split.
    categories: the classes.
    store: the proposals of the images.
    predicted: what the evaluation wrote, by file name; None where there was no
      evaluation, and what `predict` gives is shown.
    predict: the model, on the images that are shown.
    limit: most images to show.

  Raises:
    InputError: an image is not in `predicted`.
  """
  qualities = [None] * len(source)
  if predicted is not None:
    for n, name in enumerate(
      progress(source.file_names, "compare", unit="image")
    ):
      if name not in predicted:
        raise InputError(
          f"the evaluation holds no prediction of the image {name!r}; run"
          " --mode=evaluate again"
        )
      qualities[n] = image_quality(
        predicted[name], source.target(n), categories
      )
  pq = [None if q is None else q["pq"] for q in qualities]
  subset = Subset(source, choose(pq, limit))
  get_proposals = with_fallback(store)
  images = {}
  for prediction in predict(subset) if len(subset) else ():
    n = subset.indices[prediction.index]
    image_id = source.image_ids[n]
    image = decode_image(source[n].image)
    panoptic, target = prediction.panoptic, source.target(n)
    if predicted is not None:
      panoptic = predicted[source.file_names[n]]
    elif target is not None:
      qualities[n] = image_quality(panoptic, target, categories)
    images[n] = _validation_image(
      _Drawer(folder, f"val-{n:05d}"),
      image_id,
      image,
      get_proposals(image_id, image.shape[:2]),
      np.flatnonzero(source.tags[n]).tolist(),
      panoptic,
      target,
      prediction.scores,
      qualities[n],
      categories,
    )
  return Section(
    key="val",
    title="Validation images",
    note=_validation_note(pq, len(images), limit),
    images=[images[n] for n in sorted(images)],
  )


def image_quality(
  prediction: PanopticMap, target: PanopticMap, categories: Categories
) -> dict[str, Any]:
  """PQ of one image, and which segments it missed or invented.

  Returns:
    {"pq": in percent, the mean over the classes that the image has or is
    predicted to have, or None without any; "missed", "false": [(class index,
    segments)]}.
  """
  quality = PanopticQuality(categories)
  quality.add(prediction, target)
  mean = quality.result()["all"]
  return {
    "pq": mean["pq"] if mean["n"] else None,
    "missed": _counts(quality.fn),
    "false": _counts(quality.fp),
  }


def _validation_image(
  drawer,
  image_id,
  image,
  proposals,
  tags,
  panoptic,
  target,
  scores,
  quality,
  categories,
) -> Image:
  names = categories.names
  result = [
    drawer.picture("photograph", image, "Photograph", "Photograph"),
    drawer.picture(
      "prediction",
      sketch_panoptic(image, panoptic, categories),
      "Prediction",
      f"Prediction: {_describe(panoptic, names)}",
    ),
  ]
  found = _segment_counts(panoptic, len(categories))
  facts = [("Tags", [(k, 1) for k in tags]), ("Predicted", found)]
  if target is not None:
    result.append(
      drawer.picture(
        "truth",
        sketch_panoptic(image, target, categories),
        "Ground truth",
        f"Ground truth: {_describe(target, names)}",
      )
    )
    truth = _segment_counts(target, len(categories))
    facts += [("Ground truth", truth)]
    facts += [("Missed", quality["missed"]), ("False", quality["false"])]
  pictures, note = [], ""
  # The classes that the model holds for present, the surest first.
  present = [k for k in np.argsort(-scores.max(0)) if scores[:, k].max() > 0]
  for k in present[:CLASSES_SHOWN]:
    picture = _scored_picture(
      drawer, image, proposals, scores[:, k], k, names[k]
    )
    caption = f"{names[k]}: {picture.caption}"
    pictures.append(dataclasses.replace(picture, caption=caption))
  if len(present) > CLASSES_SHOWN:
    others = ", ".join(names[k] for k in present[CLASSES_SHOWN:])
    note = f"Without pictures: {others}."
  groups = [Group("Result", result)]
  if pictures:
    title = "Proposals by score, of each class found"
    groups.append(Group(title, pictures, note=note))
  covers = [image, sketch_panoptic(image, panoptic, categories, labels=False)]
  if target is not None:
    truth = sketch_panoptic(image, target, categories, labels=False)
    covers = [covers[1], truth]
  height, width = image.shape[:2]
  return Image(
    id=image_id,
    width=width,
    height=height,
    cover=[drawer.cover(str(n), rgb) for n, rgb in enumerate(covers)],
    groups=groups,
    tags=tags,
    facts=facts,
    classes=sorted({*tags, *(k for k, _ in found)}),
    pq=None if quality is None else quality["pq"],
  )


def _validation_note(pq, shown, limit) -> str:
  count = len(pq)
  if not any(value is not None for value in pq):
    how = "spread evenly"
    end = "A card shows photograph and prediction."
  else:
    worst = limit - limit // 2
    how = f"the {worst} of lowest PQ, and others spread evenly over the rest"
    end = (
      "A card shows prediction and ground truth. PQ here is of the image alone:"
      " the mean over the classes that it has or is predicted to have."
    )
  if shown == count:
    return f"All {count:,} images. {end}"
  return (
    f"{shown:,} of {count:,} images, {how}; the field report.images says how"
    f" many. {end}"
  )


# Training images -------------------------------------------------------------


def training_section(
  folder: pathlib.Path,
  source: RecordSource,
  categories: Categories,
  store: ProposalSource,
  *,
  mine: Callable[[Subset], Iterator[MinedImage]],
  reestimator: MaskReestimator | None,
  limit: int,
) -> Section:
  """Of each tag: scored proposals, mined segments and their pseudo masks.

  Args:
    folder: of the page; pictures go below it.
    source: the split.
    categories: the classes.
    store: the proposals of the images.
    mine: the model, on the images that are shown.
    reestimator: makes the pseudo masks; None for none.
    limit: most images to show, which are spread evenly over the split.
  """
  subset = Subset(source, spread(len(source), limit))
  get_proposals = with_fallback(store)
  images = {}
  for mined in mine(subset) if len(subset) else ():
    n = subset.indices[mined.index]
    image_id = source.image_ids[n]
    image = decode_image(source[n].image)
    images[n] = _training_image(
      _Drawer(folder, f"train-{n:05d}"),
      image_id,
      image,
      get_proposals(image_id, image.shape[:2]),
      np.flatnonzero(source.tags[n]).tolist(),
      mined,
      reestimator,
      categories,
    )
  shown, count = len(images), len(source)
  some = (
    f"All {count:,} images"
    if shown == count
    else f"{shown:,} of {count:,} images, spread evenly; the field"
    " report.train_images says how many"
  )
  return Section(
    key="train",
    title="Training images",
    note=f"{some}. A card shows the photograph, and what is mined of its tags"
    " with the last weights.",
    images=[images[n] for n in sorted(images)],
  )


def _training_image(
  drawer, image_id, image, proposals, tags, mined, reestimator, categories
) -> Image:
  names, colours = categories.names, class_colours(categories)
  segments = [proposals.mask(p) for _, p, _ in mined.segments]
  masks = segments
  if reestimator is not None:
    futures = [
      reestimator.submit(image_id, p, lambda s=segment: (image, s))
      for (_, p, _), segment in zip(mined.segments, segments, strict=True)
    ]
    masks = [future.result() for future in futures]
  kinds = [("segment", "Mined segment", segments)]
  if reestimator is not None:
    kinds.append(("mask", "Pseudo mask", masks))

  everything = _as_panoptic(mined.segments, masks, image.shape[:2], categories)
  caption = f"{kinds[-1][1]}s"
  pictures = [
    drawer.picture("photograph", image, "Photograph", "Photograph"),
    drawer.picture(
      "mined",
      sketch_panoptic(image, everything, categories),
      caption,
      f"{caption}: {_describe(everything, names)}",
    ),
  ]
  groups = [Group("All tags", pictures)]
  for k in tags:
    own = [i for i, found in enumerate(mined.segments) if found[0] == k]
    scores = ", ".join(f"{mined.segments[i][2]:.2f}" for i in own)
    pictures = [
      _scored_picture(drawer, image, proposals, mined.scores[:, k], k, names[k])
    ]
    for name, caption, shapes in kinds:
      union = np.zeros(image.shape[:2], bool)
      for i in own:
        union |= shapes[i]
      text = caption if len(own) == 1 else f"{len(own)} {caption.lower()}s"
      text += f": {100 * union.mean():.0f} % of the image"
      if name == "segment" and own:
        text += f", score {scores}"
      picture = draw_mask(image, union, colours[k])
      alt = f"{names[k]}, {text}"
      pictures.append(drawer.picture(f"{name}-{k}", picture, text, alt))
    groups.append(Group(names[k], pictures, category=k))
  covers = [
    image,
    sketch_panoptic(image, everything, categories, labels=False),
  ]
  height, width = image.shape[:2]
  return Image(
    id=image_id,
    width=width,
    height=height,
    cover=[drawer.cover(str(n), rgb) for n, rgb in enumerate(covers)],
    groups=groups,
    tags=tags,
    facts=[("Tags", [(k, 1) for k in tags])],
    classes=tags,
  )


# Pictures --------------------------------------------------------------------


class _Drawer:
  """Writes the pictures of one image under names that need no care."""

  def __init__(self, folder: pathlib.Path, name: str):
    self._folder, self._name = folder, name

  def picture(
    self, stage: str, rgb: np.ndarray, caption: str, alt: str
  ) -> Picture:
    return Picture(self._write(stage, rgb, LONGEST_SIDE), caption, alt)

  def cover(self, stage: str, rgb: np.ndarray) -> str:
    return self._write(f"{stage}-small", rgb, COVER_SIDE)

  def _write(self, stage: str, rgb: np.ndarray, longest_side: int) -> str:
    scale = longest_side / max(rgb.shape[:2])
    if scale < 1:
      size = [max(round(side * scale), 1) for side in rgb.shape[1::-1]]
      rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    file = f"images/{self._name}-{stage}.jpg"
    write_image(self._folder / file, rgb, quality=80)
    return file


def _scored_picture(
  drawer: _Drawer,
  image: np.ndarray,
  proposals: Proposals,
  scores: np.ndarray,
  category: int,
  name: str,
) -> Picture:
  proposals = proposals.best(len(scores))
  best = np.sort(scores[scores > 0])[::-1][:PROPOSALS_SHOWN]
  title = f"Best {len(best)} of {len(scores)} proposals"
  values = "none has a score"
  if len(best):
    values = f"scores {best[0]:.2f} to {best[-1]:.2f}"
  return drawer.picture(
    f"proposals-{category}",
    draw_scores(image, proposals, scores, PROPOSALS_SHOWN),
    f"{title}, {values}",
    f"{title} of {name}, {values}",
  )


def _as_panoptic(
  segments: Sequence[tuple[int, int, float]],
  masks: Sequence[np.ndarray],
  size: tuple[int, int],
  categories: Categories,
) -> PanopticMap:
  """Masks laid over one another: stuff below things, the best on top."""

  def height(n):
    category, _, score = segments[n]
    return categories.items[category].is_thing, score

  ids = np.zeros(size, np.int32)
  for n in sorted(range(len(masks)), key=height):
    ids[masks[n]] = n + 1
  areas = np.bincount(ids.ravel(), minlength=len(masks) + 1)
  return PanopticMap(
    ids,
    tuple(
      Segment(n, k, categories.items[k].is_thing, score, int(areas[n]))
      for n, (k, _, score) in enumerate(segments, start=1)
      if areas[n]
    ),
  )


def _segment_counts(panoptic: PanopticMap, num_classes: int):
  return _counts(
    np.bincount([s.category for s in panoptic.segments], minlength=num_classes)
  )


def _counts(per_class: np.ndarray) -> list[tuple[int, int]]:
  return [(int(k), int(per_class[k])) for k in np.flatnonzero(per_class)]


def _describe(panoptic: PanopticMap, names: Sequence[str]) -> str:
  """The segments in words, the largest first."""
  parts = [
    names[s.category] + (f" {s.score:.2f}" if s.score < 1 else "")
    for s in sorted(panoptic.segments, key=lambda s: -s.area)
  ]
  return ", ".join(parts) or "nothing"
