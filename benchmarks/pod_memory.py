"""Memory of a device for the paper's setting, on one chip and on pods.

    python benchmarks/pod_memory.py

Estimated from the shapes, as a training does before its first step: nothing is
compiled, and no accelerator is needed. 4,000 proposals, images of up to
1,216 x 1,632 pixels, both branches; the largest canvas counts.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import AbstractMesh
from training_step import synthetic_batch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import base, variants
from jtsm_jax.train import build, memory
from jtsm_jax.train.setup import Setup
from jtsm_jax.types import Categories, Category

THINGS, STUFF, PROPOSALS = 80, 53, 4000  # of COCO
# (data, model), images of a batch, fields of config.train
PLACES = (
  ((1, 1), 4, {}),
  ((1, 1), 4, {"precision": "bfloat16"}),
  ((1, 1), 4, {"precision": "bfloat16", "accumulation": 4}),
  (
    (1, 1),
    4,
    {"precision": "bfloat16", "accumulation": 4, "proposal_block": 1000},
  ),
  ((8, 1), 8, {"precision": "bfloat16"}),
  ((64, 1), 64, {"precision": "bfloat16"}),
  ((64, 1), 64, {"precision": "bfloat16", "proposal_block": 1000}),
  (
    (16, 4),
    64,
    {"precision": "bfloat16", "accumulation": 4, "proposal_block": 1000},
  ),
  (
    (512, 1),
    512,
    {
      "precision": "bfloat16",
      "proposal_block": 1000,
      "divide_optimizer": True,
    },
  ),
  (
    (128, 4),
    512,
    {
      "precision": "bfloat16",
      "accumulation": 4,
      "proposal_block": 1000,
      "divide_optimizer": True,
    },
  ),
)


def main() -> None:
  """Prints a Markdown table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--depths", type=int, nargs="*", default=(18, 50, 101))
  parser.add_argument("--platform", default="tpu", help="or gpu, cpu")
  args = parser.parse_args()
  heads = "backbone,data x model,images,settings,weights,batch,step,GiB"
  print("| " + " | ".join(heads.split(",")) + " |")
  print("| --- " * 8 + "|")
  for depth in args.depths:
    for axes, batch_size, fields in PLACES:
      estimate = memory.estimate_mining(
        run_of(depth, axes, batch_size, fields), platform=args.platform
      )
      parts = (estimate.state, estimate.batch, estimate.step, estimate.total)
      cells = " | ".join(f"{part / 2**30:.1f}" for part in parts)
      settings = ", ".join(
        value if name == "precision" else f"{name} {value}"
        for name, value in fields.items()
      )
      print(
        f"| ResNet{depth}-WS | {axes[0]} x {axes[1]} | {batch_size} | "
        f"{settings or 'float32'} | {cells} |",
        flush=True,
      )


def run_of(depth, axes, batch_size, fields) -> Setup:
  """A run of the paper's setting on a mesh that need not exist."""
  config = variants.apply(base.get_config(), f"resnet{depth}_ws")
  config.proposals.max_proposals = PROPOSALS
  config.train.batch_size = batch_size
  config.train.update(fields)
  categories = Categories(
    tuple(Category(i, f"{i}", i < THINGS) for i in range(THINGS + STUFF))
  )
  model = build.build_model(config, categories)
  example = synthetic_batch(
    argparse.Namespace(
      batch=1, proposals=PROPOSALS, things=THINGS, stuff=STUFF
    ),
    (480, 640),
  )
  key = jax.random.key(0)
  abstract = jax.eval_shape(model.init, key, example)
  return Setup(
    config=config,
    workdir=pathlib.Path(),
    source=None,
    store=None,
    num_things=THINGS,
    key=key,
    mesh=AbstractMesh(axes, ("data", "model")),
    model=model,
    mining=build.mining_settings(
      config, num_things=THINGS, tags=np.asarray(example.tags)
    ),
    losses=build.loss_settings(config),
    example=example,
    abstract=abstract,
    warm_up_optimizer=None,
    optimizer=build.main_optimizer(config, abstract["params"]),
    warm_up_steps=0,
    branch_start=0,
    last_step=config.train.steps,
  )


if __name__ == "__main__":
  main()
