"""What a run keeps on disk to compute it once: pseudo masks and features."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections
from absl import logging

from jtsm_jax import workers
from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.proposals.store import ProposalStore
from jtsm_jax.train import fields
from jtsm_jax.train.feature_cache import FeatureCache, cache_bytes


def open_reestimator(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  source: RecordSource,
  store: ProposalStore,
) -> MaskReestimator:
  """Makes pseudo masks of a split, and keeps them."""
  c = config.reestimation
  folder = pathlib.Path(c.cache_dir) if c.cache_dir else workdir / "masks"
  return MaskReestimator(
    init=c.init,
    iterations=c.iterations,
    longest_side=c.longest_side,
    workers=c.threads or workers.available_cores(),
    cache_dir=folder / source.fingerprint / store.path.name,
  )


def open_feature_cache(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  model: JTSM,
  variables: Any,
  source: RecordSource,
  *,
  split: str,
  learning: bool = False,
) -> FeatureCache | None:
  """The cache of a split; None where `caches_features` says no."""
  size = _feature_bytes(config, model, variables, source, learning=learning)
  if size is None:
    return None
  if size > config.backbone.cache_gib * 2**30:
    logging.warning(
      "the features of %r would take %.1f GiB on disk, above "
      "config.backbone.cache_gib = %.1f: they are computed every time",
      split,
      size / 2**30,
      config.backbone.cache_gib,
    )
    return None
  root = pathlib.Path(config.backbone.cache_dir or workdir / "features")
  if jax.process_count() > 1:  # two cannot write one file
    root /= f"process_{jax.process_index()}"
  return FeatureCache(
    root,
    model=model,
    variables=variables,
    source=source,
    split=split,
  )


def caches_features(
  config: ml_collections.ConfigDict,
  model: JTSM,
  variables: Any,
  source: RecordSource,
  *,
  learning: bool = False,
) -> bool:
  """Whether a split's features stay the same and fit on the disk.

  A cache keeps float16, so this decides what a training learns from. Of its
  own canvases alone: those of the evaluation may change between two runs.

  Args:
    config: see configs/base.py.
    model: the model.
    variables: what `model.apply` takes; shapes are enough.
    source: the split.
    learning: on the canvases that a training draws from; else on those that an
      evaluation views.
  """
  size = _feature_bytes(config, model, variables, source, learning=learning)
  return size is not None and size <= config.backbone.cache_gib * 2**30


def _feature_bytes(config, model, variables, source, *, learning) -> int | None:
  """Of features on disk; None where they do not stay the same."""
  if not (config.backbone.cache and config.backbone.freeze == "all"):
    return None
  if learning and (config.data.colour_factor != 1 or config.data.crop != 1):
    return None  # every step sees other colours or other parts
  canvases = fields.canvases(config, "data" if learning else "evaluation")
  return cache_bytes(
    model, variables, canvases=tuple(set(canvases)), num_images=len(source)
  )
