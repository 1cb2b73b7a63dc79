"""Writing the gallery of a run."""

from __future__ import annotations

import functools
import pathlib

import ml_collections

from jtsm_jax.data.prepared import PreparedData
from jtsm_jax.evaluation.predict import predict
from jtsm_jax.modes.trained import (
  jsonable,
  load_trained,
  prediction_settings,
  steps_of,
)
from jtsm_jax.proposals import store as stores
from jtsm_jax.reporting import report
from jtsm_jax.reporting.mined_images import mine_images
from jtsm_jax.train import build, caches, fields

Config = ml_collections.ConfigDict


def run_report(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  store: stores.ProposalStore,
) -> None:
  """Writes the gallery of a run that is trained and evaluated.

  Raises:
    InputError: it is not evaluated with its last weights.
  """
  categories, source = data.categories, data.splits["train"]
  trained = load_trained(config, workdir, categories)
  settings = prediction_settings(config)
  mining = build.mining_settings(
    config, num_things=categories.num_things, tags=source.tags
  )
  with caches.open_reestimator(config, workdir, source, store) as reestimator:
    model = trained.model
    has_branches = model.instance is not None or model.semantic is not None
    page = report.write_report(
      workdir,
      data,
      store,
      weights=trained.key,
      evaluation=jsonable(config.evaluation),
      predict=functools.partial(
        predict,
        steps_of(config, trained.model, trained.variables),
        store=store,
        calibration=trained.calibration,
        num_things=categories.num_things,
        settings=settings,
      ),
      mine=functools.partial(
        mine_images,
        trained.model,
        trained.variables,
        store=store,
        settings=mining,
        tag_advantage=config.losses.tag_advantage,
        canvases=fields.canvases(config, "data"),
        batch_size=settings.batch_size,
        max_proposals=settings.max_proposals,
        max_superpixels=settings.max_superpixels,
        proposal_block=config.evaluation.proposal_block,
      ),
      reestimator=reestimator if has_branches else None,
      num_images=config.report.images,
      num_train_images=config.report.train_images,
    )
  print(f"report     {page}")
