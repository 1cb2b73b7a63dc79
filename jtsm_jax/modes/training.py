"""Training, with evaluations and pictures on the way."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from jtsm_jax.console import say
from jtsm_jax.data.pipeline import with_fallback
from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.evaluate import evaluate, has_truth, measured_task
from jtsm_jax.evaluation.tables import (
  MAIN_MEASURE,
  final_table,
  main_measures,
)
from jtsm_jax.modes.evaluation import (
  calibrate,
  prediction_sheet,
  predictions,
)
from jtsm_jax.modes.trained import result_settings
from jtsm_jax.proposals import store as stores
from jtsm_jax.reporting import stages
from jtsm_jax.reporting.visualize import write_image
from jtsm_jax.train import build
from jtsm_jax.train.loop import train
from jtsm_jax.train.stopping import Stopping

Config = ml_collections.ConfigDict

PICTURES_OF_EVALUATION = 4  # in TensorBoard, while it trains


def run_training(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  store: stores.ProposalStore,
  *,
  profile: tuple[int, int] | None = None,
) -> None:
  """Trains to the last step, evaluating on the way where there are targets.

  Call it inside `alone_in(workdir)`.

  Raises:
    Stopped: a signal has come; the state is saved.
  """
  model = build.build_model(config, data.categories)

  def evaluate_variables(variables: dict[str, Any]):
    variables = jax.device_put(variables)  # once, not with every batch
    args = config, workdir, model, variables, data, store
    calibration = calibrate(*args)
    pictures = {}

    def draw(prediction):
      if len(pictures) < PICTURES_OF_EVALUATION:
        name, sheet = prediction_sheet(data, store, prediction)
        pictures[f"val/{name}"] = sheet

    result = evaluate(
      predictions(*args, calibration),
      data.splits["val"],
      data.categories,
      task=config.task,
      voc_metric=config.evaluation.voc_metric,
      on_prediction=draw,
    )
    say(final_table(result))
    return main_measures(result), pictures

  show_mined = functools.partial(
    _draw_mined, workdir / "mining", data, with_fallback(store)
  )
  evaluates = {}
  if has_truth(data):
    task = measured_task(data.splits["val"], config.task)
    measured_by = {
      "measure": MAIN_MEASURE[task],
      "images": data.splits["val"].fingerprint,
      "voc_metric": config.evaluation.voc_metric,
    }
    evaluates = {
      "evaluate": evaluate_variables,
      "measured_by": measured_by | result_settings(config),
    }
  is_first = jax.process_index() == 0
  with Stopping() as stopping:
    train(
      config,
      workdir,
      data=data,
      store=store,
      stopping=stopping,
      show_mined=show_mined if is_first else None,
      profile=profile,
      **evaluates,
    )


def _draw_mined(
  directory, data, get_proposals, batch, mined, futures
) -> dict[str, np.ndarray]:
  """One picture for each image of a training batch; see `train.loop.train`.

  They lie in `directory` until the next ones come.
  """
  source, sheets = data.splits["train"], {}
  for i, index in enumerate(batch.image_index):
    if index < 0:
      continue
    image_id = source.image_ids[index]
    image = decode_image(source[index].image)
    proposals = get_proposals(image_id, image.shape[:2])
    rows = []
    for m in np.flatnonzero(mined.valid[i]):
      mask = futures[i][m].result() if futures else None
      segment = proposals.mask(mined.proposal[i, m])
      rows.append((mined.category[i, m], segment, mask))
    sheets[image_id] = stages.mining_sheet(image, rows, data.categories)
  for old in directory.glob("*.jpg"):
    old.unlink()
  for image_id, sheet in sheets.items():
    write_image(directory / f"{image_id}.jpg", sheet)
  return {f"mining/{n}": sheet for n, sheet in enumerate(sheets.values())}
