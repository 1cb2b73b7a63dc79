"""What a step costs, known before it is compiled: from its jaxpr.

    memory = state + batch + peak_bytes(step, state, batch)
    utilisation = matmul_flops(step, state, batch) / time / peak_flops(device)

Gradients are results of the step, and so within `peak_bytes`. Both counts are
of the whole program: where `jit` splits it over n devices, each does an n-th of
the operations, and holds an n-th of what is split, all of what is replicated.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

PEAK_FLOPS = {
  "NVIDIA B200": 2250e12,
  "NVIDIA GH200 480GB": 989.4e12,
  "NVIDIA H200": 989.4e12,
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H100 NVL": 835.5e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA A10": 125e12,
  "NVIDIA A10G": 70e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA L4": 121e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
  "NVIDIA GeForce RTX 3090": 71e12,
  "Tesla V100-SXM2-16GB": 125e12,
  "Tesla V100-SXM2-32GB": 125e12,
  "Tesla V100-PCIE-16GB": 112e12,
  "Tesla V100-PCIE-32GB": 112e12,
  "Tesla T4": 65e12,
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 1153.5e12,
}
"""Dense bfloat16 operations a second, by `device_kind`, from data sheets.

float16 on V100 and T4, which have no bfloat16. Of TPU v2, v3 and 7x, JAX shows
each of a chip's two cores as a device: half the chip's figure.
"""

# XLA computes these where they are read: they take no memory of their own.
_CHEAP = frozenset(
  """
  abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp clz
  convert_element_type copy empty eq floor ge gt integer_pow iota is_finite le
  lt max min mul ne neg nextafter not or pad population_count pvary
  reduce_precision rev round select_n shift_left shift_right_arithmetic
  shift_right_logical sign slice split square sub xor
  """.split()  # noqa: SIM905
)
# Nor do these, unless they are read more than once.
_DEAR = frozenset(
  """
  acos acosh asin asinh atan atan2 atanh cbrt cos cosh div erf erf_inv erfc exp
  exp2 expm1 log log1p logistic pow rem rsqrt sin sinh sqrt tan tanh
  """.split()  # noqa: SIM905
)
# Other names, shapes or layouts of the same numbers.
_ALIASES = frozenset(
  """
  expand_dims mesh_cast name optimization_barrier random_unwrap random_wrap
  reshape sharding_constraint squeeze stop_gradient transpose
  """.split()  # noqa: SIM905
)
# These read what was never stored, and store what they make of it.
_READERS = frozenset(
  """
  argmax argmin concatenate dynamic_slice dynamic_update_slice gather reduce_and
  reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
  """.split()  # noqa: SIM905
)


def peak_flops(device: jax.Device) -> float | None:
  """Peak matrix operations a second of a device, dense bfloat16.

  float32 runs at half of it or less. None for kinds that `PEAK_FLOPS` does not
  list, such as CPUs and slices of a GPU: there is nothing to compare with.
  """
  return PEAK_FLOPS.get(device.device_kind)


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
  """Floating-point operations of the matrix products and convolutions.

  A multiplication and an addition are two. Not counted: all other work, such as
  elementwise operations, reductions and sorting; the inside of Pallas kernels;
  products with padding or with the zeros of a dilated input; what nothing
  reads. A `while` loop counts as one turn, since nobody knows how many it
  takes, `scan` with all of its turns; of branches, the costliest counts. What
  `jax.checkpoint` computes twice counts twice.

  Args:
    function: traced, not compiled; jitted or not.
    *args: its arguments; arrays or `jax.ShapeDtypeStruct`s.
  """
  return _flops(jax.make_jaxpr(function)(*args))


def peak_bytes(
  function: Callable[..., Any], *args: Any, platform: str | None = None
) -> int:
  """Estimates the bytes that results and intermediate values take at the peak.

  Equations run in the order in which they were written, and a value lives from
  the one that computes it to the last that reads it; results live all the time.
  Elementwise work is fused into what reads it. Not counted: the arguments; that
  donated arguments become results; what XLA adds, such as copies in another
  layout, the workspace of convolutions and sorts, and gaps; what it saves, such
  as values that fit in a TPU's VMEM; the inside of Pallas kernels.

  Args:
    function: traced, not compiled; jitted or not.
    *args: its arguments; arrays or `jax.ShapeDtypeStruct`s.
    platform: "cpu", "gpu" or "tpu", for functions that differ between them; by
      default the one that JAX runs on.
  """
  jaxpr = jax.make_jaxpr(function)(*args)
  return _peak(jaxpr, platform or jax.default_backend())


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
  """A value of a program; two calls of one function have different ones."""

  aval: Any

  @property
  def bytes(self) -> int:
    if not hasattr(self.aval, "shape"):
      return 0  # a token
    return math.prod(self.aval.shape) * self.aval.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class _Equation:
  """An equation of a jaxpr whose calls were inlined."""

  name: str
  params: dict[str, Any]
  inputs: list[_Value]
  outputs: list[_Value]
  effects: Any


def _program(
  jaxpr: Any,
) -> tuple[list[_Value], list[_Equation], list[_Value]]:
  """Arguments, the equations that the results need, and results."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
  arguments = [_Value(v.aval) for v in jaxpr.invars]
  equations, results = _inline(jaxpr, arguments)
  needed, kept = set(results), []
  for equation in reversed(equations):
    if equation.effects or not needed.isdisjoint(equation.outputs):
      needed.update(equation.inputs)
      kept.append(equation)
  return arguments, kept[::-1], results


def _inline(
  jaxpr: Jaxpr, arguments: list[_Value]
) -> tuple[list[_Equation], list[_Value]]:
  values = dict(zip(jaxpr.invars, arguments, strict=True))
  values |= {v: _Value(v.aval) for v in jaxpr.constvars}

  def read(atoms):
    return [
      _Value(a.aval) if isinstance(a, Literal) else values[a] for a in atoms
    ]

  equations = []
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    inputs = read(eqn.invars)
    callee = params.get("jaxpr", params.get("call_jaxpr"))
    if callee is None or name in ("scan", "shard_map", "pallas_call"):
      outputs = [_Value(v.aval) for v in eqn.outvars]
      equations.append(_Equation(name, params, inputs, outputs, eqn.effects))
    else:  # jit, checkpoint, custom_jvp, custom_vjp, ...
      inner, outputs = _inline(getattr(callee, "jaxpr", callee), inputs)
      equations += inner
    values |= zip(eqn.outvars, outputs, strict=True)
  return equations, read(jaxpr.outvars)


def _flops(jaxpr: Any) -> float:
  _, equations, _ = _program(jaxpr)
  return float(sum(_equation_flops(e) for e in equations))


def _equation_flops(equation: _Equation) -> float:
  params = equation.params
  match equation.name:
    case "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.inputs[0].aval.shape
      terms = math.prod(shape[axis] for axis in contracted)
      return 2 * terms * math.prod(equation.outputs[0].aval.shape)
    case "conv_general_dilated":
      return _convolution_flops(equation)
    case "scan":
      return params["length"] * _flops(params["jaxpr"])
    case "while":
      return _flops(params["cond_jaxpr"]) + _flops(params["body_jaxpr"])
    case "cond":
      return max(_flops(branch) for branch in params["branches"])
    case "shard_map":
      return _shards(params) * _flops(params["jaxpr"])
  return 0


def _convolution_flops(equation: _Equation) -> float:
  params = equation.params
  axes = params["dimension_numbers"]
  lhs, rhs = (value.aval.shape for value in equation.inputs)
  out = equation.outputs[0].aval.shape
  flops = 2 * out[axes.out_spec[0]] * out[axes.out_spec[1]]
  flops *= rhs[axes.rhs_spec[1]]  # input channels, of one group
  for axis, (low, _) in enumerate(params["padding"]):
    size = lhs[axes.lhs_spec[2 + axis]]
    taps = rhs[axes.rhs_spec[2 + axis]]
    pixels = out[axes.out_spec[2 + axis]]
    dilation = params["lhs_dilation"][axis]
    # Where each tap of the kernel lies on the dilated input, for each pixel.
    at = np.arange(pixels)[:, None] * params["window_strides"][axis] - low
    at = at + np.arange(taps) * params["rhs_dilation"][axis]
    inside = (at >= 0) & (at < size * dilation) & (at % dilation == 0)
    flops *= np.count_nonzero(inside)
  return flops


def _shards(params: dict[str, Any]) -> int:
  return math.prod(
    params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
  )


def _peak(jaxpr: Any, platform: str, *, free: int | None = None) -> int:
  """Most bytes that are stored at a time.

  With `free`, of a turn of a loop: its arguments from there on are stored, too.
  """
  arguments, equations, results = _program(jaxpr)
  given = set() if free is None else set(arguments[free:])
  stored = _stored(equations, results)

  # What is not stored keeps alive what it is computed from.
  sources = {value: {value} for value in given}
  last = dict.fromkeys(given, 0)
  for i, equation in enumerate(equations):
    read = _sources(sources, equation.inputs)
    last |= dict.fromkeys(read, i)
    for value in equation.outputs:
      sources[value] = {value} if value in stored else read
      last |= dict.fromkeys(sources[value], i)
  kept = _sources(sources, results)
  last |= dict.fromkeys(kept, len(equations))
  dying = collections.defaultdict(set)
  for value, i in last.items():
    dying[i].add(value)

  # Results have their memory from the start; but those of a turn take the place
  # of its arguments.
  early = kept if free is None else given
  live = peak = _bytes(early)
  for i, equation in enumerate(equations):
    written = stored.intersection(equation.outputs)
    overwritten = dying[i] & _sources(sources, _overwritable(equation))
    reused = min(_bytes(written), _bytes(overwritten))
    inside = max(_bytes(written), _inside(equation, platform))
    peak = max(peak, live + inside - reused - _bytes(written & early))
    live += _bytes(written - early) - _bytes(dying[i])
  return peak


def _bytes(values: Iterable[_Value]) -> int:
  return sum(value.bytes for value in values)


def _sources(
  sources: dict[_Value, set[_Value]], values: Iterable[_Value]
) -> set[_Value]:
  return set().union(*(sources.get(value, ()) for value in values))


def _stored(equations: list[_Equation], results: list[_Value]) -> set[_Value]:
  """Results, and what an equation that does not fuse reads or writes."""
  uses = collections.Counter(v for e in equations for v in e.inputs)
  stored = set(results)
  for equation in reversed(equations):
    name, outputs = equation.name, equation.outputs
    if name in _ALIASES:
      if not stored.isdisjoint(outputs):
        stored.update(equation.inputs)
        stored.difference_update(outputs)
    elif name in _DEAR:
      stored.update(value for value in outputs if uses[value] > 1)
    elif name not in _CHEAP:
      stored.update(outputs)
      if name not in _READERS:
        stored.update(equation.inputs)
  return stored


def _overwritable(equation: _Equation) -> list[_Value]:
  """The inputs whose place the outputs may take, if nobody reads them later."""
  params, inputs = equation.params, equation.inputs
  match equation.name:
    case "scan":
      constants, carried = _scan_parts(equation)
      return inputs[constants : constants + carried]
    case "while":
      return inputs[params["cond_nconsts"] + params["body_nconsts"] :]
    case "dynamic_update_slice" | "scatter" | "scatter-add":
      return inputs[:1]
  return inputs if equation.name in _CHEAP | _DEAR else []


def _inside(equation: _Equation, platform: str) -> int:
  """Peak within an equation's own jaxprs, its outputs included."""
  params = equation.params
  match equation.name:
    case "scan":
      constants, carried = _scan_parts(equation)
      turn = _peak(params["jaxpr"], platform, free=constants)
      return turn + _bytes(equation.outputs[carried:])
    case "while":
      return max(
        _peak(params[f"{x}_jaxpr"], platform, free=params[f"{x}_nconsts"])
        for x in ("cond", "body")
      )
    case "cond":
      return max(_peak(b, platform) for b in _branches(params, platform))
    case "shard_map":
      return _shards(params) * _peak(params["jaxpr"], platform)
  return 0


def _scan_parts(equation: _Equation) -> tuple[int, int]:
  """How many constants come first, and how many carried values follow them.

  By their ranks: the names of the parameters change between versions of JAX.
  """
  body = equation.params["jaxpr"]

  def same(values, avals):
    ranks = zip(values, avals, strict=True)
    return sum(len(v.aval.shape) == len(a.shape) for v, a in ranks)

  carried = same(equation.outputs, body.out_avals)
  return same(equation.inputs, body.in_avals) - carried, carried


def _branches(params: dict[str, Any], platform: str) -> list[Any]:
  """The branches that a platform may take."""
  platforms = params.get("branches_platforms")
  if platforms is None:
    return list(params["branches"])
  names = {"cuda", "rocm"} if platform == "gpu" else {platform}
  pairs = zip(params["branches"], platforms, strict=True)
  return [next(b for b, p in pairs if p is None or names & set(p))]
