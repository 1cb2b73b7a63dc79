"""The pieces of a step: whose gradients they are, and that padding is nothing.

The losses themselves are worked by hand in tests/losses.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtsm_jax.evaluation.inference import make_score_step
from jtsm_jax.losses.refinement import refinement_loss
from jtsm_jax.mining import labels
from jtsm_jax.train import objectives, step, warm_up
from jtsm_jax.train.cost import matmul_flops
from jtsm_jax.train.random_keys import INSTANCES, dropout_keys, image_keys
from jtsm_jax.train.schedule import make_optimizer
from jtsm_jax.train.state import TrainState
from jtsm_jax.types import pack_members
from tests import tiny

KEY = jax.random.key(5)
MINING = objectives.MiningSettings(num_things=tiny.NUM_THINGS, num_slots=5)
LOSSES = objectives.LossSettings()
BATCH = tiny.make_batch()
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def _state(model, *, optimizer=OPTIMIZER):
  variables = dict(tiny.make_variables(model, BATCH))
  params = variables.pop("params")
  return TrainState(
    step=jnp.int32(0),
    params=params,
    model_state=variables,
    opt_state=optimizer.init(params),
  )


def _mining_loss(model, variables, batch):
  return objectives.mining_loss(
    model,
    variables,
    batch,
    dropout_keys(KEY, 3, batch.image_index),
    counts=objectives.mining_counts(batch),
    mining=MINING,
    losses=LOSSES,
  )


def _branch_loss(model, variables, batch, mined, pseudo):
  targets = objectives.branch_targets(
    model,
    batch,
    mined,
    pseudo,
    image_keys(KEY, 3, batch.image_index, stream=INSTANCES),
    num_things=tiny.NUM_THINGS,
    losses=LOSSES,
  )
  counts = objectives.branch_counts(targets)
  return objectives.branch_loss(model, variables, batch, targets, counts=counts)


@functools.cache
def _mined():
  """Mined segments of BATCH and their pseudo masks."""
  model = tiny.make_model()
  state = _state(model)
  mined = jax.jit(lambda v: _mining_loss(model, v, BATCH)[1][1])
  mined = jax.device_get(mined(state.variables))
  assert mined.valid.any(1).all()
  return mined, jax.device_get(tiny.pseudo_masks(BATCH, mined))


def _reached(grads):
  """Layers with any gradient at all, as "neck/fc1"."""
  return {
    path.rsplit("/", 1)[0]
    for path, g in tiny.paths(grads).items()
    if np.any(np.asarray(g) != 0)
  }


BACKBONE = {
  f"extractor/backbone/{layer}"
  for layer in ("fine_conv", "fine_norm", "coarse_conv")
}
TERMS = {
  "loss/mil": {"heads/mil_classes", "heads/mil_proposals", "neck/fc1"},
  "loss/refinement_1": {"heads/refinement_1", "neck/fc1"},
  "loss/refinement_2": {"heads/refinement_2", "neck/fc1"},
  "loss/cells": {"cells/classify"},
  "loss/instance": {
    f"instance/{layer}" for layer in ("conv1", "deconv", "predictor")
  },
  "loss/semantic": {
    f"semantic/{layer}" for layer in ("conv1", "conv2", "predictor")
  },
}


@functools.cache
def _term_gradients(frozen):
  """The gradient of each term of the loss, from one compiled function."""
  model = tiny.make_model(frozen=frozen, dropout=0.5, cells=True)
  state = _state(model)
  mined = _mined()
  names = list(TERMS)

  @jax.jit
  def gradient(params, which):
    def loss(params):
      variables = {"params": params, **state.model_state}
      _, (metrics, _, _) = _mining_loss(model, variables, BATCH)
      _, more = _branch_loss(model, variables, BATCH, *mined)
      metrics |= more
      return sum(
        jnp.where(which == i, metrics[name], 0.0)
        for i, name in enumerate(names)
      )

    return jax.grad(loss)(params)

  return {n: gradient(state.params, i) for i, n in enumerate(names)}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_reaches_its_own_parameters_and_no_others(term, frozen):
  # No head hears of another through pseudo labels, nor through their weights.
  expected = TERMS[term] | (set() if frozen else BACKBONE)
  assert _reached(_term_gradients(frozen)[term]) == expected


def test_instance_term_moves_the_channels_of_mined_things_only():
  mined, _ = _mined()
  things = set(mined.label[mined.weight > 0].tolist())
  things &= set(range(tiny.NUM_THINGS))
  assert 0 < len(things) < tiny.NUM_THINGS
  predictor = _term_gradients(True)["loss/instance"]["instance"]["predictor"]
  moved = set(np.flatnonzero(np.any(predictor["kernel"] != 0, axis=0)).tolist())
  assert moved == things


def _overlap_with_maps(logits, tags):
  """Soft IoU [B, P, K] of proposals with their image's maps, by pixels."""
  masks = np.asarray(tiny.proposal_masks(BATCH))
  found = []
  for b, (height, width) in enumerate(BATCH.size):
    shown = logits[b].repeat(tiny.STRIDE, 0).repeat(tiny.STRIDE, 1)
    # Odds of classes without a tag are divided by e^2.
    shown = np.exp(shown[:height, :width] - 2 * (1 - tags[b]))
    maps = shown / shown.sum(-1, keepdims=True)
    inside = masks[b, :, :height, :width, None]
    intersection = (inside * maps).sum((1, 2))
    union = inside.sum((1, 2)) + maps.sum((0, 1)) - intersection
    found.append(intersection / union)
  return np.stack(found)


def test_with_a_cell_head_mining_follows_the_maps():
  # The first head learns from what matches the maps of the tagged classes, the
  # last mining looks at these and at the last head.
  model = tiny.make_model(cells=True)
  variables = tiny.make_variables(model, BATCH)
  mining_loss = jax.jit(lambda v: _mining_loss(model, v, BATCH)[1])
  metrics, mined, _ = mining_loss(variables)

  features = model.apply(variables, BATCH, method="features")
  logits = model.apply(variables, features, method="cell_logits")
  outputs = model.apply(variables, features, BATCH, method="mine")
  overlap = _overlap_with_maps(np.asarray(logits), BATCH.tags)
  options = dataclasses.asdict(MINING)
  first = labels.mine(overlap, outputs.image_scores, BATCH, **options)
  assert float(metrics["loss/refinement_1"]) == pytest.approx(
    float(
      refinement_loss(outputs.refinement_logits[0], first, valid=BATCH.valid)
    ),
    rel=1e-4,
  )
  head = jax.nn.softmax(outputs.refinement_logits[-1])[..., :-1]
  last = labels.mine(head * overlap, outputs.image_scores, BATCH, **options)
  np.testing.assert_array_equal(mined.proposal, last.proposal)
  # None of the others would do.
  for scores in (outputs.mil_scores, head, overlap):
    other = labels.mine(scores, outputs.image_scores, BATCH, **options)
    assert not np.array_equal(other.proposal, last.proposal)
  other = labels.mine(
    outputs.mil_scores, outputs.image_scores, BATCH, **options
  )
  assert not np.array_equal(other.label, first.label)


def test_frozen_stages_have_no_gradient_and_cost_none():
  model = tiny.make_model(frozen=False, dropout=0.5)
  state = _state(model)
  mined, pseudo = _mined()
  found, flops = {}, {}
  for frozen in ((), ("extractor/backbone/fine_",)):
    mining = step.make_mining_gradients(
      KEY, model, mining=MINING, losses=LOSSES, frozen=frozen
    )
    branches = step.make_branch_gradients(
      KEY, model, num_things=tiny.NUM_THINGS, losses=LOSSES, frozen=frozen
    )
    parts = (mining, (state, BATCH)), (branches, (state, BATCH, mined, pseudo))
    found[frozen] = [part(*arguments)[0] for part, arguments in parts]
    flops[frozen] = [
      matmul_flops(part, *arguments) for part, arguments in parts
    ]
  everything, stopped = found.values()
  assert all(a > b for a, b in zip(*flops.values(), strict=True))
  for a, b in zip(everything, stopped, strict=True):
    for layer in ("fine_conv", "fine_norm"):
      kept, zeros = (x["extractor"]["backbone"].pop(layer) for x in (a, b))
      assert all(np.any(x) for x in jax.tree.leaves(kept))
      assert not any(np.any(x) for x in jax.tree.leaves(zeros))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b
    )


def test_both_parts_of_a_step_sum_to_the_gradient_of_the_loss():
  # Eq. 1 and 4: all the terms above, with the random key of step 3.
  model = tiny.make_model(frozen=False, dropout=0.5, cells=True)
  state = _state(model).replace(step=jnp.int32(3))
  mined, pseudo = _mined()
  mining_gradients = step.make_mining_gradients(
    KEY, model, mining=MINING, losses=LOSSES
  )
  branch_gradients = step.make_branch_gradients(
    KEY, model, num_things=tiny.NUM_THINGS, losses=LOSSES
  )
  grads, new_mined, metrics = mining_gradients(state, BATCH)
  branch_grads, branch_metrics = branch_gradients(state, BATCH, mined, pseudo)
  assert {k for k in metrics | branch_metrics if "loss/" in k} == set(TERMS)
  expected = jax.tree.map(
    lambda *terms: sum(terms), *_term_gradients(False).values()
  )
  jax.tree.map(
    lambda e, a, b: np.testing.assert_allclose(e, a + b, atol=1e-5),
    expected,
    grads,
    branch_grads,
  )

  # The same step again gives the same bits; the next one other dropout.
  again, mined_again, _ = mining_gradients(state, BATCH)
  jax.tree.map(np.testing.assert_array_equal, grads, again)
  jax.tree.map(np.testing.assert_array_equal, new_mined, mined_again)
  other, _, _ = mining_gradients(state.replace(step=jnp.int32(4)), BATCH)
  kernels = grads["neck"]["fc1"]["kernel"], other["neck"]["fc1"]["kernel"]
  assert not np.allclose(*kernels)

  # The update is that of the optimizer with the sum of the gradients.
  params = jax.tree.map(np.asarray, state.params)
  apply_gradients = step.make_apply_gradients(OPTIMIZER)
  after, metrics = apply_gradients(_copy(state), grads, branch_grads)
  assert float(metrics["gradient/norm"]) == pytest.approx(
    np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(expected))), rel=1e-4
  )
  assert int(after.step) == 4
  jax.tree.map(
    lambda p, g, new: np.testing.assert_allclose(
      new, p - 0.05 * g, rtol=1e-4, atol=1e-6
    ),
    params,
    expected,
    after.params,
  )


def _copy(state):
  """Steps give the memory of their state back."""
  return jax.tree.map(jnp.array, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_change_nothing(bad):
  model = tiny.make_model(instance=False, semantic=False)
  state = _state(model)
  grads = jax.tree.map(jnp.ones_like, state.params)
  grads["neck"]["fc1"]["kernel"] *= bad
  apply_gradients = step.make_apply_gradients(OPTIMIZER)
  after, metrics = apply_gradients(_copy(state), grads)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  assert not np.isfinite(metrics["gradient/norm"])


def test_parameters_that_would_overflow_change_nothing():
  model = tiny.make_model(instance=False, semantic=False)
  state = _state(model)
  huge = optax.sgd(1e38)
  state = state.replace(opt_state=huge.init(state.params))
  grads = jax.tree.map(lambda p: jnp.full_like(p, 9), state.params)
  after, metrics = step.make_apply_gradients(huge)(_copy(state), grads)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  assert np.isfinite(metrics["gradient/norm"])
  assert not np.isfinite(metrics["params/norm"])


def test_average_of_the_parameters():
  # Worked out in a loop: the share of the new ones falls from 0.9 to 0.4.
  model = tiny.make_model(instance=False, semantic=False)
  state = _state(model).replace(step=jnp.int32(7))
  state = state.replace(ema=jax.tree.map(jnp.array, state.params))
  apply_gradients = step.make_apply_gradients(
    OPTIMIZER, ema_decay=0.6, ema_start=7
  )
  grads = jax.tree.map(lambda p: p - 1, state.params)
  average = np.asarray(state.ema["neck"]["fc1"]["kernel"], np.float64)
  state = _copy(state)
  for t in range(20):
    state, _ = apply_gradients(state, grads)
    decay = min(0.6, (1 + t) / (10 + t))
    new = np.asarray(state.params["neck"]["fc1"]["kernel"])
    average = decay * average + (1 - decay) * new
    found = state.averaged_variables["params"]["neck"]["fc1"]["kernel"]
    np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6)
  assert set(state.averaged_variables) == set(state.variables)


def _pad_last(array, axis, count, value):
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, count)
  return np.pad(array, widths, constant_values=value)


def _as_it_is(batch):
  return batch


def _more_proposals(batch):
  boxes = _pad_last(batch.boxes, 1, 5, 0)
  boxes[:, tiny.P :] = 0, 0, 1, 1
  return batch.replace(
    member_bits=pack_members(_pad_last(batch.membership, 1, 5, False)),
    boxes=boxes,
    valid=_pad_last(batch.valid, 1, 5, False),
  )


def _more_superpixels(batch):
  # Nobody has their pixels; that a proposal claims one changes nothing.
  membership = _pad_last(batch.membership, 2, 3, True)
  return batch.replace(member_bits=pack_members(membership))


def _larger_canvas(batch):
  images = _pad_last(_pad_last(batch.images, 1, 32, 0), 2, 16, 0)
  superpixels = _pad_last(_pad_last(batch.superpixels, 1, 32, -1), 2, 16, -1)
  return batch.replace(images=images, superpixels=superpixels)


def _more_examples(batch):
  """Padding examples, as the pipeline makes them, and one of another make."""
  empty = jax.tree.map(lambda x: np.zeros_like(x[:1]), batch)
  empty = empty.replace(
    image_index=np.array([-1], np.int32),
    superpixels=empty.superpixels - 1,
    boxes=empty.boxes + np.array([0, 0, 1, 1], np.float32),
  )
  return jax.tree.map(
    lambda a, b: np.concatenate([a[:1], b, a[1:], b]), batch, empty
  )


MODELS = {
  "paper": tiny.make_model(frozen=False),
  # All that configs/folder.py adds. The cells have no dropout here: on another
  # canvas they draw other numbers.
  "photographs": tiny.make_model(
    outputs=("fine", "coarse"),
    projection=6,
    widths=(),
    input_dropout=0.5,
    availability="coverage",
    reduce="mean",
    center=True,
    average=True,
    size_exponents=(0.25, 0.5),
    cells=True,
  ),
}


PADDED = tiny.make_batch(image=(40, 40))


@functools.cache
def _outcome(name, pad):
  """Losses, mined segments and scores of PADDED after `pad`."""
  model = MODELS[name]
  score = make_score_step(model)

  @jax.jit
  def outcome(variables, batch):
    loss, (metrics, mined, y) = _mining_loss(model, variables, batch)
    metrics |= objectives.mining_metrics(mined, y, batch)
    pseudo = tiny.pseudo_masks(batch, mined)
    branch, more = _branch_loss(model, variables, batch, mined, pseudo)
    metrics = metrics | more | {"mining": loss, "branch": branch}
    scores = score(variables, batch)
    return metrics, mined, (scores.proposals, scores.image, scores.semantic)

  metrics, mined, scores = jax.device_get(
    outcome(_state(model).variables, pad(PADDED))
  )
  return (
    {k: float(v) for k, v in metrics.items()},
    dataclasses.asdict(mined),
    *scores,
  )


@pytest.mark.parametrize(
  "pad", [_more_proposals, _more_superpixels, _larger_canvas, _more_examples]
)
@pytest.mark.parametrize("model", MODELS)
def test_padding_changes_nothing(model, pad):
  # The image keeps three cells from the border of the canvas, as far as the
  # semantic branch and its resizing see: nearer, a convolution pads with zeros
  # what on a larger canvas are features of black pixels.
  real = [0, 2] if pad is _more_examples else [0, 1]
  metrics, mined, *scores = _outcome(model, _as_it_is)
  assert ("loss/cells" in metrics) == (model == "photographs")
  padded_metrics, padded_mined, *padded_scores = _outcome(model, pad)
  assert padded_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
  for name, value in mined.items():
    found = padded_mined[name][real]
    if name in ("label", "weight", "slot"):
      found = found[:, : tiny.P]
    # The slots of things that are not there have no meaning.
    used = mined["valid"] if value.shape == mined["valid"].shape else True
    np.testing.assert_allclose(
      np.where(used, found, 0), np.where(used, value, 0), atol=1e-6
    )
  rows, columns = (side // tiny.STRIDE for side in PADDED.size[0])
  for value, found in zip(scores, padded_scores, strict=True):
    found = found[real]
    if value.ndim == 4:
      value, found = (x[:, :rows, :columns] for x in (value, found))
    elif value.ndim == 3:
      assert not found[:, tiny.P :].any()
      found = found[:, : tiny.P]
    np.testing.assert_allclose(found, value, atol=1e-5)
  if pad is _more_proposals:
    assert not padded_mined["weight"][:, tiny.P :].any()
  if pad is _more_examples:
    assert not padded_mined["valid"][[1, 3]].any()
    assert not padded_mined["weight"][[1, 3]].any()


def test_mining_metrics_by_hand():
  mined, _ = _mined()
  y = np.where(BATCH.tags > 0, 0.9, 0.2).astype(np.float32)
  y[0, 0] = 0.9 if BATCH.tags[0, 0] == 0 else 0.2  # one of ten is wrong
  found = objectives.mining_metrics(mined, y, BATCH)
  masks = np.asarray(tiny.proposal_masks(BATCH))
  area = [
    masks[b, mined.proposal[b, m]].sum() / np.prod(tiny.IMAGE)
    for b, m in zip(*np.nonzero(mined.valid), strict=True)
  ]
  expected = {
    "tags/accuracy": 0.9,
    "mining/area": np.mean(area),
    "mining/score": mined.score[mined.valid].mean(),
  }
  assert {k: float(v) for k, v in found.items()} == pytest.approx(expected)


def test_tag_step_trains_backbone_and_tag_head_only():
  model = tiny.make_model(instance=False, semantic=False)
  params = tiny.make_variables(model, BATCH)["params"]
  # Everything may move: what has no gradient stays.
  optimizer = make_optimizer(
    params,
    name="sgd",
    schedule=optax.constant_schedule(0.1),
    weight_decay=0.0,
    trained=("",),
  )
  state = _state(model, optimizer=optimizer)
  padded = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), BATCH)
  padded = padded.replace(image_index=np.array([0, 1, -1], np.int32))
  tag_step = warm_up.make_tag_step(KEY, model, optimizer)
  after, metrics = tag_step(_copy(state), padded)
  moved = _reached(
    jax.tree.map(lambda a, b: a - b, after.params, dict(state.params))
  )
  assert moved == BACKBONE | {"tag_head/Dense_0"}
  assert int(after.step) == 1
  # The norm layers learn the statistics of the batch.
  old, new = (
    s.model_state["batch_stats"]["extractor"]["backbone"]["fine_norm"]["mean"]
    for s in (state, after)
  )
  assert not np.allclose(old, new)
  again, metrics_again = tag_step(_copy(state), padded)
  jax.tree.map(np.testing.assert_array_equal, after, again)
  assert float(metrics["loss/tags"]) == float(metrics_again["loss/tags"])
  # In the loss the padding example does not count: its tags are not read.
  other = padded.replace(tags=padded.tags * np.array([[1], [1], [0]]))
  _, found = tag_step(_copy(state), other)
  assert float(found["loss/tags"]) == float(metrics["loss/tags"])


def test_augment_turns_square_images_and_shuffles_channels():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (8, 8, 3), np.uint8)
  images = jnp.array(np.stack([image] * 200))
  size = np.full((200, 2), 8)
  size[100:] = 8, 6  # does not fill the canvas: is not turned
  keys = jax.random.split(KEY, 200)
  found = np.asarray(jax.jit(warm_up.augment)(keys, images, size))
  orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
  all_ways = {
    np.rot90(image, k)[..., order].tobytes(): (k, order)
    for k in range(4)
    for order in orders
  }
  ways = [all_ways[x.tobytes()] for x in found]
  assert len(set(ways[:100])) > 18  # of 24
  assert {order for _, order in ways} == set(orders)
  assert {k for k, _ in ways[:100]} == {0, 1, 2, 3}
  assert {k for k, _ in ways[100:]} == {0}


def test_augment_leaves_oblong_canvases_upright():
  images = np.zeros((3, 4, 6, 3), np.uint8)
  images[:, 0] = 1, 2, 3  # the top row
  found = warm_up.augment(
    jax.random.split(KEY, 3), jnp.array(images), np.tile([4, 6], (3, 1))
  )
  assert np.asarray(found)[:, 0].sum() == images.sum()
