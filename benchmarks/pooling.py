"""Times the pooling operators: forward, and forward + backward.

    python benchmarks/pooling.py --output pooling.json

Prints a table (median milliseconds per image, compiled, synthetic segments) and
writes the same rows as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import pallas_kernels as pk

STRIDE = 16
CASES = (  # grid, channels, proposals, output size
  ((16, 16), 64, 200, (7, 7)),
  ((16, 16), 128, 400, (4, 4)),
  ((30, 40), 128, 500, (7, 7)),
  ((30, 40), 256, 1000, (4, 4)),
  ((30, 40), 256, 1000, (1, 1)),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--images", type=int, default=4)
  args = parser.parse_args()

  rows = []
  header = f"{'operator':<22}{'grid':>8}{'C':>5}{'P':>6}{'bins':>6}"
  print(header + f"{'forward':>10}{'+backward':>11}")
  for grid, channels, proposals, output_size in CASES:
    inputs = segments(jax.random.key(0), args.images, grid, channels, proposals)
    for name, operator in operators(output_size).items():
      forward, backward = measure(operator, inputs, args.repeats)
      rows.append(
        {
          "operator": name,
          "grid": grid,
          "channels": channels,
          "proposals": proposals,
          "output_size": output_size,
          "forward_ms": forward / args.images,
          "forward_backward_ms": backward / args.images,
        }
      )
      print(
        f"{name:<22}{grid[0]:>5}x{grid[1]}{channels:>5}{proposals:>6}"
        f"{output_size[0]:>4}x{output_size[1]}{rows[-1]['forward_ms']:>10.2f}"
        f"{rows[-1]['forward_backward_ms']:>11.2f}",
        flush=True,
      )
  device = jax.devices()[0].device_kind
  report = {"device": device, "jax": jax.__version__, "rows": rows}
  args.output.write_text(json.dumps(report, indent=2) + "\n")


def operators(output_size):
  """Name -> function of (features, masks, boxes) of a batch of images."""
  moi_pool = functools.partial(pk.moi_pool, output_size=output_size)

  def over_images(pool):
    return lambda *inputs: jax.lax.map(lambda image: pool(*image), inputs)

  return {
    "moi_pool (lax.map)": over_images(moi_pool),
    "moi_pool (vmap)": jax.vmap(moi_pool),
    "roi_pool (lax.map)": over_images(
      lambda f, m, b: pk.roi_pool(f, b, output_size=output_size)
    ),
    "roi_align (lax.map)": over_images(
      lambda f, m, b: pk.roi_align(
        f, STRIDE * b, stride=STRIDE, output_size=output_size
      )
    ),
    "masked_average (vmap)": jax.vmap(lambda f, m, b: pk.masked_average(f, m)),
  }


def segments(key, images, grid, channels, proposals):
  """Random features, boxes of all sizes, and the ellipses in them as masks."""
  keys = jax.random.split(key, 3)
  features = jax.random.normal(keys[0], (images, *grid, channels))
  cells = jnp.array(grid)
  shape = images, proposals, 2
  extent = jnp.ceil(jax.random.beta(keys[1], 1.0, 2.0, shape) * cells)
  extent = jnp.clip(extent, 1, cells)
  start = jnp.floor(jax.random.uniform(keys[2], shape) * (cells - extent + 1))
  boxes = jnp.concatenate([start, start + extent - 1], -1).astype(jnp.int32)

  place = jnp.stack(jnp.indices(grid), -1)
  centre = (start + (extent - 1) / 2)[:, :, None, None]
  radius = (extent / 2)[:, :, None, None]
  masks = jnp.sum(((place - centre) / radius) ** 2, axis=-1) <= 1
  return features, masks, boxes


def measure(operator, inputs, repeats):
  """Median milliseconds of the function and of its value and gradient."""

  def loss(features, masks, boxes):
    # Not linear: the gradient needs the forward's values, as in training.
    return jnp.sum(operator(features, masks, boxes) ** 2)

  medians = []
  for function in (jax.jit(operator), jax.jit(jax.value_and_grad(loss))):
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
      start = time.perf_counter()
      jax.block_until_ready(function(*inputs))
      times.append(1e3 * (time.perf_counter() - start))
    medians.append(statistics.median(times))
  return medians


if __name__ == "__main__":
  main()
