"""A step with its proposals in blocks against the step with all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.models import proposal_blocks
from jtsm_jax.train import objectives
from jtsm_jax.train.cost import peak_bytes
from jtsm_jax.train.random_keys import dropout_keys
from tests import tiny

KEY = jax.random.key(5)
BATCH = tiny.make_batch()  # 12 proposals: one block and a half of 8
BATCH.valid[0, 9:] = False
MODEL = tiny.make_model(frozen=False, average=True, center=True, dropout=0.5)


def _loss(variables, batch, *, model=MODEL, proposal_block):
  return objectives.mining_loss(
    model,
    variables,
    batch,
    dropout_keys(KEY, 3, batch.image_index),
    counts=objectives.mining_counts(batch),
    mining=objectives.MiningSettings(num_things=tiny.NUM_THINGS, num_slots=5),
    losses=objectives.LossSettings(),
    proposal_block=proposal_block,
  )


@functools.cache
def _gradients(proposal_block):
  loss = functools.partial(_loss, proposal_block=proposal_block)
  gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
  variables = tiny.make_variables(MODEL, BATCH)
  return jax.device_get(gradients(variables, BATCH))


@pytest.mark.parametrize("block", [8, 16])
def test_blocks_change_neither_loss_nor_gradients(block):
  found, wanted = tiny.paths(_gradients(block)), tiny.paths(_gradients(0))
  assert found.keys() == wanted.keys()
  for path, value in wanted.items():
    atol = 1e-5 * max(np.abs(value).max(), 1e-2)
    np.testing.assert_allclose(
      found[path], value, rtol=1e-5, atol=atol, err_msg=path
    )
  _, grads = _gradients(0)
  backbone = grads["params"]["extractor"]["backbone"]["coarse_conv"]["kernel"]
  assert np.abs(backbone).max() > 1e-3


def _shapes(proposals):
  def widen(x, count):
    return jax.ShapeDtypeStruct((*x.shape[:1], count, *x.shape[2:]), x.dtype)

  bits = BATCH.member_bits
  bits = jax.ShapeDtypeStruct((*bits.shape[:2], proposals // 8), bits.dtype)
  return BATCH.replace(
    member_bits=bits,
    boxes=widen(BATCH.boxes, proposals),
    valid=widen(BATCH.valid, proposals),
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_take_less_memory(dtype):
  model = tiny.make_model(frozen=False, dropout=0.5, dtype=dtype)
  batch = _shapes(4096)
  variables = jax.eval_shape(model.init, KEY, batch)
  whole, blocks = (
    peak_bytes(
      jax.grad(
        functools.partial(_loss, model=model, proposal_block=block),
        has_aux=True,
      ),
      variables,
      batch,
    )
    for block in (0, 64)
  )
  pooled = 4096 * 2 * 2 * 8 * jnp.dtype(dtype).itemsize
  assert whole - blocks > 2 * pooled


def test_gradients_of_blocks_are_added_in_float32():
  # 512 equal blocks: a sum in bfloat16 would not grow beyond 256 of them.
  model = tiny.make_model(dtype=jnp.bfloat16)
  variables = tiny.make_variables(model, BATCH)
  features = model.apply(variables, BATCH, method="features")

  def gradient(repeats):
    batch = BATCH.replace(
      member_bits=np.tile(BATCH.member_bits[..., :1], (1, 1, repeats)),
      boxes=np.tile(BATCH.boxes[:, :8], (1, repeats, 1)),
      valid=np.tile(BATCH.valid[:, :8], (1, repeats)),
    )
    gradient = jax.grad(
      lambda f: (
        proposal_blocks.describe(model, variables, f, batch, proposal_block=8)
        .astype(jnp.float32)
        .sum()
      )
    )
    return np.asarray(jax.jit(gradient)(features), np.float32)

  assert features.dtype == jnp.bfloat16
  np.testing.assert_allclose(gradient(512), 512 * gradient(1), rtol=2**-7)
