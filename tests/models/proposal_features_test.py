"""Proposal features against loops over cells and pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from jtsm_jax.models.proposal_features import (
  ProposalFeatures,
  area_share,
  superpixel_areas,
)
from tests import tiny
from tests.pallas_kernels.moi_pool import pooling_cases

BATCH = tiny.make_batch()
GRID = tuple(side // tiny.STRIDE for side in tiny.CANVAS)
FEATURES = np.random.default_rng(5).normal(size=(2, *GRID, 3)).astype("f")


@functools.cache
def _cases():
  """Cell masks and inclusive grid boxes of every proposal."""
  pixels = np.asarray(tiny.proposal_masks(BATCH))
  lead, s = pixels.shape[:2], tiny.STRIDE
  cells = pixels.reshape(*lead, GRID[0], s, GRID[1], s).any((3, 5))
  boxes = np.floor(BATCH.boxes / s + 0.5).astype(int)  # half up: >= 0
  y, x = (np.arange(n) for n in GRID)
  inside = (y >= boxes[..., :1]) & (y <= boxes[..., 2:3])
  inside = (
    inside[..., None]
    & (((x >= boxes[..., 1:2]) & (x <= boxes[..., 3:4]))[..., None, :])
  )
  return cells & inside, inside, boxes


@functools.cache
def _pooled(kind):
  """Maxima [B, P, 2, 2, C], and which bins have a cell."""
  masks, inside, boxes = _cases()
  masks = masks if kind == "moi" else inside
  pairs = [
    pooling_cases.loop_pool(FEATURES[b], masks[b], boxes[b], (2, 2))
    for b in range(2)
  ]
  pooled, argmax = (np.stack(x) for x in zip(*pairs, strict=True))
  return pooled, argmax[..., 0] >= 0


def _apply(variables=None, **options):
  module = ProposalFeatures(stride=tiny.STRIDE, output_size=(2, 2), **options)
  return jax.jit(module.apply)(variables or {}, FEATURES, BATCH)


def _share():
  pixels = np.asarray(tiny.proposal_masks(BATCH)).sum((2, 3))
  return pixels / np.prod(tiny.IMAGE)


def test_default_is_compensated_moi_pooling_flattened():
  pooled, bins = _pooled("moi")
  psi = 4 / np.maximum(bins.sum((2, 3)), 1)
  expected = pooled.reshape(2, tiny.P, -1) * psi[..., None]
  np.testing.assert_allclose(_apply(), expected, rtol=1e-5)
  assert (bins.sum((2, 3)) < 4).any()  # the compensation was put to the test


def test_mean_over_bins_with_average_and_size():
  pooled, bins = _pooled("moi")
  count = np.maximum(bins.sum((2, 3)), 1)[..., None]
  share = _share()[..., None]
  maxima = pooled.sum((2, 3)) / count * share**0.25
  # The average over the segment's pixels, each with the features of its cell.
  pixels = np.asarray(tiny.proposal_masks(BATCH), np.float64)
  wide = FEATURES.repeat(tiny.STRIDE, 1).repeat(tiny.STRIDE, 2)
  mean = np.einsum("bpyx,byxc->bpc", pixels, wide)
  mean = mean / pixels.sum((2, 3))[..., None] * share**0.5
  found = _apply(reduce="mean", average=True, size_exponents=(0.25, 0.5))
  np.testing.assert_allclose(
    found, np.concatenate([maxima, mean], -1), rtol=1e-4, atol=1e-5
  )


def test_box_pooling_averages_over_the_box():
  pooled, _ = _pooled("roi")
  inside = _cases()[1].astype(np.float64)
  mean = np.einsum("bpyx,byxc->bpc", inside, FEATURES)
  mean = mean / inside.sum((2, 3))[..., None]
  expected = np.concatenate([pooled.reshape(2, tiny.P, -1), mean], -1)
  found = _apply(pooling="roi", average=True)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduce", ["flatten", "mean"])
def test_interpolated_segments_are_pooled_like_rectangles(reduce):
  masks, _, boxes = _cases()
  pooled = np.stack(
    [
      pk.tps_pool(FEATURES[b], masks[b], np.int32(boxes[b]), output_size=(2, 2))
      for b in range(2)
    ]
  )
  expected = pooled.reshape(2, tiny.P, -1)
  if reduce == "mean":
    expected = pooled.mean((2, 3))
  found = _apply(pooling="tps", reduce=reduce)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_roi_align_of_a_constant_map():
  module = ProposalFeatures(
    stride=tiny.STRIDE, output_size=(2, 2), pooling="roi_align"
  )
  found = module.apply({}, jnp.full((2, *GRID, 3), 7.0), BATCH)
  np.testing.assert_allclose(found, np.full((2, tiny.P, 12), 7.0), rtol=1e-6)


@pytest.mark.parametrize("ratio", [2, None])
def test_roi_align_takes_as_many_points_as_it_is_told(ratio):
  module = ProposalFeatures(
    stride=tiny.STRIDE,
    output_size=(2, 2),
    pooling="roi_align",
    sampling_ratio=ratio,
  )
  found = module.apply({}, FEATURES, BATCH)
  boxes = np.asarray(BATCH.boxes).copy()
  wanted = [
    pk.roi_align(
      FEATURES[b],
      boxes[b],
      stride=tiny.STRIDE,
      output_size=(2, 2),
      sampling_ratio=ratio,
    )
    for b in range(2)
  ]
  wanted = np.stack(wanted).reshape(found.shape)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_centring_subtracts_and_divides_before_the_size():
  plain = np.asarray(_apply(average=True))
  rng = np.random.default_rng(6)
  mean = [rng.normal(size=n).astype(np.float32) for n in (12, 3)]
  variables = {
    "constants": {
      "mean_0": mean[0],
      "scale_0": np.float32(2),
      "mean_1": mean[1],
      "scale_1": np.float32(0.5),
    }
  }
  found = _apply(
    variables, average=True, center=True, size_exponents=(1.0, 0.0)
  )
  expected = np.concatenate(
    [
      (plain[..., :12] - mean[0]) / 2 * _share()[..., None],
      (plain[..., 12:] - mean[1]) / 0.5,
    ],
    -1,
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{"pooling": "max"}, {"reduce": "sum"}])
def test_unknown_options_are_named(option):
  [(name, value)] = option.items()
  with pytest.raises(ValueError, match=f"{name} is '{value}'"):
    jax.eval_shape(lambda: _apply(**option))


def test_a_part_without_an_exponent_is_not_dropped():
  with pytest.raises(ValueError, match="zip"):
    jax.eval_shape(lambda: _apply(average=True, size_exponents=(0.25,)))


def test_areas_and_shares_leave_padding_out():
  found = superpixel_areas(jnp.array(BATCH.superpixels[0]), tiny.S)
  counts = [(BATCH.superpixels[0] == s).sum() for s in range(tiny.S)]
  np.testing.assert_array_equal(found, counts)
  share = jax.vmap(area_share)(BATCH.superpixels, BATCH.membership)
  np.testing.assert_allclose(share, _share(), rtol=1e-6)
  nothing = area_share(np.full((4, 4), -1), np.ones((2, 3), bool))
  assert nothing.tolist() == [0, 0]
