"""Tests of the table and the plot of the quality of proposals."""

from __future__ import annotations

import cv2
import numpy as np

from jtsm_jax.proposals import quality
from jtsm_jax.reporting import proposal_quality

SUMMARY = quality.summary(
  quality.BestIou(
    iou=np.linspace(0.1, 0.9, 20).reshape(4, 5),
    category=np.array([0, 0, 1, 2]),
    is_thing=np.array([True, True, True, False]),
    area=np.array([100, 5000, 20_000, 30_000]),
  )
)


def test_table_has_every_measure_of_every_group():
  text = proposal_quality.table(SUMMARY, quality.COUNTS)
  lines = text.splitlines()
  assert lines[0].split()[1:] == ["100", "500", "1000", "2000", "4000"]
  assert sum("J_i" in line for line in lines[1:7]) == 1
  start = next(n for n, x in enumerate(lines) if x.startswith("stuff (1)"))
  values = [float(v) for v in lines[start].split()[3:]]
  np.testing.assert_allclose(values, SUMMARY["stuff"]["J_i"], atol=5e-4)
  for method in ("MCG", "SCG", "Selective Search"):
    assert sum(method in line for line in lines) == 2


def test_plot_is_a_picture(tmp_path):
  for name, summary in (
    ("all", SUMMARY),
    ("things", {"things": SUMMARY["things"]}),
  ):
    path = tmp_path / "new" / f"{name}.png"
    proposal_quality.plot(summary, quality.COUNTS, path)
    picture = cv2.imread(str(path))
    assert picture.shape[1] > 1000
    assert (picture < 100).any(2).sum() > 1000  # lines and letters
