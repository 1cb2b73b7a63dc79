"""Predictions as files: one image at a time, whole or not at all.

    FOLDER/input.txt            the folder of the images
    FOLDER/records/NAME.json    all that is known of an image; written last
    FOLDER/panoptic/NAME.png    COCO panoptic: ids as R + 256 G + 65536 B
    FOLDER/classes/NAME.png     index of each pixel's class, 255 for void; with
                                more than 255 classes 16 bits, and 65535
    FOLDER/overlays/NAME.jpg    to look at
    FOLDER/panoptic.json        COCO panoptic, of all images
    FOLDER/instances.json       COCO results: masks as run lengths, scores
    FOLDER/detections.json      COCO results: boxes of those masks, scores
    FOLDER/classes.json         the classes in the order of their indices

An image whose record was made with the same weights and settings from the same
bytes need not be predicted again.

The JSON files have an image's own id where its data set has a JSON, else the
number where NAME is a file name of COCO's, twelve digits, else NAME.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from jtsm_jax.data.files import AnyPath, folder_name, full_path, write_file
from jtsm_jax.data.panoptic_files import encode_ids, panoptic_annotation
from jtsm_jax.evaluation.predict import Prediction
from jtsm_jax.reporting.visualize import (
  class_colours,
  overlay_panoptic,
  write_image,
)
from jtsm_jax.types import Categories, Detections, PanopticMap


def output_folder(parent: pathlib.Path, images: AnyPath) -> pathlib.Path:
  """The folder for the predictions of a folder of images.

  It has the name of that one. If this belongs to other images, whose results
  must not be overwritten, a hash of the path follows.

  Args:
    parent: of the folder, which is made if absent.
    images: the folder of the images, however it is spelt.
  """
  owner = os.fsencode(full_path(images)) + b"\n"
  folder = parent / folder_name(images)
  note = folder / "input.txt"
  if folder.exists() and not (note.exists() and note.read_bytes() == owner):
    folder = parent / f"{folder.name}-{hashlib.sha256(owner).hexdigest()[:8]}"
    note = folder / "input.txt"
  if not note.exists():
    write_file(note, owner)
  return folder


def write_prediction(
  folder: pathlib.Path,
  name: str,
  prediction: Prediction,
  categories: Categories,
  *,
  image: np.ndarray,
  file_name: str,
  source_id: int | str | None = None,
  made_with: dict[str, Any],
) -> None:
  """Writes the files of one image.

  Args:
    folder: see above.
    name: of the image, unique in the folder and safe as a file name.
    prediction: of the image.
    categories: the classes.
    image: [H, W, 3] uint8 RGB.
    file_name: of the image, relative to the folder of the images.
    source_id: the image's id in the data set's JSON; None where it has none.
    made_with: weights, settings and the image's digest, see `is_done`.
  """
  panoptic = prediction.panoptic
  _write_png(folder / "panoptic" / f"{name}.png", encode_ids(panoptic.ids))
  _write_png(
    folder / "classes" / f"{name}.png",
    class_map(panoptic, len(categories)),
    palette=class_colours(categories),
  )
  write_image(
    folder / "overlays" / f"{name}.jpg",
    overlay_panoptic(image, panoptic, categories),
  )
  height, width = panoptic.ids.shape
  image_id = _coco_id(name) if source_id is None else source_id
  record = {
    "made_with": made_with,
    "image": {
      "id": image_id,
      "file_name": file_name,
      "height": height,
      "width": width,
    },
    "panoptic": panoptic_annotation(
      image_id, f"{name}.png", panoptic, categories
    ),
    "instances": _instances(image_id, prediction.detections, categories),
    "class_scores": dict(
      zip(categories.names, prediction.image_scores.tolist(), strict=True)
    ),
  }
  write_file(folder / "records" / f"{name}.json", json.dumps(record))


def is_done(
  folder: pathlib.Path, name: str, *, made_with: dict[str, Any]
) -> bool:
  """Whether `write_prediction` has finished with the same `made_with`."""
  try:
    return _read_record(folder, name)["made_with"] == made_with
  except (OSError, ValueError, KeyError, TypeError):
    return False  # none, or of another program


def recorded_file(folder: pathlib.Path, name: str) -> str | None:
  """The `file_name` of the image that has a record; None if none has."""
  try:
    return _read_record(folder, name)["image"]["file_name"]
  except (OSError, ValueError, KeyError, TypeError):
    return None  # as above


def collect(
  folder: pathlib.Path, names: Sequence[str], categories: Categories
) -> None:
  """Writes the JSON files of all images from the records of each."""
  records = [_read_record(folder, name) for name in names]
  instances = [entry for r in records for entry in r["instances"]]
  files = {
    "panoptic.json": {
      "images": [r["image"] for r in records],
      "annotations": [r["panoptic"] for r in records],
      "categories": categories.to_list(),
    },
    "instances.json": instances,
    "detections.json": [
      {k: v for k, v in entry.items() if k != "segmentation"}
      for entry in instances
    ],
    "classes.json": categories.to_list(),
  }
  for name, content in files.items():
    write_file(folder / name, json.dumps(content))


def class_map(panoptic: PanopticMap, num_classes: int) -> np.ndarray:
  """[H, W] class index of each pixel, the dtype's greatest number for void.

  It is uint8 for up to 255 classes, uint16 for more.
  """
  dtype = np.uint8 if num_classes <= np.iinfo(np.uint8).max else np.uint16
  index = np.full(panoptic.ids.shape, np.iinfo(dtype).max, dtype)
  for segment in panoptic.segments:
    index[panoptic.ids == segment.id] = segment.category
  return index


def _coco_id(name: str) -> int | str:
  """The id that COCO gives the image of a file name."""
  return int(name) if re.fullmatch("[0-9]{12}", name) else name


def _instances(image_id, detections: Detections, categories) -> list[dict]:
  """COCO's results of one image, best first; empty masks are left out."""
  entries = []
  size = list(detections.size)
  for category, score, counts in zip(
    detections.category, detections.score, detections.rles, strict=True
  ):
    rle = {"size": size, "counts": counts}
    if not coco_mask.area(rle):
      continue
    entries.append(
      {
        "image_id": image_id,
        "category_id": categories.items[category].id,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "score": float(score),
        "segmentation": {
          "size": size,
          "counts": counts.decode("ascii"),
        },
      }
    )
  return entries


def _read_record(folder: pathlib.Path, name: str) -> dict[str, Any]:
  return json.loads((folder / "records" / f"{name}.json").read_text())


def _write_png(
  path: pathlib.Path, pixels: np.ndarray, *, palette: np.ndarray | None = None
) -> None:
  image = Image.fromarray(pixels)
  if palette is not None and pixels.dtype == np.uint8:
    # All 256 entries: Pillow would change indices without a colour.
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    image.putpalette(colours.tobytes())
  data = io.BytesIO()
  image.save(data, format="PNG")
  write_file(path, data.getvalue())
