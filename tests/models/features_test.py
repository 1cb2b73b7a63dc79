"""The feature extractor on a toy backbone, its PCA against numpy's SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.models.features import (
  FeatureExtractor,
  Projection,
  fit_projection,
)
from tests import tiny


class Pyramid(tiny.nn.Module):
  """Stages of stride 4, 8 and 16, made of the first channel alone."""

  @tiny.nn.compact
  def __call__(self, images, *, train):
    gain = self.param("gain", tiny.nn.initializers.ones, ())
    x = images[..., :1] * gain
    return {f"s{n}": x[:, ::n, ::n] for n in (4, 8, 16)}


def _extractor(outputs, **options):
  return FeatureExtractor(
    backbone=Pyramid(),
    normalise=lambda x: x.astype(jnp.float32) + 1,
    outputs=outputs,
    stride=8,
    **options,
  )


PARAMS = {"params": {"backbone": {"gain": np.float32(2)}}}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)


def test_stages_are_brought_to_the_stride_and_concatenated():
  first = 2 * (IMAGES[..., :1].astype(np.float64) + 1)
  fine = first[:, ::4, ::4].reshape(2, 4, 2, 6, 2, 1).mean((2, 4))
  found = _extractor(("s8", "s4")).apply(PARAMS, IMAGES)
  assert found.shape == (2, 4, 6, 2)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[..., :1], first[:, ::8, ::8], rtol=1e-6)
  np.testing.assert_allclose(found[..., 1:], fine, rtol=1e-6)


def test_coarse_stages_are_upsampled_linearly():
  # A ramp stays a ramp: cell i of stride 16 lies at 2 i + 1/2 cells of
  # stride 8. The outermost half cells repeat the border.
  ramp = np.zeros((1, 32, 64, 3), np.uint8)
  ramp[:, :] = np.arange(64)[:, None]
  found = _extractor(("s16",)).apply(PARAMS, ramp)[0, :, :, 0]
  at = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
  np.testing.assert_allclose(found, np.tile(2 * (16 * at + 1), (4, 1)))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_backbone_gets_no_gradient(frozen):
  extractor = _extractor(("s8",), frozen=frozen)
  grad = jax.grad(lambda v: extractor.apply(v, IMAGES).sum())(PARAMS)
  gradient = float(grad["params"]["backbone"]["gain"])
  first = IMAGES[:, ::8, ::8, 0].astype(np.float64) + 1
  assert gradient == pytest.approx(0.0 if frozen else first.sum(), rel=1e-5)


def test_norm_layers_use_the_stored_statistics():
  # So features do not depend on the batch, and nothing is updated.
  batch = tiny.make_batch()
  extractor = tiny.make_model(frozen=False).extractor
  variables = tiny.make_variables(tiny.make_model(), batch)
  variables = {name: tree["extractor"] for name, tree in variables.items()}
  found, updated = extractor.apply(
    variables, batch.images, mutable=["batch_stats"]
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    updated["batch_stats"],
    variables["batch_stats"],
  )
  alone = extractor.apply(variables, batch.images[:1])
  np.testing.assert_allclose(found[:1], alone, rtol=1e-5, atol=1e-6)


def test_projection_is_linear_around_the_mean():
  rng = np.random.default_rng(1)
  x, mean, matrix = (
    rng.normal(size=(2, 3, 4)),
    rng.normal(size=4),
    rng.normal(size=(4, 2)),
  )
  found = Projection(2).apply(
    {"constants": {"mean": mean, "matrix": matrix}}, jnp.array(x)
  )
  np.testing.assert_allclose(found, (x - mean) @ matrix, rtol=1e-4, atol=1e-5)


def test_accelerators_project_in_float32():
  x = jnp.zeros((1, 4, 4, 3))
  project = jax.jit(lambda x: Projection(2).init_with_output({}, x)[0])
  text = project.lower(x).as_text()
  # Their default is bfloat16 on TPUs, TF32 on GPUs.
  assert text.count("dot_general") == 1
  assert "precision = [HIGHEST, HIGHEST]" in text


def _cells(seed=0):
  rng = np.random.default_rng(seed)
  cells = rng.normal(size=(200, 7)) @ rng.normal(size=(7, 7)) + 3
  cells[:, 4:] *= 100  # a stage on another scale
  return cells.astype(np.float32)


def test_projection_equals_an_svd():
  cells = _cells()
  mean, matrix = fit_projection(cells, (4, 3), 3)
  centred = cells.astype(np.float64) - cells.mean(0, dtype=np.float64)
  # Each stage is divided by its root mean squared length.
  for part in (centred[:, :4], centred[:, 4:]):
    part /= np.sqrt((np.linalg.norm(part, axis=1) ** 2).mean())
  u, s, _ = np.linalg.svd(centred, full_matrices=False)
  expected = u[:, :3] * s[:3]
  expected /= np.sqrt((expected**2).mean())
  found = (cells - mean) @ matrix
  signs = np.sign((found * expected).sum(0))
  np.testing.assert_allclose(found, expected * signs, atol=2e-3)
  assert (found**2).mean() == pytest.approx(1, rel=1e-4)
  assert matrix.dtype == mean.dtype == np.float32


def test_scale_of_a_stage_does_not_matter():
  cells = _cells()
  other = cells.copy()
  other[:, :4] *= 1000
  a = (cells - cells.mean(0)) @ fit_projection(cells, (4, 3), 2)[1]
  b = (other - other.mean(0)) @ fit_projection(other, (4, 3), 2)[1]
  np.testing.assert_allclose(np.abs(a), np.abs(b), atol=1e-2)


def test_constant_features_give_a_finite_projection():
  mean, matrix = fit_projection(np.ones((50, 3), np.float32), (3,), 2)
  assert np.isfinite(mean).all()
  assert np.isfinite(matrix).all()


@pytest.mark.parametrize(("groups", "dimension"), [((4, 4), 3), ((7,), 8)])
def test_wrong_sizes_are_named(groups, dimension):
  with pytest.raises(ValueError, match="7 channels"):
    fit_projection(_cells(), groups, dimension)
