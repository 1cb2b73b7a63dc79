"""The cell loss against a loop."""

import jax
import numpy as np

from jtsm_jax.losses.cells import cell_loss


def example(seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
  targets = rng.dirichlet(np.ones(4), (3, 2, 3)).astype(np.float32)
  targets[0, :, 2] = 0  # outside
  targets[1] = 0  # no tags
  return logits, targets


def test_mean_over_the_cells_of_each_image():
  logits, targets = example()
  total = 0
  for b in (0, 2):
    terms = []
    for y in range(2):
      for x in range(3):
        if targets[b, y, x].sum():
          p = np.exp(logits[b, y, x]) / np.exp(logits[b, y, x]).sum()
          terms.append(-(targets[b, y, x] * np.log(p)).sum())
    total += np.mean(terms)
  found = cell_loss(logits, targets)
  np.testing.assert_allclose(found, total / 2, rtol=1e-5)


def test_parts_sum_up_to_the_whole():
  logits, targets = example()
  parts = sum(
    cell_loss(logits[i : i + 1], targets[i : i + 1], count=2) for i in range(3)
  )
  np.testing.assert_allclose(parts, cell_loss(logits, targets), rtol=1e-6)


def test_nothing_to_learn_from():
  logits, targets = example()
  assert cell_loss(logits, np.zeros_like(targets)) == 0


def test_the_targets_have_no_gradient():
  logits, targets = example()
  assert not jax.grad(cell_loss, 1)(logits, targets).any()
