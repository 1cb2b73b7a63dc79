"""The same weights and the same image for torchvision and for us.

    python -m tests.backbones.torchvision_cases

writes what torchvision computes into torchvision_features.npz beside this file,
with which the tests compare where torchvision is not installed. It was written
with torchvision 0.29.2 and torch 2.15.0.
"""

from __future__ import annotations

import pathlib
import zlib

import numpy as np

FEATURES = pathlib.Path(__file__).with_name("torchvision_features.npz")
STORED = ((18, 32), (50, 8))  # depth, output stride
STAGES = ("res2", "res3", "res4", "res5")


def make_image():
  """[H, W, 3] float32 with odd sides."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(45, 61, 3)).astype(np.float32)


def make_entry(name, shape):
  """The same values for a name, whatever else there is."""
  if name.endswith("num_batches_tracked"):
    return np.int64(7)
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if len(shape) == 4:
    value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
  elif name.endswith("running_var"):
    value = rng.uniform(0.5, 1.5, shape)
  elif name.endswith(".weight") and len(shape) == 1:
    value = rng.uniform(0.2, 0.6, shape)  # or sums of many blocks grow large
  else:
    value = rng.normal(0, 0.1, shape)
  return value.astype(np.float32)


def entry_shapes(depth):
  """Names and shapes of torchvision's file, from the paper's table."""
  shapes = {}

  def layer(conv, norm, shape):
    shapes[f"{conv}.weight"] = shape
    for entry in ("weight", "bias", "running_mean", "running_var"):
      shapes[f"{norm}.{entry}"] = shape[:1]
    shapes[f"{norm}.num_batches_tracked"] = ()

  layer("conv1", "bn1", (64, 3, 7, 7))
  inputs = 64
  blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
  for stage, count in enumerate(blocks, start=1):
    inner = 32 * 2**stage
    outputs = inner if depth == 18 else 4 * inner
    for i in range(count):
      block = f"layer{stage}.{i}"
      if depth == 18:
        convs = [(inner, inputs, 3, 3), (inner, inner, 3, 3)]
      else:
        convs = [
          (inner, inputs, 1, 1),
          (inner, inner, 3, 3),
          (outputs, inner, 1, 1),
        ]
      for n, shape in enumerate(convs, start=1):
        layer(f"{block}.conv{n}", f"{block}.bn{n}", shape)
      if inputs != outputs:
        shape = (outputs, inputs, 1, 1)
        layer(f"{block}.downsample.0", f"{block}.downsample.1", shape)
      inputs = outputs
  shapes["fc.weight"], shapes["fc.bias"] = (1000, inputs), (1000,)
  return shapes


def torchvision_features(depth, output_stride):
  """The stages [H, W, C] of torchvision's network with these weights."""
  import torch
  import torchvision

  options = {}
  if output_stride < 32:
    options["replace_stride_with_dilation"] = [
      False,
      output_stride < 16,
      True,
    ]
  network = getattr(torchvision.models, f"resnet{depth}")(**options)
  network.load_state_dict(
    {
      name: torch.as_tensor(make_entry(name, tuple(value.shape)))
      for name, value in network.state_dict().items()
    }
  )
  network.eval()
  with torch.no_grad():
    x = torch.from_numpy(make_image().transpose(2, 0, 1)[None])
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    features = {}
    for i, stage in enumerate(STAGES, start=1):
      x = getattr(network, f"layer{i}")(x)
      features[stage] = x[0].numpy().transpose(1, 2, 0)
  return features


def some_channels(stage):
  """What of a stage [H, W, C] is stored: 8 of its channels."""
  return stage[..., :: stage.shape[-1] // 8]


if __name__ == "__main__":
  np.savez_compressed(
    FEATURES,
    **{
      f"{depth}/{output_stride}/{stage}": some_channels(value)
      for depth, output_stride in STORED
      for stage, value in torchvision_features(depth, output_stride).items()
    },
  )
