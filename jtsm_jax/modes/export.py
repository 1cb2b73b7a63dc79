"""Exporting the trained model."""

from __future__ import annotations

import pathlib

import ml_collections

from jtsm_jax.modes.proposals import proposal_settings
from jtsm_jax.modes.trained import load_trained, prediction_settings
from jtsm_jax.reporting.export import export_model

Config = ml_collections.ConfigDict


def export(config: Config, workdir: pathlib.Path) -> None:
  """Writes the trained model as files that jax and numpy alone can run."""
  trained = load_trained(config, workdir)
  output = workdir / "export"
  export_model(
    output,
    trained.model,
    trained.variables,
    categories=trained.categories,
    calibration=trained.calibration,
    settings=prediction_settings(config),
    proposals=None if config.proposals.source else proposal_settings(config),
    mil_share=config.evaluation.mil_share,
    proposal_block=config.evaluation.proposal_block,
  )
  print(f"model      {output} (docs/export.md tells how to run it)")
