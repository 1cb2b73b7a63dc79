"""Compiles the Pallas kernels for devices that this machine does not have.

    pip install 'jax[tpu]'     # the TPU compiler; needs no TPU
    python benchmarks/compile_kernels.py tpu v5e:2x2 v6e:2x2 tpu7x:2x2x1
    pip install 'jax[cuda13]'  # likewise
    python benchmarks/compile_kernels.py cuda

To machine code, which finds what lowering cannot: registers, VMEM, layouts that
the compiler does not support. Forward and backward, every shape of
benchmarks/pooling.py; exits with 1 if one fails.
"""

from __future__ import annotations

import os
import sys

# The answers of a device that is not there.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import itertools
import pathlib
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from pallas_kernels.moi_pool import vjp

GRIDS = ((30, 40), (60, 80), (152, 203))
CHANNELS = (256, 512, 2048)
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "sm_90"
"""


def main() -> None:
  """Compiles for each device that the command line names."""
  platform, *names = sys.argv[1:] or ["cuda"]
  kernels = ("pallas_triton", "pallas_mosaic_gpu")
  if platform == "tpu":
    kernels = ("pallas_tpu",)
  failed = 0
  for name in names or ["sm_90"]:
    options = {"topology_name": name}
    if platform == "cuda":
      options |= {"topology": "1x1x1", "target_config": HOPPER}
    device = topologies.get_topology_desc(platform=platform, **options).devices[
      0
    ]
    for kernel, grid, channels, dtype in itertools.product(
      kernels, GRIDS, CHANNELS, (jnp.float32, jnp.bfloat16)
    ):
      start = time.monotonic()
      case = f"{name} {kernel} {grid} {channels} {dtype.__name__}"
      try:
        compiled = compile_kernel(kernel, grid, channels, dtype, device)
      except Exception as error:
        failed += 1
        print(f"{case}: FAILED {str(error)[:1000]}", flush=True)
      else:
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        seconds = time.monotonic() - start
        print(f"{case}: {memory:.0f} MiB, {seconds:.1f} s", flush=True)
  sys.exit(failed > 0)


def compile_kernel(kernel, grid, channels, dtype, device):
  """Value and gradient of 1,000 proposals, compiled for `device`."""

  def value_and_gradient(features, masks, boxes):
    pooled, pullback = jax.vjp(
      lambda f: vjp.max_pool(f, masks, boxes, (7, 7), implementation=kernel),
      features,
    )
    return pooled, pullback(pooled)

  sharding = jax.sharding.SingleDeviceSharding(device)
  shapes = (
    jax.ShapeDtypeStruct((*grid, channels), dtype, sharding=sharding),
    jax.ShapeDtypeStruct((1000, *grid), bool, sharding=sharding),
    jax.ShapeDtypeStruct((1000, 4), jnp.int32, sharding=sharding),
  )
  return jax.jit(value_and_gradient).lower(*shapes).compile()


if __name__ == "__main__":
  main()
