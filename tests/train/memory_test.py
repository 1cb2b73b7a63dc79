"""What a device holds, counted by hand, and what is said when it is too much.

The peak of a step is the concern of tests/train/cost_test.py: here it is what
the tests make it, or just compared.
"""

import dataclasses
import pathlib
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jtsm_jax.train import build, memory, objectives, setup
from jtsm_jax.train import step as step_parts
from jtsm_jax.train.sharding import make_mesh, place, put_batch
from jtsm_jax.types import Categories, Category, InputError
from tests import tiny
from tests.configs import tiny as tiny_config

CATEGORIES = Categories(
  tuple(Category(i, f"class {i}", i < tiny.NUM_THINGS) for i in range(tiny.K))
)
GIB = 2**30
P, S = tiny.P, tiny.S
M = 5


def _run(*, data=1, model=1, variant="", **fields):
  """A run as `set_up` makes it, on devices that need not exist."""
  config = tiny_config.get_config(variant)
  config.data.canvases = ((32, 48), (64, 96), (96, 64))
  config.neck.widths = (16, 8)
  config.train.batch_size = 8
  config.train.model_parallel = model
  config.train.optimizer = "adamw"
  config.warm_up.steps = 0
  config.update_from_flattened_dict(fields)
  network = build.build_model(config, CATEGORIES)
  batch = tiny.make_batch(1)
  abstract = jax.eval_shape(network.init, jax.random.key(0), batch)
  params = abstract["params"]
  start = config.warm_up.steps
  return setup.Setup(
    config=config,
    workdir=None,
    source=range(12),
    store=None,
    num_things=tiny.NUM_THINGS,
    key=jax.random.key(0),
    mesh=AbstractMesh(
      (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    ),
    model=network,
    mining=objectives.MiningSettings(num_things=tiny.NUM_THINGS, num_slots=M),
    losses=build.loss_settings(config),
    example=batch,
    abstract=abstract,
    warm_up_optimizer=build.warm_up_optimizer(config, params),
    optimizer=build.main_optimizer(config, params),
    warm_up_steps=start,
    branch_start=start + config.reestimation.start,
    last_step=start + config.train.steps,
  )


def _peaks(monkeypatch, **peaks):
  """Lets each part of a step have a peak of its own."""

  def peak_bytes(function, *args, platform=None):
    return peaks.get(function.__name__, 0)

  monkeypatch.setattr(memory.cost, "peak_bytes", peak_bytes)


# image_index, size, flip, window, tags; superpixels; bits, boxes, valid.
PROPOSALS = 4 + 8 + 1 + 16 + 4 * tiny.K + 64 * 96 * 4 + S * 2 + 17 * P
IMAGES = 64 * 96 * 3


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_state_and_batch_by_hand(monkeypatch):
  _peaks(monkeypatch)
  run = _run(data=2, model=4)
  found = memory.estimate_mining(run)
  params = _count(run.abstract["params"])
  # Of the neck's layers each device has a quarter, but for the last bias. The
  # tag head does not learn, so Adam keeps two slots of all the others.
  inputs = 2 * 2 * 64
  divided = inputs * 16 + 16 + 16 * 8
  kept = _count(run.abstract["params"]["tag_head"])
  local = params - divided + divided // 4
  steps = 3  # of the run, of Adam and of the rate
  slots = 2 * (local - kept)
  others = _count({k: v for k, v in run.abstract.items() if k != "params"})
  assert found.state == 4 * (local + slots + others + steps)
  assert found.batch == 4 * (IMAGES + PROPOSALS)


def test_the_fullest_moment_of_a_step(monkeypatch):
  run = _run()
  size = 4 * _count(run.abstract["params"])
  state = memory._bytes(setup.shapes(run, 0))
  pseudo = 8 * M * (64 // 4 * 96 // 4 + 1)
  cases = [
    ({"mining_gradients": GIB}, GIB),
    # The gradients of the mining wait for those of the branches.
    ({"branch_gradients": GIB}, GIB + size + pseudo),
    # The state's own memory is not taken twice.
    ({"apply_gradients": GIB + state}, GIB + 2 * size),
    ({"apply_gradients": state}, 2 * size),
    ({"branch_gradients": GIB, "mining_gradients": 2 * GIB}, 2 * GIB),
  ]
  for peaks, expected in cases:
    _peaks(monkeypatch, **peaks)
    assert memory.estimate_mining(run).step == expected, peaks


def test_gradients_are_divided_like_parameters(monkeypatch):
  _peaks(monkeypatch, mining_gradients=GIB)
  inputs = 2 * 2 * 64
  divided = 4 * (inputs * 16 + 16 + 16 * 8)
  found = memory.estimate_mining(_run(model=4))
  assert found.step == GIB - divided + divided // 4


@pytest.mark.parametrize("cached", [True, False])
def test_features_of_a_frozen_backbone(monkeypatch, cached):
  # Stride 8, 8 channels of the PCA; two batches wait for their masks.
  features = 64 // 8 * 96 // 8 * 8
  run = _run(variant="frozen", **{"backbone.cache": cached})
  _peaks(monkeypatch, mining_gradients=GIB)
  found = memory.estimate_mining(run)
  assert found.batch == 3 * 8 * (PROPOSALS + (2 if cached else 4) * features)
  assert found.step == GIB
  _peaks(monkeypatch, mining_gradients=1, extract_features=GIB)
  found = memory.estimate_mining(run)
  if cached:  # nothing is extracted in a step
    assert found.step < GIB
  else:
    waiting = 2 * (PROPOSALS + 4 * features)
    assert found.batch == 8 * (PROPOSALS + IMAGES + waiting)
    assert found.step == GIB


def test_warm_up(monkeypatch, capsys):
  run = _run(data=2, **{"warm_up.steps": 2, "warm_up.batch_size": 20})
  state = memory._bytes(setup.shapes(run, 0))
  _peaks(monkeypatch, tag_step=GIB + state)
  found = memory.estimate_warm_up(run)
  assert found == memory.Estimate(state, 10 * (PROPOSALS + IMAGES), GIB)
  # The error speaks of the phase that takes most, if it is still to come.
  run.config.train.memory_gib = 0.9
  with pytest.raises(InputError, match=r"config\.warm_up\.batch_size, now 20"):
    memory.check_memory(run, 0)
  memory.check_memory(run, 2)
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith("train: about 1 GiB")
  assert second.startswith("train: about 0.00")


def test_what_is_said(monkeypatch, capsys):
  estimate = memory.Estimate(int(0.4 * GIB), int(0.1 * GIB), int(2.72 * GIB))
  monkeypatch.setattr(memory, "estimate_mining", lambda run: estimate)
  run = _run(**{"train.memory_gib": 141.0})
  memory.check_memory(run, 0)
  assert capsys.readouterr().out == (
    "train: about 3.2 GiB per device (weights and optimizer 0.4, batch 0.1, "
    "step 2.7), of 141 GiB\n"
  )
  run.config.train.memory_gib = 0.0
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: None)
  memory.check_memory(run, 0)
  assert capsys.readouterr().out.endswith("step 2.7)\n")
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: 3 * GIB)
  with pytest.raises(InputError, match=r"about 3\.2 GiB.*a device has 3 GiB"):
    memory.check_memory(run, 0)
  run.config.train.memory_gib = 3.3
  memory.check_memory(run, 0)


def _advice(**options):
  """The fields that the error names, and what it says of them."""
  P = options.pop("P", 4096)
  run = _run(**options)
  valid = np.ones((1, P), bool)
  run = dataclasses.replace(run, example=run.example.replace(valid=valid))
  lines = memory._mining_remedies(run)
  return {re.split("[=,]", line)[0]: line for line in lines}


def test_advice_names_fields_that_help(monkeypatch):
  found = _advice()
  assert list(found) == [
    "train.proposal_block",
    "train.accumulation",
    "train.precision",
    "train.remat",
    "data.canvases",
    "proposals.max_proposals",
  ]
  config = tiny_config.get_config().to_dict()
  for field in found:
    group, name = field.split(".")
    assert name in config[group]
  assert "=512" in found["train.proposal_block"]
  assert "=2 " in found["train.accumulation"]
  assert "64 x 96" in found["data.canvases"]
  # What is done already is no advice, or more of it.
  found = _advice(
    **{
      "train.proposal_block": 512,
      "train.accumulation": 2,
      "train.precision": "bfloat16",
      "train.remat": "backbone",
    }
  )
  assert "=256" in found["train.proposal_block"]
  assert "=4 " in found["train.accumulation"]
  assert not {"train.precision", "train.remat"} & set(found)
  # Each device computes one image at a time; its proposals are few.
  found = _advice(data=4, P=64, **{"train.accumulation": 2})
  assert not {"train.accumulation", "train.proposal_block"} & set(found)
  assert "train.divide_optimizer" in found
  # Accelerators have memory of their own.
  monkeypatch.setattr(jax, "local_device_count", lambda: 4)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  found = _advice()
  assert "=2 " in found["train.model_parallel"]
  assert "more devices" in found["train.batch_size"]


def test_estimate_of_a_whole_step(capsys):
  """In earnest, with nothing replaced: it says what costs less."""
  sizes = [
    memory.estimate_mining(_run(**fields)).step
    for fields in (
      {},
      {"train.accumulation": 8},
      {"train.remat": "backbone"},
      {"train.precision": "bfloat16"},
    )
  ]
  assert all(size < sizes[0] for size in sizes[1:])
  # About the images' share of the activations is on each of two devices.
  assert memory.estimate_mining(_run(data=2)).step < 0.7 * sizes[0]
  run = _run(**{"train.memory_gib": 0.001})
  with pytest.raises(InputError, match=r"config\.train\.memory_gib, if"):
    memory.check_memory(run, 0)
  assert capsys.readouterr().out.startswith("train: about 0.")


def test_memory_of_devices():
  def device(stats):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    return types.SimpleNamespace(local_devices=[device] * 4)

  assert memory.device_bytes(device({"bytes_limit": 7, "num_allocs": 1})) == 7
  assert memory.device_bytes(device({"num_allocs": 1})) is None
  assert memory.device_bytes(device(None)) is None


MEMINFO = pathlib.Path("/proc/meminfo")


@pytest.mark.skipif(not MEMINFO.exists(), reason=f"no {MEMINFO}: not Linux")
def test_cpu_devices_share_the_machine():
  total = [
    1024 * int(line.split()[1])
    for line in MEMINFO.read_text().splitlines()
    if line.startswith("MemTotal:")
  ]
  cpu = types.SimpleNamespace(platform="cpu")
  mesh = types.SimpleNamespace(local_devices=[cpu] * 4)
  assert [memory.device_bytes(mesh)] == [n // 4 for n in total]


def test_one_device_traces_a_step_once(monkeypatch):
  """What the estimate has traced is not traced again by the step."""
  run = dataclasses.replace(_run(), mesh=make_mesh(1))
  traced = []
  loss = step_parts.mining_loss

  def counted(*args, **kwargs):
    traced.append(1)
    return loss(*args, **kwargs)

  monkeypatch.setattr(step_parts, "mining_loss", counted)
  memory.check_memory(run, 0)
  batch = memory._largest_batch(run, run.config.train.batch_size)
  state, batch = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), (setup.shapes(run, 0), batch)
  )
  state = place(state, setup.shardings(run, 0))
  with jax.set_mesh(run.mesh):
    run.mining_gradients.lower(state, put_batch(batch, run.mesh))
  assert len(traced) == 1
