"""A batch in parts, one after the other, where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(
  function: Callable[[Any], tuple[Any, Any]], examples: Any, *, parts: int
) -> tuple[Any, Any]:
  """Calls `function` with each part of a batch and puts the results together.

  The result is that of one call with the whole batch, if the sums of the parts
  are: a mean must be divided by the count of the whole. Each device divides the
  examples that it has, so nothing travels.

  Args:
    function: from examples to (sums, rows): a tree that is summed up, and a
      tree of arrays [B, ...] with a row for each example.
    examples: tree of arrays [B, ...].
    parts: how many; with the devices of the axis "data" they must divide B.

  Returns:
    (sums, rows) of the whole batch, rows in the order of `examples`.
  """
  if parts == 1:
    return function(examples)
  shards = jax.sharding.get_abstract_mesh().shape.get("data", 1)

  def split(x):
    count = len(x) // (shards * parts)
    x = x.reshape(shards, parts, count, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1).reshape(parts, -1, *x.shape[3:])

  def join(x):
    x = x.reshape(parts, shards, -1, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

  def add(total, part):
    sums, rows = function(part)
    return jax.tree.map(jnp.add, total, sums), rows

  examples = jax.tree.map(split, examples)
  first = jax.tree.map(lambda x: x[0], examples)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first)[0])
  sums, rows = jax.lax.scan(add, zeros, examples)
  return sums, jax.tree.map(join, rows)
