"""Cells against a general solver and a loop over pixels."""

import jax
import numpy as np
import pytest
import scipy.optimize

from jtsm_jax.mining import cells
from tests import tiny


def images(seed, *, grid=(2, 4), num_classes=4, batch_size=1):
  """Logits, tags and cells inside; the last column lies outside."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (batch_size, *grid, num_classes))
  tags = np.ones((batch_size, num_classes), np.float32)
  tags[:, 2] = 0
  inside = np.ones((batch_size, *grid), bool)
  inside[:, :, -1] = False
  return logits.astype(np.float32), tags, inside


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_distribution_with_the_least_shares(seed):
  """Minimises sum q log(q / p) under the constraints, with SLSQP."""
  logits, tags, inside = images(seed)
  shares = np.array([0.3, 0.2, 0.9, 0.25], np.float32)
  found = cells.assign_cells(logits, tags, inside, shares)[0]
  classes = [0, 1, 3]
  p = np.asarray(jax.nn.softmax(logits[0][inside[0]]), np.float64)
  count = len(p)

  def divergence(q):
    q = np.maximum(q.reshape(p.shape), 1e-12)
    return (q * np.log(q / p)).sum()

  solved = scipy.optimize.minimize(
    divergence,
    np.full(p.size, 1 / 4),
    bounds=[(0, 1)] * p.size,
    method="SLSQP",
    options={"maxiter": 2000, "ftol": 1e-12},
    constraints=[
      {"type": "eq", "fun": lambda q: q.reshape(p.shape).sum(1) - 1},
      {
        "type": "ineq",
        "fun": lambda q: (q.reshape(p.shape).mean(0) - shares)[classes],
      },
    ],
  )
  assert solved.success, solved.message
  np.testing.assert_allclose(
    found[inside[0]][:, classes],
    solved.x.reshape(count, 4)[:, classes],
    atol=0.02,
  )
  assert np.all(
    np.asarray(found)[inside[0]].mean(0)[classes] >= shares[classes] - 0.01
  )


def test_enough_is_left_as_it_is():
  logits, tags, inside = images(5, batch_size=2)
  found = cells.assign_cells(logits, tags, inside, np.zeros(4, np.float32))
  maps = cells.class_maps(logits, inside)
  np.testing.assert_allclose(found, maps * tags[:, None, None], atol=1e-6)


def test_tagged_classes_are_preferred():
  # The odds of a class without a tag are divided by e^2.
  logits, tags, inside = images(9, batch_size=2)
  tags[1] = [0, 1, 0, 0]
  preferred = cells.prefer_tags(logits, tags, 2.0)
  odds = np.exp(logits) * np.where(tags > 0, 1, np.exp(-2))[:, None, None]
  wanted = odds / odds.sum(-1, keepdims=True) * inside[..., None]
  np.testing.assert_allclose(
    cells.class_maps(preferred, inside), wanted, rtol=1e-4
  )


def test_one_tag_is_not_all_of_its_image():
  logits, tags, inside = images(10)
  tags[0] = [1, 0, 0, 0]
  logits[0, :, :2] = [6, 0, 0, 0]
  logits[0, :, 2] = [0, 6, 0, 0]
  preferred = cells.prefer_tags(logits, tags, 2.0)
  found = cells.assign_cells(preferred, tags, inside, np.full(4, 0.2))
  assert np.all(np.asarray(found)[0, :, :2, 0] > 0.99)
  assert np.all(np.asarray(found)[0, :, 2] < 0.02)


def test_nothing_outside_without_tags_and_of_other_classes():
  logits, tags, inside = images(6, batch_size=2)
  tags[1] = 0
  found = np.asarray(
    cells.assign_cells(logits, tags, inside, np.full(4, 0.2, np.float32))
  )
  assert not found[1].any()
  assert not found[0][~inside[0]].any()
  assert not found[0][..., 2].any()
  sums = found[0][inside[0]].sum(-1)
  assert ((sums > 0) & (sums < 1)).all()  # the rest is the other class's


def test_shares_that_cannot_be_are_shrunk():
  logits, tags, inside = images(7)
  logits[..., 0] += 20  # would take all
  logits[..., 2] -= 40
  found = cells.assign_cells(logits, tags, inside, np.full(4, 0.6, np.float32))
  shares = np.asarray(found)[0][inside[0]].mean(0)
  np.testing.assert_allclose(shares, [0.4, 0.3, 0, 0.3], atol=0.01)


def test_maps_of_all_classes():
  logits, _, inside = images(8)
  maps = np.asarray(cells.class_maps(logits, inside))
  np.testing.assert_allclose(maps.sum(-1), inside, rtol=1e-5)
  wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(maps[inside], wanted[inside], rtol=1e-5)


def test_presence_is_the_fourth_power_mean_inside():
  maps = np.ones((2, 2, 3, 2), np.float32)
  inside = np.zeros((2, 2, 3), bool)
  inside[0, :, :2] = True
  maps[0, :, :2] = [[[0.5, 0.1], [0.5, 0.0]], [[0.5, 0.0], [0.5, 0.8]]]
  found = cells.map_presence(maps, inside)
  wanted = ((0.1**4 + 0.8**4) / 4) ** 0.25
  np.testing.assert_allclose(found[0], [0.5, wanted], rtol=1e-5)
  np.testing.assert_array_equal(found[1], 0)  # no cell lies in the image


@pytest.mark.parametrize("image", [tiny.IMAGE, (37, 45)])
def test_overlap_is_the_soft_iou_pixel_by_pixel(image):
  # The sides of the second image end within a cell.
  batch = tiny.make_batch(2, seed=3, image=image)
  grid = tuple(side // tiny.STRIDE for side in tiny.CANVAS)
  rng = np.random.default_rng(4)
  maps = rng.uniform(size=(2, *grid, tiny.K)).astype(np.float32)
  found = cells.map_overlap(maps, batch)
  assert found.shape == (2, tiny.P, tiny.K)
  masks = np.asarray(tiny.proposal_masks(batch))
  for b in range(2):
    pixels = maps[b].repeat(tiny.STRIDE, 0).repeat(tiny.STRIDE, 1)
    pixels = pixels[: image[0], : image[1]]
    for p in range(tiny.P):
      mask = masks[b, p, : image[0], : image[1]]
      for k in range(tiny.K):
        intersection = pixels[mask, k].sum()
        union = mask.sum() + pixels[..., k].sum() - intersection
        np.testing.assert_allclose(
          found[b, p, k], intersection / union, rtol=1e-4
        )
