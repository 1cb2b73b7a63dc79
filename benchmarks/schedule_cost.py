"""How long the paper's schedules take, calculated from counted operations.

    python benchmarks/schedule_cost.py

Counts the operations of convolutions and matrix products of a training step, on
each canvas of a configuration, and of the prediction of an image, on all of its
test canvases and both ways round. Nothing is compiled or run. Hours follow from
the published bfloat16 rates of the accelerators and a share of them, --share,
that is an assumption: none of them was measured. They are those of
config.train.precision="bfloat16"; where there are more devices than a batch has
images, those of a batch as large as they need, with so many fewer steps
(docs/pods.md). Tests are those on the way and the last one; an evaluation uses
one device. Pooling, re-estimation, fusion and input come on top where they do
not run beside it.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.evaluation.inference import make_mask_step, make_score_step
from jtsm_jax.train import build, step
from jtsm_jax.train.cost import matmul_flops
from jtsm_jax.train.state import create_state
from jtsm_jax.types import Batch, Categories, Category, PseudoMasks

# Devices, and dense bfloat16 operations a second of each, as their makers say.
PLACES = {
  "1 x H200": (1, 989e12),
  "8 x H200": (8, 989e12),
  "v5e-64": (64, 197e12),
}
# file, variant, things, stuff, test images
ROWS = (
  ("voc2012_panoptic", "resnet18_ws", 20, 1, 1449),
  ("voc2012_panoptic", "resnet50_ws", 20, 1, 1449),
  ("voc2012_panoptic", "resnet101_ws", 20, 1, 1449),
  ("voc2012_panoptic", "authors", 20, 1, 1449),
  ("voc2007_detection", "resnet18_ws", 20, 0, 4952),
  ("coco_panoptic", "resnet18_ws", 80, 53, 5000),
)


def main() -> None:
  """Prints a Markdown table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--share", type=float, default=0.4, help="of the rate")
  args = parser.parse_args()
  heads = ["configuration", "TFLOP a step", "steps", "TFLOP a test image"]
  heads += ["tests"]
  heads += [f"{place}: training + tests, hours" for place in PLACES]
  print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
  for file, variant, things, stuff, images in ROWS:
    config = importlib.import_module(f"configs.{file}").get_config(variant)
    categories = Categories(
      tuple(
        Category(i, f"class {i}", i < things) for i in range(things + stuff)
      )
    )
    training = np.mean(
      [training_flops(config, categories, c) for c in one_way(config.data)]
    )
    test = sum(
      test_flops(config, categories, c) for c in one_way(config.evaluation)
    )
    test *= 1 + config.evaluation.flip
    steps = config.train.steps
    cells = [f"`{file}.py:{variant}`", f"{training / 1e12:.1f}", f"{steps:,}"]
    cells.append(f"{test / 1e12:.1f}")
    every = config.train.evaluate_every
    tests = steps // every + (steps % every > 0)
    cells.append(f"{tests}")
    for devices, rate in PLACES.values():
      seconds = (training * steps / devices, test * images * tests)
      hours = [x / (rate * args.share) / 3600 for x in seconds]
      cells.append(" + ".join(f"{x:.1f}" for x in hours))
    print("| " + " | ".join(cells) + " |", flush=True)


def one_way(group) -> list[tuple[int, int]]:
  """The canvases of one orientation: the others cost the same."""
  return sorted({(min(c), max(c)) for c in group.canvases})


def training_flops(config, categories, canvas) -> float:
  """Operations of one step with its whole batch."""
  model, variables, batch = shapes_of(
    config, categories, canvas, config.train.batch_size
  )
  state = jax.eval_shape(
    lambda v: create_state(v, build.main_optimizer(config, v["params"])),
    variables,
  )
  key, losses = jax.random.key(0), build.loss_settings(config)
  num_things = categories.num_things
  tags = np.zeros((1, len(categories)))
  tags[0, [0, num_things // 2, -1]] = 1
  mining = build.mining_settings(config, num_things=num_things, tags=tags)
  extract = step.make_extract_features(model)
  mine = step.make_mining_gradients(key, model, mining=mining, losses=losses)
  featured = jax.eval_shape(extract, variables, batch)
  flops = matmul_flops(extract, variables, batch)
  flops += matmul_flops(mine, state, featured)
  if model.instance is not None or model.semantic is not None:
    branch = step.make_branch_gradients(
      key, model, num_things=num_things, losses=losses
    )
    _, mined, _ = jax.eval_shape(mine, state, featured)
    cells = [side // losses.mask_stride for side in canvas]
    masks = PseudoMasks(
      jax.ShapeDtypeStruct((*mined.valid.shape, *cells), bool), mined.valid
    )
    flops += matmul_flops(branch, state, featured, mined, masks)
  return flops


def test_flops(config, categories, canvas) -> float:
  """Operations of one image on one canvas, one way round."""
  model, variables, batch = shapes_of(config, categories, canvas, 1)
  score = make_score_step(model)
  flops = matmul_flops(score, variables, batch)
  if model.instance is not None:
    limit = config.evaluation.max_detections
    flops += matmul_flops(
      make_mask_step(model),
      variables,
      jax.eval_shape(score, variables, batch).features,
      jax.ShapeDtypeStruct((1, limit, 4), jnp.float32),
      jax.ShapeDtypeStruct((1, limit), jnp.int32),
    )
  return flops


def shapes_of(config, categories, canvas, size):
  """The model, its variables and a batch, as shapes."""
  model = build.build_model(config, categories)
  P, S = config.proposals.max_proposals, config.proposals.num_superpixels
  shape = jax.ShapeDtypeStruct
  batch = Batch(
    image_index=shape((size,), jnp.int32),
    images=shape((size, *canvas, 3), jnp.uint8),
    features=None,
    colour=shape((size, 2), jnp.float32),
    size=shape((size, 2), jnp.int32),
    flip=shape((size,), bool),
    window=shape((size, 4), jnp.int32),
    tags=shape((size, len(categories)), jnp.float32),
    superpixels=shape((size, *canvas), jnp.int16),
    member_bits=shape((size, S, -(-P // 8)), jnp.uint8),
    boxes=shape((size, P, 4), jnp.float32),
    valid=shape((size, P), bool),
  )
  return model, jax.eval_shape(model.init, jax.random.key(0), batch), batch


if __name__ == "__main__":
  main()
