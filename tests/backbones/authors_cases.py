"""The entries of the authors' files of ResNet-WS, from their description.

The files are 200 to 1,000 megabytes, most of it the neck's, so these necks are
narrower. Everything else has its real name and shape.
"""

from __future__ import annotations

import zlib

import numpy as np

NECK_WIDTHS = (6, 5)
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def layers(depth):
  """Yields (ours, Caffe2's name, PyTorch's name, shape O, I, H, W)."""
  for n in (1, 2, 3):
    shape = (64, 3 if n == 1 else 64, 3, 3)
    yield f"stem{n}", f"stem_conv{n}", f"stem.conv{n}", shape
  inputs = 64
  for stage, inner in zip((2, 3, 4, 5), (64, 128, 256, 512), strict=True):
    outputs = inner if depth == 18 else 4 * inner
    for i in range(BLOCKS[depth][stage - 2]):
      ours, caffe2, torch = (
        f"res{stage}_{i}",
        f"res{stage}_{i}",
        f"res{stage}.{i}",
      )
      if depth == 18:
        shapes = {"a": (inner, inputs, 3, 3), "b": (inner, inner, 3, 3)}
      else:
        shapes = {
          "a": (inner, inputs, 1, 1),
          "b": (inner, inner, 3, 3),
          "c": (outputs, inner, 1, 1),
        }
      for n, (letter, shape) in enumerate(shapes.items(), start=1):
        yield (
          f"{ours}/conv{n}",
          f"{caffe2}_branch2{letter}",
          f"{torch}.conv{n}",
          shape,
        )
      if inputs != outputs:
        yield (
          f"{ours}/shortcut",
          f"{caffe2}_branch1",
          f"{torch}.shortcut",
          (outputs, inputs, 1, 1),
        )
      inputs = outputs


def values(key, shape):
  """The same array for a key, in (0, 1)."""
  rng = np.random.default_rng(zlib.crc32(key.encode()))
  return rng.random(shape, np.float32)


def neck(depth):
  """The neck's layers: {"fc1": (weight [out, in], bias), "fc2": ...}."""
  inputs = (512 if depth == 18 else 2048) * 49
  found = {}
  for layer, width in zip(("fc1", "fc2"), NECK_WIDTHS, strict=True):
    weight = values(f"{layer}/weight", (width, inputs))
    found[layer] = weight, values(f"{layer}/bias", (width,))
    inputs = width
  return found


def converted_caffe2_entries(depth):
  """The `_d2.pkl` file, after the authors' tool."""
  entries = {}
  for ours, name, _, shape in layers(depth):
    entries[f"{name}_w"] = values(f"{ours}/kernel", shape)
    entries[f"{name}_bn_s"] = values(f"{ours}/scale", shape[:1])
    entries[f"{name}_bn_b"] = values(f"{ours}/bias", shape[:1])
  for name, (weight, bias) in neck(depth).items():
    entries[f"{name}_w"], entries[f"{name}_b"] = weight, bias
  return entries


def raw_caffe2_entries(depth):
  """The `.pkl` file as published: other names, classifier and momenta."""
  renamed = {"stem_conv1": "conv1_1", "stem_conv2": "conv1_2"}
  renamed |= {"stem_conv3": "conv1_3", "fc1": "fc6", "fc2": "fc7"}
  entries = {}
  for name, value in converted_caffe2_entries(depth).items():
    for after, before in renamed.items():
      name = name.replace(after, before)
    entries[name] = value
    entries[f"{name}_momentum"] = value[:1]
  entries["fc8_w"] = values("fc8", (1000, NECK_WIDTHS[1]))
  entries["fc8_b"] = values("fc8", (1000,))
  entries["lr"] = np.array([0.1], np.float32)
  return entries


def torch_entries(depth):
  """The `.pth` file, with its statistics."""
  entries = {}
  for ours, _, name, shape in layers(depth):
    name = f"module.backbone.{name}"
    entries[f"{name}.weight"] = values(f"{ours}/kernel", shape)
    for theirs, kind in (
      ("weight", "scale"),
      ("bias", "bias"),
      ("running_mean", "mean"),
      ("running_var", "var"),
    ):
      entries[f"{name}.norm.{theirs}"] = values(f"{ours}/{kind}", shape[:1])
    entries[f"{name}.norm.num_batches_tracked"] = np.array(9)
  for name, (weight, bias) in neck(depth).items():
    entries[f"module.neck.{name}.weight"] = weight
    entries[f"module.neck.{name}.bias"] = bias
  entries["module.linear.weight"] = values("fc8", (1000, NECK_WIDTHS[1]))
  entries["module.linear.bias"] = values("fc8", (1000,))
  return entries


def converted_torch_entries(depth):
  """The `.pth` file after the authors' tool."""
  return {
    name.replace("module.backbone.", "backbone.").replace(
      "module.neck.fc", "roi_heads.box_head.fc"
    ): value
    for name, value in torch_entries(depth).items()
  }
