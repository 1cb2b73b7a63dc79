"""Constants against numpy on the features themselves."""

import jax
import numpy as np
import pytest

from jtsm_jax.train.calibrate import CELLS_PER_IMAGE, calibrate
from tests import tiny

# 30 cells in each image: all of them are used.
BATCHES = [tiny.make_batch(2, seed=s) for s in range(2)]
PADDING = tiny.make_batch(2, seed=9)
PADDING = PADDING.replace(
  image_index=np.array([-1, -1], np.int32), valid=PADDING.valid & False
)


def _variables(model):
  return dict(tiny.make_variables(model, BATCHES[0]))


def _inside(maps):
  rows, columns = (-(-side // tiny.STRIDE) for side in tiny.IMAGE)
  return maps[:, :rows, :columns].reshape(-1, maps.shape[-1])


def test_projection_is_the_svd_of_the_image_cells():
  model = tiny.make_model(outputs=("coarse", "fine"), projection=3)
  variables = _variables(model)
  assert _inside(np.zeros((1, 8, 8, 1))).shape[0] <= CELLS_PER_IMAGE
  calibrated = calibrate(model, variables, [*BATCHES, PADDING], seed=0)

  def apply(variables, method, **options):
    return np.concatenate(
      [
        _inside(model.apply(variables, b.images, method=method, **options))
        for b in BATCHES
      ]
    )

  found = apply(calibrated, "extract")
  np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
  assert (found**2).mean() == pytest.approx(1, rel=1e-4)

  cells = apply(variables, "stages", train=False).astype(np.float64)
  cells -= cells.mean(0)
  for stage in (cells[:, :8], cells[:, 8:]):
    stage /= np.sqrt((stage**2).sum(1).mean())
  u, s, _ = np.linalg.svd(cells, full_matrices=False)
  expected = u[:, :3] * s[:3]
  expected /= np.sqrt((expected**2).mean())
  expected *= np.sign((expected * found).sum(0))
  np.testing.assert_allclose(found, expected, atol=5e-3)

  # Nothing else changed, and the given state did not.
  for name in ("params", "batch_stats"):
    jax.tree.map(
      np.testing.assert_array_equal, variables[name], calibrated[name]
    )
  jax.tree.map(np.testing.assert_array_equal, variables, _variables(model))


def test_centred_proposals_have_zero_mean_and_unit_spread():
  model = tiny.make_model(center=True, average=True)
  batches = [
    b.replace(valid=b.valid & (np.arange(tiny.P) < 7 + i))
    for i, b in enumerate(BATCHES)
  ]
  variables = calibrate(model, _variables(model), [*batches, PADDING], seed=0)

  def describe(module, batch):
    features = module.features(batch)
    return module.proposal_features(features, batch)

  apply = jax.jit(lambda b: model.apply(variables, b, method=describe))
  found = np.concatenate([np.asarray(apply(b))[b.valid] for b in batches])
  assert found.shape == (2 * 7 + 2 * 8, 2 * 2 * 8 + 8)
  for part in (found[:, :32], found[:, 32:]):
    np.testing.assert_allclose(part.mean(0), 0, atol=1e-4)
    assert part.var(0).mean() == pytest.approx(1, rel=1e-3)


def test_parts_of_a_batch_give_the_same():
  model = tiny.make_model(
    outputs=("coarse", "fine"), projection=3, center=True, average=True
  )
  variables = _variables(model)
  parts = [
    jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
    for batch in BATCHES
    for i in range(2)
  ]
  whole = calibrate(model, variables, BATCHES, seed=0)["constants"]
  found = calibrate(model, variables, parts, seed=0)["constants"]
  for name, value in tiny.paths(whole).items():
    np.testing.assert_allclose(
      tiny.paths(found)[name], value, rtol=1e-4, atol=1e-4, err_msg=name
    )


def test_paper_model_has_nothing_to_calibrate():
  model = tiny.make_model()
  variables = _variables(model)
  found = calibrate(model, variables, [], seed=0)
  assert all(found[name] is variables[name] for name in variables)
