"""Learning rates and optimizers."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax


def step_decay(
  *,
  learning_rate: float,
  boundaries: tuple[int, ...],
  factor: float = 0.1,
  rise: int = 0,
) -> optax.Schedule:
  """A rate that is multiplied by `factor` at each boundary (section 4.1).

  Args:
    learning_rate: of the first steps.
    boundaries: steps from which it is smaller.
    factor: by which.
    rise: steps in which the rate grows, linearly, from a `rise`-th to the
      whole: large batches of large rates need it.
  """
  steps = optax.piecewise_constant_schedule(
    learning_rate, dict.fromkeys(boundaries, factor)
  )
  if not rise:
    return steps
  return lambda count: steps(count) * jnp.minimum(1, (count + 1) / rise)


def scaled_rate(
  *, learning_rate: float, batch_size: int, reference_batch_size: int
) -> float:
  """The rate of a batch size by the linear rule (Goyal et al., 2017).

  Args:
    learning_rate: for batches of `reference_batch_size`.
    batch_size: images in a global batch.
    reference_batch_size: 0 leaves the rate as it is.
  """
  if not reference_batch_size:
    return learning_rate
  return learning_rate * batch_size / reference_batch_size


def make_optimizer(
  params: Any,
  *,
  name: str,
  schedule: optax.Schedule,
  weight_decay: float,
  trained: tuple[str, ...],
  momentum: float = 0.9,
  bias_lr_factor: float = 1.0,
  frozen: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """SGD with momentum, or AdamW, on a part of the parameters.

  Biases and the scales of norm layers (everything of rank 1) have no weight
  decay.

  Args:
    params: tree of parameters (or of their shapes).
    name: "sgd" or "adamw".
    schedule: learning rate by step.
    momentum: of SGD.
    weight_decay: of kernels: L2 under SGD, decoupled under AdamW.
    bias_lr_factor: learning rate of biases over that of kernels; the authors
      have 2.
    trained: regular expressions of the paths ("neck/fc1/kernel") of trained
      parameters, matched from the start; all others keep their values.
    frozen: regular expressions of paths that are left out again.

  Raises:
    ValueError: unknown name, or nothing is trained.
  """

  # Functions, not trees: inside the partition they see only its own part.
  def kernels(tree):
    return jax.tree.map(lambda p: p.ndim > 1, tree)

  def biases(tree):
    return jax.tree.map(lambda p: p.ndim <= 1, tree)

  if name == "sgd":
    update = optax.chain(
      optax.add_decayed_weights(weight_decay, mask=kernels),
      optax.sgd(schedule, momentum=momentum),
    )
  elif name == "adamw":
    update = optax.adamw(schedule, weight_decay=weight_decay, mask=kernels)
  else:
    raise ValueError(f"optimizer is {name!r}; wanted 'sgd' or 'adamw'")
  if bias_lr_factor != 1.0:
    update = optax.chain(
      update, optax.masked(optax.scale(bias_lr_factor), biases)
    )

  def label(path, _):
    name = "/".join(str(k.key) for k in path)

    def under(patterns):
      return any(re.match(p, name) for p in patterns)

    return "train" if under(trained) and not under(frozen) else "keep"

  labels = jax.tree_util.tree_map_with_path(label, params)
  if "train" not in jax.tree.leaves(labels):
    raise ValueError(f"no parameter is trained under {trained} less {frozen}")
  return optax.partition({"train": update, "keep": optax.set_to_zero()}, labels)
