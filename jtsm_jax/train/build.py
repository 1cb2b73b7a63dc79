"""From a configuration to the model, its settings and its first weights."""

from __future__ import annotations

import math
import operator
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from jtsm_jax import workers
from jtsm_jax.backbones import (
  efficientnet_lite,
  pretrained,
  resnet,
  resnet_ws,
)
from jtsm_jax.data.pipeline import MAX_SUPERPIXELS
from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.mining.labels import slots_needed
from jtsm_jax.mining.masks import MaskReestimator
from jtsm_jax.models.cell_head import CellHead
from jtsm_jax.models.features import FeatureExtractor
from jtsm_jax.models.instance_branch import InstanceBranch
from jtsm_jax.models.jtsm import JTSM
from jtsm_jax.models.neck_and_heads import MiningHeads, Neck, TagHead
from jtsm_jax.models.proposal_features import ProposalFeatures
from jtsm_jax.models.semantic_branch import SemanticBranch
from jtsm_jax.proposals.store import ProposalStore
from jtsm_jax.train.feature_cache import FeatureCache, cache_bytes
from jtsm_jax.train.objectives import LossSettings, MiningSettings
from jtsm_jax.train.schedule import make_optimizer, scaled_rate, step_decay
from jtsm_jax.types import Categories, InputError

STAGES = {
  "resnet_ws": {
    "stem": "stem[123]",
    **{f"res{i}": f"res{i}_" for i in range(2, 6)},
  },
  "resnet": {
    "stem": "stem/",
    **{f"res{i}": f"res{i}_" for i in range(2, 6)},
  },
  "efficientnet_lite0": {
    "stem": "stem",
    "stage1": "block0/",
    "stage2": "block[12]/",
    "stage3": "block[34]/",
    "stage4": "block[567]/",
    "stage5": "block([89]|10)/",
    "stage6": "block1[1234]/",
    "stage7": "block15/",
    "head": "head",
  },
}
"""Stages of each backbone in order, and the beginnings of their parameters."""

RESNETS = ("resnet_ws", "resnet")
"""Backbones whose width and norm can be chosen."""

STRIDES = {
  "resnet_ws": (8, 16),
  "resnet": (8, 16, 32),
  "efficientnet_lite0": (8, 16, 32),
}

WEIGHTS = {
  "resnet_ws": (".pkl", ".pth", ".safetensors"),
  "resnet": (".pth", ".safetensors"),
  "efficientnet_lite0": (".pth", ".safetensors"),
}
"""The files of weights that each backbone takes."""

CHOICES = {
  "task": ("panoptic", "instance", "detection"),
  "backbone.name": tuple(STAGES),
  "backbone.depth": tuple(resnet_ws.BLOCKS),
  "backbone.norm": ("frozen", "batch", "group"),
  "pooling.kind": ("moi", "tps", "roi", "roi_align"),
  "pooling.compensation": ("bins", "official", "features", ""),
  "pooling.availability": ("any", "coverage"),
  "pooling.reduce": ("flatten", "mean"),
  "reestimation.init": ("segment", "rectangle", "none"),
  "losses.mil_reduction": ("sum", "mean"),
  "losses.refinement_reduction": ("mean", "sum"),
  "train.optimizer": ("sgd", "adamw"),
  "train.precision": ("float32", "bfloat16"),
  "train.remat": ("", "backbone"),
  "evaluation.nms_kind": ("masks", "boxes"),
  "evaluation.voc_metric": ("area", "11point"),
}
"""The values of the fields that choose one of a few."""


def check_fields(config: ml_collections.ConfigDict) -> None:
  """Looks for values that no part of the program knows, before any work.

  Raises:
    InputError: a field is at fault; says which values it may have.
  """
  for field, choices in CHOICES.items():
    value = operator.attrgetter(field)(config)
    if value not in choices:
      raise InputError(
        f"config.{field} is {value!r}; wanted one of "
        + ", ".join(map(repr, choices))
      )
  b = config.backbone
  if b.stride not in STRIDES[b.name]:
    raise InputError(
      f"config.backbone.stride is {b.stride}; {b.name} has one of "
      f"{', '.join(map(str, STRIDES[b.name]))}"
    )
  stages = tuple(STAGES[b.name])
  outputs = stages[1:]  # the stem is no output
  if not b.outputs or not set(b.outputs) <= set(outputs):
    raise InputError(
      f"config.backbone.outputs is {tuple(b.outputs)}; wanted some of the "
      f"stages of {b.name}: {', '.join(outputs)}"
    )
  if b.freeze not in ("all", "none", *stages):
    raise InputError(
      f"config.backbone.freeze is {b.freeze!r}; wanted 'all', 'none' or a "
      f"stage of {b.name}: {', '.join(stages)}"
    )
  _check_pretrained(b)
  for group in ("data", "evaluation"):
    canvases(config, group)
  if not 1 <= config.proposals.num_superpixels <= MAX_SUPERPIXELS:
    raise InputError(
      f"config.proposals.num_superpixels is {config.proposals.num_superpixels};"
      f" wanted 1 to {MAX_SUPERPIXELS}"
    )
  exponents = tuple(config.pooling.size_exponents)
  if len(exponents) != 2:
    raise InputError(
      f"config.pooling.size_exponents is {exponents}; wanted two numbers, of "
      "the maxima and of the average, such as (0.25, 0.5)"
    )
  for group in ("train", "evaluation"):
    block = config[group].proposal_block
    if block < 0 or block % 8:
      raise InputError(
        f"config.{group}.proposal_block is {block}; wanted a multiple of 8, or "
        "0 for all proposals at once"
      )
  for field in (
    "train.log_every",
    "train.checkpoint_every",
    "train.calibration_images",
    "evaluation.batch_size",
  ):
    value = operator.attrgetter(field)(config)
    if value < 1:
      raise InputError(f"config.{field} is {value}; wanted at least 1")
  for field in ("evaluate_every", "images_every"):
    if config.train[field] < 0:
      raise InputError(
        f"config.train.{field} is {config.train[field]}; wanted a number of "
        "steps, or 0 for never"
      )
  c = config.train
  if c.accumulation < 1 or c.batch_size % c.accumulation:
    raise InputError(
      f"config.train.accumulation is {c.accumulation}; it must divide "
      f"config.train.batch_size = {c.batch_size}"
    )
  if c.memory_gib < 0:
    raise InputError(
      f"config.train.memory_gib is {c.memory_gib}; wanted a device's memory in "
      "GiB, or 0 for what the device says"
    )
  if not 0 <= c.ema_decay < 1:
    raise InputError(
      f"config.train.ema_decay is {c.ema_decay}; wanted a number in [0, 1), "
      "such as 0.999; 0 keeps no average"
    )
  if config.evaluation.ema and not c.ema_decay:
    raise InputError(
      "config.evaluation.ema asks for the average of the weights, and "
      "config.train.ema_decay = 0 keeps none"
    )
  if config.evaluation.show_present and not config.evaluation.calibrate:
    raise InputError(
      "config.evaluation.show_present needs the thresholds that say what an "
      "image shows: set config.evaluation.calibrate=True, too"
    )
  if config.data.colour_factor < 1:
    raise InputError(
      f"config.data.colour_factor is {config.data.colour_factor}; wanted a"
      " factor of at least 1, which changes nothing"
    )
  if not 0 < config.data.crop <= 1:
    raise InputError(
      f"config.data.crop is {config.data.crop}; wanted a share of an image's"
      " height and width in (0, 1]; 1 does not crop"
    )


def check_schedule(config: ml_collections.ConfigDict) -> None:
  """Looks whether what a new run is to train has steps to learn in.

  Raises:
    InputError: a branch would keep its random weights, which have a say in the
      results all the same.
  """
  has_instance = config.instance.enabled and config.task != "detection"
  has_semantic = config.semantic.enabled and config.task == "panoptic"
  start, lag = config.reestimation.start, config.reestimation.lag
  steps = config.train.steps
  if (has_instance or has_semantic) and start + lag >= steps:
    raise InputError(
      f"config.reestimation.start is {start} (with a lag of {lag}) and "
      f"config.train.steps is {steps}: the branches would never learn; make "
      f"reestimation.start less than {max(steps - lag, 0)}, or leave them out "
      "with instance.enabled=False and semantic.enabled=False"
    )


def build_model(
  config: ml_collections.ConfigDict, categories: Categories
) -> JTSM:
  """The model of a configuration.

  Raises:
    InputError: from `check_fields`.
  """
  check_fields(config)
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
    if backbone_anew and b.freeze != "none" and not config.warm_up.steps:
      raise InputError(
        "config.backbone: without pretrained weights and without a tag warm-up "
        f"a backbone frozen up to {b.freeze!r} stays random; set "
        "backbone.freeze='none', or warm_up.steps, or backbone.pretrained"
      )
    return None
  _check_pretrained(b)
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


def _check_pretrained(backbone: ml_collections.ConfigDict) -> None:
  """Looks whether there can be such weights; the file may be elsewhere."""
  name, source = backbone.name, backbone.pretrained
  if not source or (name, source) == ("efficientnet_lite0", "imagenet"):
    return
  if pathlib.Path(source).suffix not in WEIGHTS[name]:
    raise InputError(
      f"config.backbone.pretrained is {source!r}: there are no such weights "
      f"for {name}. It takes the path of a {' or '.join(WEIGHTS[name])} file, "
      "efficientnet_lite0 also 'imagenet'; '' starts at random. See "
      "docs/pretrained.md"
    )
  if name not in RESNETS:
    return  # has neither a width nor a norm to choose
  for field, wanted in (("width", (1.0,)), ("norm", ("frozen", "batch"))):
    if backbone[field] not in wanted:
      raise InputError(
        f"config.backbone.{field} is {backbone[field]!r}: pretrained weights "
        f"are for {' or '.join(map(repr, wanted))}; change it, or start at "
        "random with backbone.pretrained=''"
      )


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


def canvases(
  config: ml_collections.ConfigDict, group: str
) -> tuple[tuple[int, int], ...]:
  """`config.data.canvases` or `config.evaluation.canvases`, checked.

  Raises:
    InputError: it is not a tuple of (height, width), or a side is no multiple
      of the strides of the features and of the pseudo masks.
  """
  value = config[group].canvases
  unit = math.lcm(config.backbone.stride, config.losses.mask_stride)
  try:
    found = tuple((int(height), int(width)) for height, width in value)
  except (TypeError, ValueError):
    found = ()
  if not found or any(side < 1 or side % unit for c in found for side in c):
    raise InputError(
      f"config.{group}.canvases is {value!r}; wanted a tuple of (height, "
      f"width) in multiples of {unit} pixels (backbone.stride and "
      "losses.mask_stride), such as ((320, 480), (480, 320))"
    )
  return found


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


def main_optimizer(
  config: ml_collections.ConfigDict, params: Any
) -> optax.GradientTransformation:
  """The optimizer of mining and branches: all that is not frozen."""
  c = config.train
  backbone = "extractor/backbone/"
  freeze = config.backbone.freeze
  if freeze == "all":
    frozen = (backbone,)
  elif freeze == "none":
    frozen = ()
  else:
    stages = STAGES[config.backbone.name]
    last = list(stages).index(freeze)
    frozen = tuple(backbone + s for s in list(stages.values())[: last + 1])
  # Another backbone has no norm to choose.
  if config.backbone.name in RESNETS and config.backbone.norm == "frozen":
    frozen += (backbone + ".*norm/",)
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
    frozen=frozen,
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
  )


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


def loss_settings(config: ml_collections.ConfigDict) -> LossSettings:
  """`config.losses` as plain settings."""
  return LossSettings(**config.losses)


def caches_features(
  config: ml_collections.ConfigDict,
  model: JTSM,
  variables: Any,
  source: RecordSource,
  *,
  split: str,
) -> bool:
  """Whether a split's features stay the same and fit on the disk.

  Args:
    config: see configs/base.py.
    model: the model.
    variables: what `model.apply` takes; shapes are enough.
    source: the split.
    split: its name.
  """
  size = _feature_bytes(config, model, variables, source, split=split)
  return size is not None and size <= config.backbone.cache_gib * 2**30


def _feature_bytes(config, model, variables, source, *, split) -> int | None:
  """Of a split's features on disk; None where they do not stay the same."""
  if not (config.backbone.cache and config.backbone.freeze == "all"):
    return None
  sizes = set(canvases(config, "evaluation"))
  if split == "train":
    if config.data.colour_factor != 1 or config.data.crop != 1:
      return None  # every step sees other colours or other parts
    sizes |= set(canvases(config, "data"))
  return cache_bytes(
    model, variables, canvases=tuple(sizes), num_images=len(source)
  )


def open_feature_cache(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  model: JTSM,
  variables: Any,
  source: RecordSource,
  *,
  split: str,
) -> FeatureCache | None:
  """The cache of a split; None where `caches_features` says no."""
  size = _feature_bytes(config, model, variables, source, split=split)
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
