"""Times the pooling operators, and torchvision's beside them.

    pip install -e '.[bench]'        # torch and torchvision; may be left out
    python benchmarks/pooling.py --output pooling.json
    python benchmarks/pooling.py --output pooling.json --proposals 1000 4000 \
        --grids 60x80 --channels 512 --dtypes float32

Random boxes of all sizes up to the whole grid, masks 60 % full, 7 x 7 bins. The
operators take turns, so that a busy machine slows all of them; the table has
medians in milliseconds, and the ratio to torchvision's roi_pool. A kernel that
the device cannot run is left out, and its error printed. Memory is what
forward and backward need beside arguments and results, as XLA or torch (on
CUDA) count it. Rows go to the JSON file as they come, with device and versions.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import time

# Beside torch in one process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import pallas_kernels as pk

BINS = (7, 7)
BY_DEVICE = {
  "cpu": ("xla",),
  "gpu": ("xla", "pallas_triton", "pallas_mosaic_gpu"),
  "tpu": ("xla", "pallas_tpu"),
}


def main() -> None:
  """Measures every combination that was asked for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument(
    "--proposals", type=int, nargs="*", default=(256, 1000, 4000)
  )
  parser.add_argument(
    "--grids", nargs="*", default=("30x40", "60x80", "152x203")
  )
  parser.add_argument(
    "--channels", type=int, nargs="*", default=(256, 512, 2048)
  )
  parser.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"))
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  versions = {"jax": jax.__version__, "python": platform.python_version()}
  if has_torch := importlib.util.find_spec("torchvision") is not None:
    import torch
    import torchvision

    versions |= {
      "torch": torch.__version__,
      "torchvision": torchvision.__version__,
    }
  device = jax.devices()[0]
  report = {"device": device.device_kind, "cores": os.cpu_count()} | versions
  print(", ".join(f"{key} {value}" for key, value in report.items()))
  print(
    f"{'P':>5}{'grid':>9}{'C':>6}{'dtype':>10}  {'operator':<24}"
    f"{'forward':>9}{'ratio':>7}{'+backward':>11}{'ratio':>7}{'MiB':>8}"
  )
  rows = []
  for P, grid, C, dtype in itertools.product(
    args.proposals, args.grids, args.channels, args.dtypes
  ):
    size = tuple(int(n) for n in grid.split("x"))
    case = {"proposals": P, "grid": size, "channels": C, "dtype": dtype}
    features, masks, boxes = inputs(P, size, C)
    operators = jax_operators(features, masks, boxes, jnp.dtype(dtype))
    if has_torch:
      operators |= torch_operators(features, boxes, dtype)
    measured = measure(operators, args.repeats)
    base = measured.get("torchvision.roi_pool")
    for name, found in measured.items():
      row = case | {"operator": name} | found
      for key in ("forward_ms", "both_ms"):
        row[f"{key}_ratio"] = found[key] / base[key] if base else None
      rows.append(row)
      print_row(row)
    args.output.write_text(json.dumps(report | {"rows": rows}, indent=1))


def inputs(P, size, C):
  """Features of one image, random masks and inclusive boxes on its grid."""
  rng = np.random.default_rng(0)
  extent = np.stack([rng.integers(1, n + 1, P) for n in size], 1)
  start = (rng.random((P, 2)) * (np.array(size) - extent + 1)).astype(np.int32)
  boxes = np.concatenate([start, start + extent - 1], 1).astype(np.int32)
  features = rng.normal(size=(*size, C)).astype(np.float32)
  return features, rng.random((P, *size)) < 0.6, boxes


def jax_operators(features, masks, boxes, dtype):
  """Name -> (forward, forward and backward, bytes), compiled."""
  features = jnp.asarray(features, dtype)
  masks, boxes = jnp.asarray(masks), jnp.asarray(boxes)
  pools = {
    f"moi_pool {name}": functools.partial(
      pk.moi_pool, compensation=None, implementation=name
    )
    for name in BY_DEVICE[jax.default_backend()]
  }
  if jax.default_backend() == "gpu":
    pools["moi_pool deterministic"] = functools.partial(
      pk.moi_pool, compensation=None, deterministic=True
    )
  pools["roi_pool"] = lambda f, m, b: pk.roi_pool(f, b)
  pools["roi_align"] = lambda f, m, b: pk.roi_align(f, b, stride=1)
  operators = {}
  for name, pool in pools.items():

    def both(f, m, b, g, pool=pool):
      pooled, pullback = jax.vjp(lambda f: pool(f, m, b), f)
      return pooled, pullback(g)

    weights = jnp.ones((len(boxes), *BINS, features.shape[-1]), dtype)
    arguments = features, masks, boxes
    try:
      forward = jax.jit(pool).lower(*arguments).compile()
      both = jax.jit(both).lower(*arguments, weights).compile()
      _wait(both, *arguments, weights)
    except Exception as error:
      if "pallas" not in name:
        raise
      # A kernel that is not for this device, such as Mosaic GPU for Ampere.
      print(f"{name} of {dtype} left out: {str(error).splitlines()[0]}")
      continue
    operators[name] = (
      functools.partial(_wait, forward, *arguments),
      functools.partial(_wait, both, *arguments, weights),
      lambda both=both: both.memory_analysis().temp_size_in_bytes,
    )
  return operators


def _wait(function, *arguments):
  jax.block_until_ready(function(*arguments))


def torch_operators(features, boxes, dtype):
  """The same of torchvision, which has no masks."""
  import torch
  from torchvision import ops

  device = "cuda" if torch.cuda.is_available() else "cpu"
  image = torch.from_numpy(features.transpose(2, 0, 1)[None].copy())
  image = image.to(device, getattr(torch, dtype)).requires_grad_()
  rois = np.concatenate([np.zeros((len(boxes), 1)), boxes[:, [1, 0, 3, 2]]], 1)
  rois = torch.from_numpy(rois).to(device, image.dtype)
  pools = {
    "torchvision.roi_pool": functools.partial(ops.roi_pool, output_size=BINS),
    "torchvision.roi_align": functools.partial(
      ops.roi_align, output_size=BINS, sampling_ratio=2, aligned=True
    ),
  }

  def wait():
    if device == "cuda":
      torch.cuda.synchronize()

  def forward(pool):
    with torch.no_grad():
      pool(image, rois)
    wait()

  def both(pool):
    image.grad = None
    pooled = pool(image, rois)
    pooled.backward(torch.ones_like(pooled))
    wait()

  def memory(pool):
    if device == "cpu":
      return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(pool)
    return torch.cuda.max_memory_allocated() - before

  operators = {}
  for name, pool in pools.items():
    try:
      both(pool)
    except RuntimeError as error:  # A type that it does not know.
      print(f"{name} of {dtype} on {device}: {str(error).splitlines()[0]}")
      continue
    operators[name] = tuple(
      functools.partial(f, pool) for f in (forward, both, memory)
    )
  return operators


def measure(operators, repeats):
  """Medians over rounds in which each operator has its turn."""
  times = {name: ([], []) for name in operators}
  for i in range(repeats + 1):
    for name, functions in operators.items():
      for k in range(2):
        start = time.perf_counter()
        functions[k]()
        if i:  # The first round warms up.
          times[name][k].append(1e3 * (time.perf_counter() - start))
  return {
    name: {
      "forward_ms": statistics.median(times[name][0]),
      "both_ms": statistics.median(times[name][1]),
      "bytes": operators[name][2](),
    }
    for name in operators
  }


def print_row(row):
  """One line of the table."""

  def ratio(key):
    return "" if row[key] is None else f"{row[key]:.2f}"

  memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
  grid = "x".join(map(str, row["grid"]))
  print(
    f"{row['proposals']:>5}{grid:>9}{row['channels']:>6}{row['dtype']:>10}  "
    f"{row['operator']:<24}"
    f"{row['forward_ms']:>9.2f}{ratio('forward_ms_ratio'):>7}"
    f"{row['both_ms']:>11.2f}{ratio('both_ms_ratio'):>7}{memory:>8}",
    flush=True,
  )


if __name__ == "__main__":
  main()
