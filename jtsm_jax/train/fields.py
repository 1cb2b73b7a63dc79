"""The fields of a configuration: what each may be, told before any work."""

from __future__ import annotations

import math
import operator
import pathlib

import ml_collections

from jtsm_jax.backbones import resnet_ws
from jtsm_jax.data.pipeline import MAX_SUPERPIXELS
from jtsm_jax.proposals.generate import LIMITS, PRESETS
from jtsm_jax.types import InputError

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
  "proposals.preset": tuple(PRESETS),
  "backbone.name": tuple(STAGES),
  "backbone.depth": tuple(resnet_ws.BLOCKS),
  "backbone.norm": ("frozen", "batch", "group"),
  "pooling.kind": ("moi", "tps", "roi", "roi_align"),
  "pooling.compensation": ("bins", "official", "features", ""),
  "pooling.availability": ("any", "coverage"),
  "pooling.reduce": ("flatten", "mean"),
  "mining.iou_kind": ("masks", "boxes"),
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
  for field, least in {
    "train.batch_size": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.calibration_images": 1,
    "train.loader_threads": 1,
    "train.loader_workers": 0,
    "losses.mask_stride": 1,
    "losses.instances_per_image": 1,
    "reestimation.iterations": 1,
    "reestimation.longest_side": 1,
    "reestimation.threads": 0,
    "proposals.num_workers": 0,
    "evaluation.batch_size": 1,
  }.items():
    value = operator.attrgetter(field)(config)
    if value < least:
      raise InputError(f"config.{field} is {value}; wanted at least {least}")
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
  check_pretrained(b)
  for group in ("data", "evaluation"):
    canvases(config, group)
  p = config.proposals
  for field, (low, high) in {
    "num_superpixels": (1, MAX_SUPERPIXELS),
    "max_proposals": LIMITS["max_proposals"],
    "max_side": LIMITS["max_side"],
  }.items():
    if not low <= p[field] <= high:
      raise InputError(
        f"config.proposals.{field} is {p[field]}; wanted {low} to {high}"
      )
  if PRESETS[p.preset].ranker == "quality" and not p.network:
    raise InputError(
      f"config.proposals.preset {p.preset!r} ranks by the network's features:"
      " set config.proposals.network=True, or choose proposals.preset='fast',"
      " which needs none"
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
  if config.pooling.sampling_ratio < 0:
    raise InputError(
      f"config.pooling.sampling_ratio is {config.pooling.sampling_ratio}; "
      "wanted a number of points, or 0 for as many as a bin has cells"
    )
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


def check_start(config: ml_collections.ConfigDict) -> None:
  """Looks whether there is what a training starts with, before the proposals.

  Raises:
    InputError: there is no such file, or the backbone would stay random.
  """
  b = config.backbone
  if not b.pretrained:
    check_random_backbone(config)
  elif b.pretrained != "imagenet" and not pathlib.Path(b.pretrained).is_file():
    raise InputError(
      f"config.backbone.pretrained: there is no file {b.pretrained}; see "
      "docs/pretrained.md"
    )


def check_random_backbone(config: ml_collections.ConfigDict) -> None:
  """Raises InputError if a random backbone would stay as it is."""
  b = config.backbone
  if b.freeze != "none" and not config.warm_up.steps:
    raise InputError(
      "config.backbone: without pretrained weights and without a tag warm-up "
      f"a backbone frozen up to {b.freeze!r} stays random; set "
      "backbone.freeze='none', or warm_up.steps, or backbone.pretrained"
    )


def check_pretrained(backbone: ml_collections.ConfigDict) -> None:
  """Looks whether there can be such weights; the file may be elsewhere.

  Args:
    backbone: `config.backbone`.

  Raises:
    InputError: there are none for such a backbone.
  """
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
