"""From a configuration to the model, its settings and its first weights."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jtsm_jax.backbones import (
  efficientnet_lite,
  pretrained,
  resnet,
  resnet_ws,
)
from jtsm_jax.mining.labels import slots_needed
from jtsm_jax.models.cell_head import CellHead
from jtsm_jax.models.features import FeatureExtractor
from jtsm_jax.models.instance_branch import InstanceBranch
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.models.neck_and_heads import MiningHeads, Neck, TagHead
from jtsm_jax.models.proposal_features import ProposalFeatures
from jtsm_jax.models.semantic_branch import SemanticBranch
from jtsm_jax.train import fields
from jtsm_jax.train.objectives import LossSettings, MiningSettings
from jtsm_jax.train.schedule import make_optimizer, scaled_rate, step_decay
from jtsm_jax.types import Categories


def build_model(
  config: ml_collections.ConfigDict, categories: Categories
) -> JTSM:
  """The model of a configuration.

  Raises:
    InputError: from `fields.check_fields`.
  """
  fields.check_fields(config)
  b = config.backbone
  dtype = jnp.dtype(config.train.precision)
  computing = {"dtype": dtype, "remat": config.train.remat == "backbone"}
  if b.name == "resnet_ws":
    backbone = resnet_ws.ResNetWS(
      depth=b.depth,
      width=b.width,
      norm=b.norm,
      dilated=b.stride == 8,
      **computing,
    )
    normalise = resnet_ws.normalise
  elif b.name == "resnet":
    backbone = resnet.ResNet(
      depth=b.depth,
      width=b.width,
      norm=b.norm,
      output_stride=b.stride,
      **computing,
    )
    normalise = resnet.normalise
  else:
    backbone = efficientnet_lite.EfficientNetLite0(
      output_stride=b.stride, **computing
    )
    normalise = efficientnet_lite.normalise
  num_things = categories.num_things
  num_stuff = len(categories) - num_things
  sampling_ratio = config.pooling.sampling_ratio or None
  return JTSM(
    extractor=FeatureExtractor(
      backbone=backbone,
      normalise=normalise,
      outputs=tuple(b.outputs),
      stride=b.stride,
      projection=b.projection,
      frozen=b.freeze == "all",
      dtype=dtype,
    ),
    proposal_features=ProposalFeatures(
      stride=b.stride,
      pooling=config.pooling.kind,
      output_size=tuple(config.pooling.output_size),
      compensation=config.pooling.compensation or None,
      availability=config.pooling.availability,
      reduce=config.pooling.reduce,
      average=config.pooling.average,
      center=config.pooling.center,
      size_exponents=tuple(config.pooling.size_exponents),
      sampling_ratio=sampling_ratio,
      dtype=dtype,
    ),
    neck=Neck(
      widths=tuple(config.neck.widths),
      dropout=config.neck.dropout,
      input_dropout=config.neck.input_dropout,
      share_input_dropout=config.neck.share_input_dropout,
      dtype=dtype,
    ),
    heads=MiningHeads(
      num_classes=len(categories),
      num_refinements=config.heads.num_refinements,
      zero_init=config.heads.zero_init,
      dtype=dtype,
    ),
    tag_head=TagHead(num_classes=len(categories)),
    instance=InstanceBranch(
      num_things=num_things,
      channels=config.instance.channels,
      num_convs=config.instance.num_convs,
      stride=b.stride,
      sampling_ratio=sampling_ratio,
      dtype=dtype,
    )
    if config.instance.enabled and num_things and config.task != "detection"
    else None,
    semantic=SemanticBranch(
      num_stuff=num_stuff, channels=config.semantic.channels, dtype=dtype
    )
    if config.semantic.enabled and num_stuff and config.task == "panoptic"
    else None,
    cells=CellHead(
      num_classes=len(categories),
      dropout=config.cells.dropout,
      gain=config.cells.gain,
      dtype=dtype,
    )
    if config.cells.enabled
    else None,
  )


def load_pretrained(
  config: ml_collections.ConfigDict,
  cache_dir: pathlib.Path,
  *,
  backbone_anew: bool = True,
  neck_anew: bool = True,
) -> dict[str, Any] | None:
  """Variables of the backbone and, where the file has them, of the neck.

  A neck that starts at random beside a pretrained backbone is told in a line.

  Args:
    config: see configs/base.py.
    cache_dir: where converted weights are kept.
    backbone_anew: whether any of the backbone is not another run's, as
      `train.init_from` has it.
    neck_anew: the same of the neck.

  Returns:
    A part of the variables of the model, for `initial_variables`; None to start
    it at random, or where another run has all of them.

  Raises:
    InputError: there are no such weights, they do not fit, or the backbone
      would stay random.
  """
  b = config.backbone
  if not b.pretrained:
    if backbone_anew:
      fields.check_random_backbone(config)
    return None
  fields.check_pretrained(b)
  if not (backbone_anew or neck_anew):
    return None
  neck = {}
  if b.name == "resnet_ws":
    backbone, neck = pretrained.load_resnet_ws(
      b.pretrained, depth=b.depth, cache_dir=cache_dir
    )
  elif b.name == "resnet":
    backbone, neck = pretrained.load_resnet(
      b.pretrained, depth=b.depth, cache_dir=cache_dir
    )
  else:
    backbone = pretrained.load_efficientnet_lite0(
      path=None if b.pretrained == "imagenet" else b.pretrained,
      cache_dir=cache_dir,
    )
  found = {
    collection: {"extractor": {"backbone": tree}}
    for collection, tree in backbone.items()
  }
  misfit = _neck_misfit(config, neck)
  if not misfit:
    found["params"]["neck"] = neck
  elif config.neck.widths and neck_anew:
    print(f"train: the neck starts at random: {misfit}")
  elif neck and not config.neck.widths:
    print(f"train: the neck of {b.pretrained} is not used: {misfit}")
  return found


def _neck_misfit(
  config: ml_collections.ConfigDict, neck: dict[str, Any]
) -> str:
  """Why pretrained weights of a neck cannot be this model's; "" if they can."""
  source = config.backbone.pretrained
  if not neck:
    return f"{source!r} has none"
  widths = tuple(neck[layer]["bias"].size for layer in ("fc1", "fc2"))
  for field, found, wanted in (
    ("neck.widths", tuple(config.neck.widths), widths),
    ("backbone.outputs", tuple(config.backbone.outputs), ("res5",)),
    ("backbone.projection", config.backbone.projection, 0),
    (
      "pooling.output_size",
      tuple(config.pooling.output_size),
      pretrained.NECK_BINS,
    ),
    ("pooling.reduce", config.pooling.reduce, "flatten"),
    ("pooling.average", config.pooling.average, False),
  ):
    if found != wanted:
      return f"config.{field} is {found!r}, that of {source} needs {wanted!r}"
  return ""


def warm_up_optimizer(
  config: ml_collections.ConfigDict, params: Any
) -> optax.GradientTransformation | None:
  """The optimizer of the tag warm-up: backbone and tag head; None without."""
  if not config.warm_up.steps:
    return None
  return make_optimizer(
    params,
    name="adamw",
    schedule=optax.cosine_decay_schedule(
      config.warm_up.learning_rate, config.warm_up.steps
    ),
    weight_decay=config.warm_up.weight_decay,
    trained=("extractor/backbone", "tag_head"),
  )


def frozen_parameters(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Patterns of the backbone's parameters that keep their values.

  In the main phase: the warm-up trains the whole backbone.
  """
  backbone = "extractor/backbone/"
  freeze = config.backbone.freeze
  if freeze == "all":
    frozen = (backbone,)
  elif freeze == "none":
    frozen = ()
  else:
    stages = fields.STAGES[config.backbone.name]
    last = list(stages).index(freeze)
    frozen = tuple(backbone + s for s in list(stages.values())[: last + 1])
  # Another backbone has no norm to choose.
  if (
    config.backbone.name in fields.RESNETS and config.backbone.norm == "frozen"
  ):
    frozen += (backbone + ".*norm/",)
  return frozen


def main_optimizer(
  config: ml_collections.ConfigDict, params: Any
) -> optax.GradientTransformation:
  """The optimizer of mining and branches: all that is not frozen."""
  c = config.train
  return make_optimizer(
    params,
    name=c.optimizer,
    schedule=step_decay(
      learning_rate=scaled_rate(
        learning_rate=c.learning_rate,
        batch_size=c.batch_size,
        reference_batch_size=c.reference_batch_size,
      ),
      boundaries=tuple(c.boundaries),
      rise=c.rise,
    ),
    momentum=c.momentum,
    weight_decay=c.weight_decay,
    bias_lr_factor=c.bias_lr_factor,
    trained=("extractor", "neck", "heads", "instance", "semantic", "cells"),
    frozen=frozen_parameters(config),
  )


def mining_settings(
  config: ml_collections.ConfigDict, *, num_things: int, tags: np.ndarray
) -> MiningSettings:
  """`config.mining` as plain settings.

  Args:
    config: see configs/base.py.
    num_things: T.
    tags: [N, K] of the training images, which tell how many segments there are
      to keep room for.
  """
  c = config.mining
  return MiningSettings(
    num_things=num_things,
    num_slots=slots_needed(
      tags,
      num_things=num_things,
      segments_per_thing=c.segments_per_thing,
      segments_per_stuff=c.segments_per_stuff,
    ),
    segments_per_thing=c.segments_per_thing,
    segments_per_stuff=c.segments_per_stuff,
    score_ratio=c.score_ratio,
    foreground_iou=c.foreground_iou,
    background_iou=tuple(c.background_iou),
    iou_kind=c.iou_kind,
  )


def loss_settings(config: ml_collections.ConfigDict) -> LossSettings:
  """`config.losses` as plain settings."""
  return LossSettings(**config.losses)
