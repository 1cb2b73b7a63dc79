"""What the types of arrays say: how wide they are, and on which devices."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType


def wide(dtype: jnp.dtype) -> jnp.dtype:
  """Floats of at least 32 bits, in which features are summed."""
  # Not promote_types, which the strict promotion of dtypes refuses.
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
  """Makes all arrays vary over those axes of the mesh that one varies over.

  Inside `jax.shard_map` this is a part of an array's type, which the carry of a
  loop keeps and a gradient shares with its argument. So what a loop starts from
  is made in the likeness of one of these arrays.
  """
  varying = [
    frozenset() if x is None else jax.typeof(x).manual_axis_type.varying
    for x in arrays
  ]
  axes = frozenset().union(*varying)
  return tuple(
    x if x is None else lax.pcast(x, tuple(axes - own), to="varying")
    for x, own in zip(arrays, varying, strict=True)
  )


def on_mesh_of(array: jax.Array) -> contextlib.AbstractContextManager:
  """Where new arrays have the type of this one's mesh.

  It matters on a mesh with explicit axes that `jax.set_mesh` has not set.
  """
  mesh = jax.typeof(array).sharding.mesh
  is_explicit = AxisType.Explicit in mesh.axis_types
  if is_explicit and jax.sharding.get_abstract_mesh().empty:
    return jax.sharding.use_abstract_mesh(mesh)
  return contextlib.nullcontext()
