"""Memory and time that the prediction of one large photograph takes.

    python benchmarks/prediction_memory.py --megapixels 2 12 64

No model takes part: scores and masks are random, so that what is measured comes
on top of a model. The stages follow one another as in --mode=predict: the
panoptic map with its detections, then the files; and in --mode=evaluate: all
measures of the panoptic task, then the files. Each row is a process of its own.
GB are the most memory that was resident beyond what was before the first stage;
seconds are of the processor.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time

import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.evaluation.class_calibration import ClassCalibration
from jtsm_jax.evaluation.evaluate import evaluate
from jtsm_jax.evaluation.fusion import FusionSettings
from jtsm_jax.evaluation.inference import DetectionSettings, Scores, Steps
from jtsm_jax.evaluation.predict import PredictionSettings, predict
from jtsm_jax.reporting.predictions import write_prediction
from jtsm_jax.types import (
  Categories,
  Category,
  PanopticMap,
  Proposals,
  Record,
  Segment,
  pack_members,
)

STAGES = ("predict", "predict, files", "evaluate, files")
CANVASES = ((480, 640), (768, 1024))
STRIDE, CELLS, PROPOSALS = 16, 40, 1000  # of the features; superpixels a side
SURE = 12  # detections that reach the panoptic map


def main() -> None:
  """Prints a line for each size and stage."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megapixels", type=float, nargs="+", default=[2, 12])
  parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
  parser.add_argument("--detections", type=int, default=100)
  parser.add_argument("--things", type=int, default=80, help="COCO's")
  parser.add_argument("--stuff", type=int, default=53, help="COCO's")
  parser.add_argument("--outline_rounds", type=int, default=2)
  parser.add_argument("--output", type=pathlib.Path)
  args = parser.parse_args()
  rows, spawn = [], multiprocessing.get_context("spawn")
  print("megapixels  stage                 GB   bytes per pixel   seconds")
  for megapixels in args.megapixels:
    for stage in args.stages:
      # A new process: memory that was freed does not go back at once.
      with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        size, seconds = pool.submit(measure, args, megapixels, stage).result()
      rows.append([megapixels, stage, size, seconds])
      print(
        f"{megapixels:10g}  {stage:<16}{size / 1e9:8.2f}"
        f"{size / megapixels / 1e6:18.0f}{seconds:10.1f}",
        flush=True,
      )
  if args.output:
    args.output.write_text(json.dumps(rows, indent=1))


def measure(
  args: argparse.Namespace, megapixels: float, stage: str
) -> tuple[int, float]:
  """Bytes of memory at the most, and seconds, for one photograph."""
  photograph = Photograph(megapixels, args.things, args.stuff)
  categories = photograph.categories
  predictions = predict(
    Steps(photograph.score, photograph.masks),
    photograph,
    photograph,
    calibration=ClassCalibration.neutral(len(categories)),
    num_things=args.things,
    settings=PredictionSettings(
      canvases=CANVASES,
      batch_size=1,
      max_proposals=PROPOSALS,
      max_superpixels=CELLS**2,
      flip=True,
      mask_share=0.6,
      semantic_share=0.5,
      outline_rounds=args.outline_rounds,
      detection=DetectionSettings(max_detections=args.detections),
      fusion=FusionSettings(instance_score=0.5),
    ),
  )

  with tempfile.TemporaryDirectory() as folder:

    def write(prediction):
      count = len(prediction.detections.score)
      if count != args.detections:
        raise SystemExit(f"{count} detections, wanted {args.detections}")
      if stage != "predict":
        write_prediction(
          pathlib.Path(folder),
          "0",
          prediction,
          categories,
          image=photograph.image(),
          file_name="0.jpg",
          made_with={},
        )

    before, start = resident("VmRSS"), time.process_time()
    if stage.startswith("evaluate"):
      evaluate(
        predictions,
        photograph,
        categories,
        task="panoptic",
        on_prediction=write,
      )
    else:
      for prediction in predictions:
        write(prediction)
    seconds = time.process_time() - start
  return resident("VmHWM") - before, seconds


def resident(field: str) -> int:
  """Memory of this process as Linux counts it, bytes; "VmHWM": the most."""
  status = pathlib.Path("/proc/self/status").read_text()
  (line,) = (x for x in status.splitlines() if x.startswith(field + ":"))
  return 1024 * int(line.split()[1])


class Photograph:
  """A random image of 4 : 3 as a source of records and of its proposals."""

  image_ids = ("0",)

  def __init__(self, megapixels: float, things: int, stuff: int):
    height = round((megapixels * 0.75e6) ** 0.5)
    self.size = height, height * 4 // 3
    self.sizes = np.array([self.size], np.int32)
    self.categories = Categories(
      tuple(
        Category(i, f"class {i}", i < things) for i in range(things + stuff)
      )
    )
    self.tags = np.zeros((1, things + stuff), np.float32)
    self._stuff = stuff
    self._rng = np.random.default_rng(0)
    # Rectangles of superpixels, which are squares.
    low = self._rng.integers(0, CELLS - 8, (PROPOSALS, 2))
    high = low + self._rng.integers(2, 9, (PROPOSALS, 2))
    cell = np.arange(CELLS)
    rows, columns = (
      (low[:, i, None] <= cell) & (cell < high[:, i, None]) for i in (0, 1)
    )
    members = rows[:, :, None] & columns[:, None, :]
    self._bits = pack_members(members.reshape(PROPOSALS, -1))
    # Row r of the cells begins at ceil(r * height / CELLS).
    corners = np.concatenate([low, high], 1)
    self._boxes = -(-corners * np.tile(self.size, 2) // CELLS)
    # A class for each proposal; a few are sure, the others are not.
    self._scores = np.zeros((1, PROPOSALS, things + stuff), np.float32)
    chosen = np.arange(PROPOSALS)
    self._scores[0, chosen, chosen % things] = 0.4 - 0.3 * chosen / PROPOSALS
    self._scores[0, chosen[:SURE], chosen[:SURE]] = 0.9
    self._scores[0, :, things:] = self._rng.random((PROPOSALS, stuff))
    ok, jpeg = cv2.imencode(".jpg", self.image())
    assert ok
    self._jpeg = jpeg.tobytes()

  def image(self) -> np.ndarray:
    """[H, W, 3] uint8."""
    coarse = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    return cv2.resize(coarse, self.size[::-1], interpolation=cv2.INTER_CUBIC)

  # As a source of records.

  def __len__(self) -> int:
    return 1

  def __getitem__(self, index: int) -> Record:
    return Record("0", self._jpeg, *self.size, ())

  def target(self, index: int) -> PanopticMap:
    """Twelve things in columns."""
    ids = np.arange(self.size[1]) * 12 // self.size[1] + 1
    ids = np.tile(ids.astype(np.int32), (self.size[0], 1))
    return PanopticMap(
      ids, tuple(Segment(i + 1, i, True, 1.0, 0) for i in range(12))
    )

  def instances(self, index: int) -> None:
    return None

  # As a store of proposals.

  def __contains__(self, image_id: str) -> bool:
    return True

  def get(self, image_id: str) -> Proposals:
    rows, columns = (np.arange(side) * CELLS // side for side in self.size)
    return Proposals(
      superpixels=(CELLS * rows[:, None] + columns).astype(np.int32),
      member_bits=self._bits,
      boxes=self._boxes.astype(np.int32),
      scores=np.linspace(1, 0, PROPOSALS, dtype=np.float32),
    )

  # As a model.

  def score(self, batch) -> Scores:
    height, width = batch.superpixels.shape[1:]
    semantic = self._rng.random(
      (1, height // STRIDE, width // STRIDE, 1 + self._stuff), np.float32
    )
    return Scores(
      proposals=self._scores,
      image=np.ones((1, self._scores.shape[-1]), np.float32),
      semantic=semantic / semantic.sum(-1, keepdims=True),
      features=np.zeros((1, height // STRIDE, width // STRIDE, 1)),
    )

  def masks(self, features, boxes, category) -> np.ndarray:
    """Ellipses with ragged outlines."""
    y = np.linspace(-1, 1, 28, dtype=np.float32)
    ellipse = 1.3 - y[:, None] ** 2 - y**2
    noise = self._rng.random((*boxes.shape[:2], 28, 28), np.float32) - 0.5
    return (ellipse + 0.3 * noise).clip(0, 1)


if __name__ == "__main__":
  main()
