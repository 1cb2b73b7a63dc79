"""Exporting the trained model."""

from __future__ import annotations

import dataclasses
import pathlib

import ml_collections

from jtsm_jax.data import prepared
from jtsm_jax.modes.data import prepared_directory
from jtsm_jax.modes.trained import load_trained, prediction_settings
from jtsm_jax.reporting.export import export_model

Config = ml_collections.ConfigDict


def export(config: Config, workdir: pathlib.Path) -> None:
  """Writes the trained model as files that jax and numpy alone can run."""
  directory = prepared_directory(config, workdir)
  categories = prepared.open_prepared(directory).categories
  trained = load_trained(config, workdir, categories)
  settings = prediction_settings(config)
  output = workdir / "export"
  export_model(
    output,
    trained.model,
    trained.variables,
    canvases=settings.canvases,
    max_proposals=settings.max_proposals,
    max_superpixels=settings.max_superpixels,
    mil_share=config.evaluation.mil_share,
    proposal_block=config.evaluation.proposal_block,
    description={
      "classes": categories.to_list(),
      "calibration": {
        name: values.tolist()
        for name, values in vars(trained.calibration).items()
      },
      "settings": dataclasses.asdict(settings),
    },
  )
  print(f"model      {output} (docs/export.md tells how to run it)")
