"""The cell head against numpy."""

import jax
import numpy as np

from jtsm_jax.models.cell_head import CellHead


def make(**options):
  head = CellHead(num_classes=3, **options)
  features = np.random.default_rng(0).normal(size=(2, 4, 5, 6))
  features = features.astype(np.float32)
  variables = head.init(jax.random.key(0), features)
  return head, variables, features


def test_linear_with_a_gain():
  head, variables, features = make(gain=7.0)
  params = variables["params"]["classify"]
  wanted = 7 * (features @ np.asarray(params["kernel"]) + params["bias"])
  found = head.apply(variables, features)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_it_begins_from_small_differences():
  _, variables, _ = make()
  kernel = np.asarray(variables["params"]["classify"]["kernel"])
  assert 0 < np.abs(kernel).max() < 0.01


def test_dropout_is_each_images_own():
  head, variables, features = make(dropout=0.5)
  keys = jax.random.split(jax.random.key(1), 2)
  found = head.apply(variables, features, keys=keys)
  alone = head.apply(variables, features[1:], keys=keys[1:])
  np.testing.assert_allclose(found[1:], alone, rtol=1e-5)
  assert not np.allclose(found, head.apply(variables, features))
