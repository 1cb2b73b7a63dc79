"""MoIPool's max-pooling with its gradient, by any of the implementations.

Reverse-mode differentiation is defined, of any order; forward-mode is not. The
argmax is computed, and kept for the backward pass, only where a gradient is
asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax import lax

from .. import arrays
from . import xla


def max_pool(
  features: jax.Array,
  masks: jax.Array | None,
  boxes: jax.Array,
  output_size: tuple[int, int],
  *,
  implementation: str = "xla",
  deterministic: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """As `reference.max_pool`; `masks` None means a full mask."""
  features, masks, boxes = arrays.vary_alike(features, masks, boxes)
  if not len(boxes):
    return jnp.zeros_like(features, shape=(0, *output_size, features.shape[-1]))
  how = _How(
    features.shape[:2], output_size, implementation, deterministic, interpret
  )
  return _max_pool(features, masks, boxes, how)


@dataclasses.dataclass(frozen=True)
class _How:
  """The size of the grid, and the options of `api.moi_pool`."""

  grid_size: tuple[int, int]
  output_size: tuple[int, int]
  implementation: str
  deterministic: bool
  interpret: bool

  @property
  def kernels(self) -> types.ModuleType:
    """The module of the implementation."""
    # Late: importing Pallas takes long, and Mosaic GPU of jax 0.10 needs absl.
    match self.implementation:
      case "pallas_tpu":
        from . import pallas_tpu as kernels
      case "pallas_triton":
        from . import pallas_triton as kernels
      case "pallas_mosaic_gpu":
        try:
          from . import pallas_mosaic_gpu as kernels
        except ModuleNotFoundError as error:
          if error.name != "absl":
            raise
          raise ModuleNotFoundError(
            "implementation: 'pallas_mosaic_gpu' needs absl, which this jax"
            " does not bring; pip install absl-py",
            name=error.name,
          ) from error
      case "xla":
        kernels = xla
    return kernels

  @property
  def options(self) -> dict[str, bool]:
    """What emulation adds to the arguments of a kernel."""
    return {"interpret": True} if self.interpret else {}

  @property
  def context(self) -> contextlib.AbstractContextManager:
    """Where a kernel is traced: Pallas counts in 32 bits on the devices."""
    if self.implementation == "xla":
      return contextlib.nullcontext()
    return jax.enable_x64(False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _max_pool(features, masks, boxes, how):
  with how.context, arrays.on_mesh_of(features):
    pooled = how.kernels.pooled_max(
      features, masks, boxes, how.output_size, **how.options
    )
  return _zero_empty(pooled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _max_pool_and_cells(features, masks, boxes, how):
  with how.context, arrays.on_mesh_of(features):
    pooled, cells = how.kernels.pooled_argmax(
      features, masks, boxes, how.output_size, **how.options
    )
  return _zero_empty(pooled), cells


def _zero_empty(pooled):
  # So a feature of -inf counts as unavailable.
  return jnp.where(pooled == -jnp.inf, 0, pooled)


def _forward(features, masks, boxes, how):
  # With a gradient of its own, for those of second order.
  pooled, cells = _max_pool_and_cells(features, masks, boxes, how)
  return pooled, (cells, boxes)


def _forward_and_cells(features, masks, boxes, how):
  pooled, residuals = _forward(features, masks, boxes, how)
  return (pooled, residuals[0]), residuals


def _backward(how, residuals, gradient):
  return _scatter(gradient, *residuals, how), None, None


def _backward_and_cells(how, residuals, gradients):
  return _backward(how, residuals, gradients[0])


_max_pool.defvjp(_forward, _backward)
_max_pool_and_cells.defvjp(_forward_and_cells, _backward_and_cells)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scatter(gradient, cells, boxes, how):
  """[Hf, Wf, C]: adds each gradient to its cell."""
  if how.implementation == "pallas_tpu":
    with how.context:
      total = how.kernels.add_gradient(
        gradient, cells, boxes, how.grid_size, **how.options
      )
  elif how.deterministic:
    floats, integers = (
      functools.partial(add, grid_size=how.grid_size)
      for add in (xla.add_gradient, xla.add_gradient_in_integers)
    )
    total = lax.platform_dependent(
      gradient, cells, cuda=integers, rocm=integers, default=floats
    )
  else:
    with arrays.on_mesh_of(gradient):
      total = xla.add_gradient(gradient, cells, how.grid_size)
  return total.astype(gradient.dtype)


def _scatter_forward(gradient, cells, boxes, how):
  return _scatter(gradient, cells, boxes, how), cells


def _gather(how, cells, total):
  """The transpose of `_scatter`, which is linear."""
  height, width = how.grid_size
  channels = total.shape[-1]
  flat = total.reshape(height * width, channels)
  flat = jnp.pad(flat, ((0, 1), (0, 0)))  # for the bins that are empty
  columns = jnp.arange(channels, dtype=jnp.int32)[None, None, None]
  return flat[cells.astype(jnp.int32), columns], None, None


_scatter.defvjp(_scatter_forward, _gather)
