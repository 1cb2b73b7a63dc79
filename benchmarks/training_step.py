"""Times one training step of the paper's setting, and PyTorch's beside it.

    python benchmarks/training_step.py --output step.json
    python benchmarks/training_step.py --output step.json --torch
    python benchmarks/training_step.py --output step.json --small   # on a CPU

Random images, boxes of superpixels as proposals, pseudo masks as mined: what a
step computes does not depend on what it is shown. The parts of the step (frozen
backbone; mining and its gradients; branches and theirs; update) are timed one
by one and together. Utilisation is the operations of convolutions and matrix
products over those of a large matrix product in the same run. With --torch the
same step in plain PyTorch with torchvision's roi_pool takes turns with ours.
Medians; rows go to the JSON file as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time

# Beside torch in one process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import base
from jtsm_jax.train import build, objectives, step
from jtsm_jax.train.cost import matmul_flops
from jtsm_jax.train.state import create_state
from jtsm_jax.types import Batch, Categories, Category, pack_members

GRID = 40  # superpixels on a side


def main() -> None:
  """Measures every canvas."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--canvases", nargs="*", default=("688x928", "1216x1632"))
  parser.add_argument("--proposals", type=int, default=4000)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--accumulation", type=int, default=1)
  parser.add_argument("--proposal_block", type=int, default=0)
  parser.add_argument("--precision", default="bfloat16")
  parser.add_argument("--depth", type=int, default=18)
  parser.add_argument("--width", type=int, default=4096, help="of the neck")
  parser.add_argument("--channels", type=int, default=256, help="of branches")
  parser.add_argument("--instances", type=int, default=64, help="an image")
  parser.add_argument("--things", type=int, default=20)
  parser.add_argument("--stuff", type=int, default=33)
  parser.add_argument("--turns", type=int, default=20)
  parser.add_argument("--torch", action="store_true")
  parser.add_argument("--small", action="store_true", help="for a CPU")
  args = parser.parse_args()
  if args.small:
    args.canvases, args.proposals, args.batch = ("160x224",), 128, 2
    args.width, args.turns, args.precision = 256, 5, "float32"
    args.channels, args.instances = 64, 8
  rate = matmul_rate(args)
  print(f"{jax.devices()[0].device_kind}: {rate / 1e12:.2f} teraflops")
  rows = []
  for name in args.canvases:
    canvas = tuple(int(side) for side in name.split("x"))
    rows.append({"canvas": name, **measure(args, canvas, rate)})
    print_row(rows[-1])
    report = {
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "python": platform.python_version(),
      "settings": {k: v for k, v in vars(args).items() if k != "output"},
      "matmul_flops_per_second": rate,
      "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1, default=str))


def matmul_rate(args) -> float:
  """Operations per second of one large matrix product."""
  size = 1024 if args.small else 8192
  a = jnp.ones((size, size), jnp.dtype(args.precision))
  product = jax.jit(lambda a: a @ a)
  times = [seconds(lambda: product(a)) for _ in range(12)]
  return 2 * size**3 / statistics.median(times[2:])


def measure(args, canvas, rate) -> dict[str, float]:
  """Medians in milliseconds, and what they mean."""
  ours = our_step(args, canvas)
  theirs = None
  if args.torch:
    from torch_step import torch_step

    theirs = torch_step(args, canvas, synthetic_batch(args, canvas))
  times = {name: [] for name in ours["parts"]}
  whole, other = [], []
  for _ in range(2 + args.turns):
    whole.append(seconds(ours["whole"]))
    for name, part in ours["parts"].items():
      times[name].append(seconds(part))
    if theirs:
      start = time.perf_counter()
      theirs()
      other.append(time.perf_counter() - start)
  row = {name: 1e3 * statistics.median(t[2:]) for name, t in times.items()}
  row["step"] = 1e3 * statistics.median(whole[2:])
  row["images_per_second"] = 1e3 * args.batch / row["step"]
  row["teraflop"] = ours["flops"] / 1e12
  row["utilisation"] = ours["flops"] / (row["step"] / 1e3) / rate
  stats = jax.devices()[0].memory_stats() or {}
  row["peak_gib"] = stats.get("peak_bytes_in_use", 0) / 2**30
  row["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  if theirs:
    row["torch_step"] = 1e3 * statistics.median(other[2:])
    row["torch_over_ours"] = statistics.median(
      b / a for a, b in zip(whole[2:], other[2:], strict=True)
    )
  return row


def our_step(args, canvas) -> dict:
  """The whole step and its parts, as functions without arguments."""
  config = base.get_config()
  config.backbone.depth = args.depth
  config.neck.widths = (args.width, args.width)
  config.instance.channels = config.semantic.channels = args.channels
  config.losses.instances_per_image = args.instances
  config.proposals.max_proposals = args.proposals
  config.train.batch_size = args.batch
  config.train.accumulation = args.accumulation
  config.train.precision = args.precision
  config.train.proposal_block = args.proposal_block
  categories = Categories(
    tuple(
      Category(i, f"class {i}", i < args.things)
      for i in range(args.things + args.stuff)
    )
  )
  model = build.build_model(config, categories)
  batch = jax.device_put(synthetic_batch(args, canvas))
  key = jax.random.key(0)
  example = jax.tree.map(lambda x: x[:1], batch)
  variables = random_variables(jax.eval_shape(model.init, key, example))
  optimizer = build.main_optimizer(config, variables["params"])
  state = create_state(variables, optimizer)
  losses = build.loss_settings(config)
  mining = build.mining_settings(
    config, num_things=args.things, tags=np.asarray(batch.tags)
  )
  shared = dict(
    losses=losses,
    frozen=build.frozen_parameters(config),
    accumulation=args.accumulation,
  )
  blocks = dict(proposal_block=args.proposal_block)
  extract = step.make_extract_features(model)
  mine = step.make_mining_gradients(
    key, model, mining=mining, **shared, **blocks
  )
  branch = step.make_branch_gradients(
    key, model, num_things=args.things, **shared
  )
  apply = step.make_apply_gradients(optimizer)

  @jax.jit
  def pseudo(batch, mined):
    stride = losses.mask_stride
    superpixels = batch.superpixels[:, ::stride, ::stride].astype(jnp.int32)
    members = jnp.take_along_axis(
      batch.membership, mined.proposal[..., None], axis=1
    )
    masks = jax.vmap(lambda m, s: m[:, jnp.maximum(s, 0)])(members, superpixels)
    return objectives.PseudoMasks(
      masks & mined.valid[..., None, None], mined.valid
    )

  featured = extract(state.variables, batch)
  grads, mined, _ = mine(state, featured)
  masks = pseudo(batch, mined)
  more, _ = branch(state, featured, mined, masks)
  holder = {"state": state}

  def update():
    holder["state"], norm = apply(holder["state"], grads, more)
    return norm

  def whole():
    now = holder["state"]
    features = extract(now.variables, batch)
    grads, mined, metrics = mine(now, features)
    more, _ = branch(now, features, mined, masks)
    holder["state"], _ = apply(now, grads, more)
    return metrics, holder["state"].step

  parts = {
    "backbone": lambda: extract(holder["state"].variables, batch),
    "mining": lambda: mine(holder["state"], featured),
    "branches": lambda: branch(holder["state"], featured, mined, masks),
    "update": update,
  }
  flops = (
    matmul_flops(extract, state.variables, batch)
    + matmul_flops(mine, state, featured)
    + matmul_flops(branch, state, featured, mined, masks)
  )
  return {"whole": whole, "parts": parts, "flops": flops}


def random_variables(shapes):
  """Small weights; to compile the initialisers would take longer."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key in ("scale", "var"):
      return np.ones(x.shape, np.float32)
    spread = np.sqrt(1 / np.prod(x.shape[:-1])) if x.ndim > 1 else 0
    return spread * rng.standard_normal(x.shape, np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def synthetic_batch(args, canvas) -> Batch:
  """Noise in images that fill the canvas; boxes of square superpixels."""
  rng = np.random.default_rng(0)
  B, P, S = args.batch, args.proposals, GRID * GRID
  height, width = canvas
  y, x = np.mgrid[:height, :width]
  superpixels = y * GRID // height * GRID + x * GRID // width
  edges = np.sort(rng.integers(0, GRID + 1, (B, P, 2, 2)), axis=-1)
  edges[..., 1] = np.maximum(edges[..., 1], edges[..., 0] + 1)
  edges = np.minimum(edges, GRID)
  edges[..., 0] = np.minimum(edges[..., 0], edges[..., 1] - 1)
  row, column = np.divmod(np.arange(S), GRID)

  def inside(axis, place):
    low, high = edges[:, :, axis, :1], edges[:, :, axis, 1:]
    return (place >= low) & (place < high)

  scale = np.array([height, width, height, width]) / GRID
  boxes = edges.transpose(0, 1, 3, 2).reshape(B, P, 4) * scale
  tags = np.zeros((B, args.things + args.stuff), np.float32)
  tags[:, 0] = tags[:, 1] = tags[:, -1] = 1
  return Batch(
    image_index=np.arange(B, dtype=np.int32),
    images=rng.integers(0, 256, (B, *canvas, 3), np.uint8),
    features=None,
    colour=np.full((B, 2), 1.1, np.float32),
    size=np.tile(np.array(canvas, np.int32), (B, 1)),
    flip=np.zeros(B, bool),
    window=np.tile(np.array([0, 0, *canvas], np.int32), (B, 1)),
    tags=tags,
    superpixels=np.tile(superpixels.astype(np.int16), (B, 1, 1)),
    member_bits=pack_members(inside(0, row) & inside(1, column)),
    boxes=boxes.astype(np.float32),
    valid=np.ones((B, P), bool),
  )


def seconds(function) -> float:
  """Of one call, to the end of its computation."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def print_row(row) -> None:
  """One line for each canvas."""
  cells = [
    f"{name} {value:.2f}" if isinstance(value, float) else value
    for name, value in row.items()
  ]
  print("  ".join(cells), flush=True)


if __name__ == "__main__":
  main()
