"""How pretrained weights are called in the files that they come in.

A variable is named here by its path, "params/res3_0/conv2/norm/scale", and what
belongs to the neck "neck/fc1/kernel".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Layout(NamedTuple):
  """How the entries of a kind of file are called.

  Attributes:
    network: whose weights these files hold.
    mark: what one of the names begins with, and in no other kind.
    plain: a name without what tools and wrappers make of it.
    name: of one of our variables, plain.
  """

  network: str
  mark: str
  plain: Callable[[str], str]
  name: Callable[[str], str]


_CAFFE2_LAYERS = {
  "shortcut": "branch1",
  "conv1": "branch2a",
  "conv2": "branch2b",
  "conv3": "branch2c",
}
_CAFFE2_ENTRIES = {
  "conv/kernel": "w",
  "norm/scale": "bn_s",
  "norm/bias": "bn_b",
  "norm/mean": "bn_rm",
  "norm/var": "bn_riv",
}
_CAFFE2_SYNONYMS = {
  "bn_gamma": "bn_s",
  "bn_beta": "bn_b",
  "bn_running_mean": "bn_rm",
  "bn_running_var": "bn_riv",
}
_TORCH_ENTRIES = {
  "conv/kernel": "weight",
  "kernel": "weight",
  "bias": "bias",
  "norm/scale": "weight",
  "norm/bias": "bias",
  "norm/mean": "running_mean",
  "norm/var": "running_var",
}


def _parts(ours: str) -> tuple[str, str, str]:
  """Block res3_0, layer conv2 ("" in the stem), entry norm/scale."""
  pattern = r"(?:params|batch_stats)/(\w+)(?:/(\w+))?/((?:conv|norm)/\w+)"
  block, layer, entry = re.fullmatch(pattern, ours).groups()
  return block, layer or "", entry


def _caffe2_plain(name: str) -> str:
  """As after the authors' tool: stem_conv1_w for conv1_1_w, fc1_w for fc6_w."""
  name = re.sub(r"^conv1_(?=\d)", "stem_conv", name)
  name = re.sub(r"^fc([678])(?=_)", lambda m: f"fc{int(m[1]) - 5}", name)
  for synonym, usual in _CAFFE2_SYNONYMS.items():
    name = re.sub(f"{synonym}$", usual, name)
  return name


def _caffe2_name(ours: str) -> str:
  if ours.startswith("neck/"):
    _, layer, entry = ours.split("/")
    return f"{layer}_{entry[0].replace('k', 'w')}"
  block, layer, entry = _parts(ours)
  block = re.sub(r"^stem", "stem_conv", block)
  names = [block, _CAFFE2_LAYERS.get(layer), _CAFFE2_ENTRIES[entry]]
  return "_".join(filter(None, names))


def _torch_ws_plain(name: str) -> str:
  name = name.removeprefix("module.").removeprefix("backbone.")
  return re.sub(r"^roi_heads\.box_head\.", "neck.", name)


def _torch_ws_name(ours: str) -> str:
  if ours.startswith("neck/"):
    _, layer, entry = ours.split("/")
    return f"neck.{layer}.{_TORCH_ENTRIES[entry]}"
  block, layer, entry = _parts(ours)
  block = re.sub(r"^stem", "stem.conv", block).replace("_", ".")
  norm = "norm" if entry.startswith("norm/") else None
  return ".".join(filter(None, [block, layer, norm, _TORCH_ENTRIES[entry]]))


def _torchvision_name(ours: str) -> str:
  block, layer, entry = _parts(ours)
  is_norm = entry.startswith("norm/")
  if layer == "shortcut":
    layer = f"downsample.{int(is_norm)}"
  else:
    layer = f"{'bn' if is_norm else 'conv'}{layer.removeprefix('conv') or 1}"
  names = [layer, _TORCH_ENTRIES[entry]]
  if block != "stem":
    stage, index = block.removeprefix("res").split("_")
    names = [f"layer{int(stage) - 1}", index, *names]
  return ".".join(names)


CAFFE2 = Layout("resnet_ws", "res2_0_branch", _caffe2_plain, _caffe2_name)
TORCH_WS = Layout("resnet_ws", "res2.0.", _torch_ws_plain, _torch_ws_name)
TORCHVISION = Layout("resnet", "layer1.0.", str, _torchvision_name)
RESNET_LAYOUTS = (CAFFE2, TORCH_WS, TORCHVISION)


_EFFICIENTNET_LITE0_LAYERS = {
  "stem": "_conv_stem",
  "stem_norm": "_bn0",
  "expand": "_expand_conv",
  "expand_norm": "_bn0",
  "depthwise": "_depthwise_conv",
  "depthwise_norm": "_bn1",
  "project": "_project_conv",
  "project_norm": "_bn2",
  "head": "_conv_head",
  "head_norm": "_bn1",
  "classifier": "_fc",
}


def efficientnet_lite0_name(ours: str) -> str:
  """The name of a variable of EfficientNet-Lite0 in its PyTorch file."""
  _, *block, layer, entry = ours.split("/")
  if layer.endswith("_norm"):
    entry = f"norm/{entry}"
  names = [_EFFICIENTNET_LITE0_LAYERS[layer], _TORCH_ENTRIES[entry]]
  if block:
    names = ["_blocks", block[0].removeprefix("block"), *names]
  return ".".join(names)
