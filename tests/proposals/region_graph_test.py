"""Tests of the region graph."""

from __future__ import annotations

import numpy as np

from jtsm_jax.proposals.cues import compute_cues
from jtsm_jax.proposals.region_graph import build_region_graph
from jtsm_jax.proposals.superpixels import make_superpixels


def small_image():
  rng = np.random.default_rng(3)
  image = np.full((48, 64, 3), (90, 120, 60), np.float64)
  image[10:30, 12:40] = (200, 60, 60)
  image[34:, 44:] = (40, 60, 190)
  image += rng.normal(0, 8, image.shape)
  return np.clip(image, 0, 255).astype(np.uint8)


def test_region_graph_statistics():
  cues = compute_cues(small_image())
  superpixels = make_superpixels(cues, 30)
  graph = build_region_graph(superpixels, cues)
  for s in (0, 13, 29):
    mask = superpixels == s
    assert graph.sizes[s] == mask.sum()
    np.testing.assert_allclose(graph.lab[s], cues.lab[mask].mean(0), rtol=1e-4)
    histogram = np.bincount(cues.textons[mask], minlength=20) / mask.sum()
    np.testing.assert_allclose(graph.texton_mix[s] ** 2, histogram)
    rows, columns = np.nonzero(mask)
    box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    np.testing.assert_array_equal(graph.boxes[s], box)
  crossings = (superpixels[1:] != superpixels[:-1]).sum() + (
    superpixels[:, 1:] != superpixels[:, :-1]
  ).sum()
  assert graph.length.sum() == crossings
