"""The quality of proposals as a table and as a plot, beside published ones."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jtsm_jax.proposals.quality import RECALL_AT

PUBLISHED = {
  "VOC 2012 val, things": {
    "MCG": ((100, 0.638), (500, 0.726), (1000, 0.757), (1937, 0.781),
            (4061, 0.802)),
    "SCG": ((100, 0.608), (500, 0.701), (977, 0.728), (2015, 0.753)),
    "Selective Search": ((8640, 0.779),),
  },
  "COCO 2014 val, things": {
    "MCG": ((1000, 0.528), (1963, 0.561), (5354, 0.600)),
    "SCG": ((975, 0.496), (2111, 0.534)),
    "Selective Search": ((12838, 0.630),),
  },
}  # fmt: skip
"""(proposals, J_i) from the data files of Pont-Tuset et al. (2017)."""

_COLOURS = ("#0f766e", "#b45309", "#6d28d9")


def table(
  summary: Mapping[str, Mapping[str, Any]], counts: Sequence[int]
) -> str:
  """Lines of text: each group's measures at each number of proposals.

  Args:
    summary: from `quality.summary`.
    counts: numbers of proposals, those of the lists in `summary`.
  """
  measures = ("J_i", "J_c", "AR", *(f"R@{t}" for t in RECALL_AT))
  heads = "".join(f"{n:>8}" for n in counts)
  lines = [f"{'segments':<22}{'':<7}{heads}"]
  for group, row in summary.items():
    name = f"{group} ({row['segments']})"
    for measure in measures:
      values = "".join(f"{v:8.3f}" for v in row[measure])
      lines.append(f"{name:<22}{measure:<7}{values}")
      name = ""
  lines.append("published, of other images:")
  for images, methods in PUBLISHED.items():
    for method, points in methods.items():
      values = ", ".join(f"{j:.3f} @{n}" for n, j in points)
      lines.append(f"  {images}, {method}: J_i {values}")
  return "\n".join(lines)


def plot(
  summary: Mapping[str, Mapping[str, Any]],
  counts: Sequence[int],
  path: pathlib.Path,
) -> None:
  """Writes J_i and recall over the number of proposals as a PNG file.

  Args:
    summary, counts: as for `table`.
    path: of the file.
  """
  figure = Figure(figsize=(11, 4.4), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  groups = [g for g in ("things", "stuff") if g in summary]
  for group, colour in zip(groups, _COLOURS, strict=False):
    left.plot(
      counts,
      summary[group]["J_i"],
      color=colour,
      marker="o",
      linewidth=2.2,
      label=f"{group}, these images",
    )
  for images, style in zip(PUBLISHED, ("--", ":"), strict=True):
    for method, grey in (("MCG", "0.35"), ("SCG", "0.65")):
      numbers, values = zip(*PUBLISHED[images][method], strict=True)
      left.plot(numbers, values, style, color=grey, label=f"{images}: {method}")
  left.set_ylabel("$J_i$, mean best IoU")
  for group, colour in zip(groups, _COLOURS, strict=False):
    for threshold, style in zip(RECALL_AT, ("-", "--", ":"), strict=True):
      right.plot(
        counts,
        summary[group][f"R@{threshold}"],
        style,
        color=colour,
        label=f"{group}, IoU ≥ {threshold}",
      )
  right.set_ylabel("recall")
  for axes in (left, right):
    axes.set(xscale="log", ylim=(0, 1), xlabel="proposals")
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.legend(fontsize=7.5, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)
