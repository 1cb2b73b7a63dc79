"""Constants of the model that are computed from training images, not learned.

The projection (PCA) of a frozen backbone's features and the mean and spread of
the pooled proposals. They are set once, when mining begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jtsm_jax.console import progress
from jtsm_jax.models.features import fit_projection
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.types import Batch

CELLS_PER_IMAGE = 64


def calibrate(
  model: JTSM,
  variables: Mapping[str, Any],
  batches: Sequence[Batch],
  *,
  seed: int,
  projection: bool = True,
) -> dict[str, Any]:
  """Sets the "constants" of the model; does nothing to a model without any.

  Args:
    model: the model.
    variables: what `model.apply` takes.
    batches: training batches with images.
    seed: of the choice of cells.
    projection: False keeps the projection, and sets the others for it.

  Returns:
    Variables that differ in "constants" only.
  """
  variables = dict(variables)
  if projection and model.extractor.projection:
    variables = _fit_projection(model, variables, batches, seed)
  if model.proposal_features.center:
    variables = _fit_center(model, variables, batches)
  return variables


def _fit_projection(model, variables, batches, seed):
  stages = jax.jit(
    lambda variables, images: model.apply(
      variables, images, train=False, method="stages"
    )
  )
  random = np.random.default_rng(seed)
  cells = []
  for batch in progress(batches, "set up", unit="batch"):
    maps = np.asarray(stages(variables, batch.images))
    limits = -(-np.asarray(batch.size) // model.extractor.stride)
    for features, (rows, columns), index in zip(
      maps, limits, np.asarray(batch.image_index), strict=True
    ):
      if index < 0:
        continue
      inside = features[:rows, :columns].reshape(-1, features.shape[-1])
      chosen = random.choice(
        len(inside), min(CELLS_PER_IMAGE, len(inside)), replace=False
      )
      cells.append(inside[chosen])
  channels = jax.eval_shape(
    lambda variables, images: model.apply(
      variables, images, method=_stage_channels
    ),
    variables,
    batches[0].images,
  )
  mean, matrix = fit_projection(
    np.concatenate(cells),
    tuple(c.shape[-1] for c in channels),
    model.extractor.projection,
  )
  return _with_constants(
    variables, ("extractor", "project"), {"mean": mean, "matrix": matrix}
  )


def _stage_channels(model: JTSM, images: jax.Array) -> list[jax.Array]:
  extractor = model.extractor
  stages = extractor.backbone(extractor.normalise(images), train=False)
  return [stages[name] for name in extractor.outputs]


def _fit_center(model, variables, batches):
  @jax.jit
  def moments(variables, batch):
    features = model.apply(variables, batch, method="features")
    parts = model.apply(variables, features, batch, method="pool")
    weight = batch.valid[..., None]
    return weight.sum(), [
      ((part * weight).sum((0, 1)), (part**2 * weight).sum((0, 1)))
      for part in parts
    ]

  count, sums = 0.0, None
  for batch in batches:
    n, parts = jax.device_get(moments(variables, batch))
    parts = [np.asarray(p, np.float64) for p in parts]
    count += n
    sums = (
      parts
      if sums is None
      else [a + b for a, b in zip(sums, parts, strict=True)]
    )
  constants = {}
  for i, (first, second) in enumerate(sums):
    mean = first / count
    variance = np.maximum(second / count - mean**2, 0)
    constants[f"mean_{i}"] = mean.astype(np.float32)
    constants[f"scale_{i}"] = np.float32(max(np.sqrt(variance.mean()), 1e-6))
  return _with_constants(variables, ("proposal_features",), constants)


def _with_constants(variables, path, values):
  constants = jax.tree.map(lambda x: x, variables["constants"])
  node = constants
  for name in path:
    node = node[name]
  node.update(jax.tree.map(jax.numpy.asarray, values))
  return variables | {"constants": constants}
