"""What is bfloat16 and what is not, and how near float32 the results are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from configs import base
from jtsm_jax.models.neck_and_heads import MiningHeads
from jtsm_jax.train import build, fields, objectives, step, warm_up
from jtsm_jax.train.cost import peak_bytes
from jtsm_jax.train.state import TrainState
from jtsm_jax.types import Categories, Category
from tests import tiny

KEY = jax.random.key(5)
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
MINING = objectives.MiningSettings(num_things=tiny.NUM_THINGS, num_slots=5)
LOSSES = objectives.LossSettings()
BATCH = tiny.make_batch()


def _state(model):
  variables = dict(tiny.make_variables(model, BATCH))
  params = variables.pop("params")
  opt_state = OPTIMIZER.init(params)
  return TrainState(jnp.int32(0), params, variables, opt_state)


@functools.cache
def _step(dtype):
  """Gradients of both parts, mined segments and metrics of BATCH."""
  model = tiny.make_model(
    outputs=("coarse", "fine"),
    frozen=False,
    projection=6,
    center=True,
    average=True,
    dropout=0.5,
    cells=True,
    dtype=dtype,
  )
  state = _state(model)
  mining = step.make_mining_gradients(KEY, model, mining=MINING, losses=LOSSES)
  branches = step.make_branch_gradients(
    KEY, model, num_things=tiny.NUM_THINGS, losses=LOSSES
  )
  grads, mined, metrics = mining(state, BATCH)
  # What the other precision would learn the branches from, too.
  learnt = tiny.make_mined(np.full((2, 5), 1), np.ones((2, 5)))
  proposals = np.ones((2, tiny.P))
  learnt = learnt.replace(
    label=jnp.ones((2, tiny.P), jnp.int32),
    weight=proposals,
    slot=np.zeros((2, tiny.P), np.int32),
  )
  pseudo = tiny.pseudo_masks(BATCH, learnt)
  more, branch_metrics = branches(state, BATCH, learnt, pseudo)
  apply = step.make_apply_gradients(OPTIMIZER)
  after, norm = apply(jax.tree.map(jnp.array, state), grads, more)
  metrics = metrics | branch_metrics | norm
  return jax.device_get((grads, more, mined, metrics, after))


def test_state_gradients_and_losses_are_float32():
  found = jax.tree.map(lambda x: x.dtype, _step(jnp.bfloat16))
  assert found == jax.tree.map(lambda x: x.dtype, _step(jnp.float32))
  assert jnp.bfloat16 not in jax.tree.leaves(found)


def test_results_are_near_those_of_float32():
  # bfloat16 has 8 significant bits, and errors of a few layers add up.
  *grads, mined, metrics, _ = _step(jnp.bfloat16)
  *exact_grads, exact_mined, exact_metrics, _ = _step(jnp.float32)
  np.testing.assert_array_equal(mined.proposal, exact_mined.proposal)
  metrics, exact_metrics = (
    {name: float(value) for name, value in x.items()}
    for x in (metrics, exact_metrics)
  )
  assert metrics == pytest.approx(exact_metrics, rel=0.03)
  assert metrics != pytest.approx(exact_metrics, rel=1e-5)
  for found, exact in zip(grads, exact_grads, strict=True):
    exact = tiny.paths(exact)
    assert any(np.any(value) for value in exact.values())
    for name, value in tiny.paths(found).items():
      error = np.linalg.norm(value - exact[name])
      assert error <= 0.1 * np.linalg.norm(exact[name]) + 1e-6, name


def test_tag_step_learns_in_float32():
  model = tiny.make_model(dtype=jnp.bfloat16)
  state = jax.eval_shape(lambda: _state(model))
  tag_step = warm_up.make_tag_step(KEY, model, OPTIMIZER)
  after, metrics = jax.eval_shape(tag_step, state, BATCH)
  types = functools.partial(jax.tree.map, lambda x: x.dtype)
  assert types(after) == types(state)
  assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}


def _operands(jaxpr):
  """The dtypes that products and convolutions of a jaxpr read."""
  found = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
      found |= {v.aval.dtype for v in eqn.invars}
    found = found.union(*map(_operands, jaxprs_in_params(eqn.params)))
  return found


@functools.cache
def _model(name, precision):
  config = base.get_config()
  config.backbone.name = name
  config.backbone.outputs = tuple(fields.STAGES[name])[-1:]
  config.neck.widths = (24, 24)
  config.train.precision = precision
  categories = Categories(
    tuple(Category(i, f"{i}", i < tiny.NUM_THINGS) for i in range(tiny.K))
  )
  model = build.build_model(config, categories)
  return model, jax.eval_shape(model.init, KEY, BATCH)


@pytest.mark.parametrize("name", fields.STAGES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_computes_in_which_precision(name, precision):
  model, variables = _model(name, precision)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}

  def trace(function, *args):
    """What a part returns, and what its products read."""
    apply = functools.partial(model.apply, method=function)
    result = jax.eval_shape(apply, variables, *args)
    return result, _operands(jax.make_jaxpr(apply)(variables, *args).jaxpr)

  features, read = trace("features", BATCH)
  assert features.dtype == precision
  assert read == {jnp.dtype(precision)}
  described, _ = trace("describe", features, BATCH)
  assert described.dtype == precision
  # The pooling's own products are exact sums of areas: the layers alone.
  pooled, _ = trace(lambda m, *a: m.proposal_features(*a), features, BATCH)
  assert pooled.dtype == precision
  described, read = trace(lambda m, x: m.neck(x), pooled)
  assert described.dtype == precision
  assert read == {jnp.dtype(precision)}
  for part, *args in (
    ("judge", described, BATCH.valid),
    ("instance_logits", features, BATCH.boxes),
    ("semantic_logits", features),
  ):
    result, read = trace(part, *args)
    assert {x.dtype for x in jax.tree.leaves(result)} == {np.dtype("float32")}
    assert read == {jnp.dtype(precision)}, part


def test_logits_are_not_rounded():
  """Proposals that differ by less than bfloat16 sees keep their order."""
  heads = MiningHeads(num_classes=1, num_refinements=1, dtype=jnp.bfloat16)
  rows = np.zeros((1, 16, 16), np.float32)
  rows[0, :, 0] = 1
  rows[0, :, 1] = np.arange(16)
  variables = heads.init(KEY, rows, np.ones((1, 16), bool))
  kernel = np.zeros((16, 2), np.float32)
  kernel[:2] = [[8, 8], [2**-9, -(2**-9)]]
  head = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
  params = dict(variables["params"]) | {"refinement_1": head}
  found = heads.apply({"params": params}, rows, np.ones((1, 16), bool))
  [logits] = found.refinement_logits
  np.testing.assert_array_equal(logits[0, :, 0], 8 + np.arange(16) * 2**-9)


def test_bfloat16_takes_less_memory():
  sizes = {}
  batch = BATCH.replace(images=np.zeros((2, 512, 512, 3), np.uint8))
  for precision in ("float32", "bfloat16"):
    model, variables = _model("resnet_ws", precision)
    features = functools.partial(model.apply, method="features")
    sizes[precision] = peak_bytes(features, variables, batch)
  assert sizes["bfloat16"] < 0.6 * sizes["float32"]
