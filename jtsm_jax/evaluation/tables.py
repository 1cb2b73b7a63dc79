"""The results of an evaluation as tables for the console, or for a paper."""

from __future__ import annotations

from typing import Any

from jtsm_jax.evaluation import panoptic_quality

MAIN_MEASURE = {"panoptic": "pq", "instance": "map50", "detection": "map"}
"""The first of `main_measures`, by task."""

_COCO = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def final_table(
  result: dict[str, Any], corloc: dict[str, Any] | None = None
) -> str:
  """All that an evaluation found, class by class, in percent.

  A dash stands where there was nothing to measure.

  Args:
    result: of `evaluate.evaluate`; what has no "voc" is CorLoc alone.
    corloc: of `evaluate.localisation`.
  """
  if "voc" not in result:
    rows = {"Mean": _known([corloc["corloc"]], corloc["n"])}
    for name, values in corloc["per_class"].items():
      rows[name] = _known([values["corloc"]], values["images"])
    return _table(["CorLoc", "images"], rows)
  voc, coco = result["voc"], result["coco"]
  parts = []
  if result["task"] == "panoptic":
    parts.append(panoptic_quality.format_table(result))
    semantic = result["semantic"]
    parts.append(f"mIoU {_percent(semantic['miou'], semantic['n'])}")
  elif result["task"] == "instance":
    keys = [k for k in voc if k.startswith("map")]
    rows = {"Mean": _known([voc[k] for k in keys], voc["n"])}
    for name, values in voc["per_class"].items():
      numbers = [values[k.removeprefix("m")] for k in keys]
      rows[name] = _known(numbers, values["objects"])
    headings = [f"AP@{k.removeprefix('map')}" for k in keys]
    parts.append(_table([*headings, "objects"], rows))
  else:
    headings = ["AP", "objects"]
    rows = {"Mean": _known([voc["map"]], voc["n"])}
    for name, values in voc["per_class"].items():
      rows[name] = _known([values["ap"]], values["objects"])
    if corloc is not None:
      headings.append("CorLoc")
      rows["Mean"] += _known([corloc["corloc"]], corloc["n"])[:1]
      for name, values in corloc["per_class"].items():
        rows[name] += _known([values["corloc"]], values["images"])[:1]
    parts.append(_table(headings, rows))
  if result["task"] == "panoptic":
    thresholds = [k for k in voc if k.startswith("map")]
    values = (
      f"AP@{k.removeprefix('map')} {_percent(voc[k], voc['n'])}"
      for k in thresholds
    )
    parts.append("masks of things, VOC: " + "  ".join(values))
  kind = "boxes" if result["task"] == "detection" else "masks of things"
  found = []
  for key in _COCO:
    name = key.removeprefix("ap").replace("_", " ")
    objects = coco["objects"].get(name.strip(), coco["objects"]["all"])
    found.append(f"AP{name} {_percent(coco[key], objects)}")
  parts.append(f"{kind}, COCO: {'  '.join(found)}")
  return "\n".join(parts)


def main_measures(result: dict[str, Any]) -> dict[str, float]:
  """What is worth a curve over a training; the first decides the best one."""
  voc, coco = result["voc"], result["coco"]
  shared = {"corloc": result["localisation"]["corloc"]}
  if result["task"] == "panoptic":
    return {
      "pq": result["all"]["pq"],
      "pq_things": result["things"]["pq"],
      "pq_stuff": result["stuff"]["pq"],
      "miou": result["semantic"]["miou"],
      "map50": voc["map50"],
      **shared,
    }
  if result["task"] == "instance":
    measures = {"map50": voc["map50"], "map75": voc["map75"], "ap": coco["ap"]}
    return measures | shared
  return {"map": voc["map"], "ap": coco["ap"], **shared}


def _percent(value: float, count: int) -> str:
  return f"{value:.1f}" if count else "-"


def _known(numbers: list[float], count: int) -> list[float | int | None]:
  """The numbers and the count; without anything counted there are none."""
  return [*(numbers if count else [None] * len(numbers)), count]


def _table(headings: list[str], rows: dict[str, list]) -> str:
  width = max(8, *map(len, rows))
  rule = "-" * (width + 9 * len(headings))
  lines = [f"{'':<{width}}" + "".join(f"{h:>9}" for h in headings), rule]
  for n, (name, values) in enumerate(rows.items()):
    cells = map(_cell, values)
    lines.append(f"{name:<{width}}" + "".join(cells))
    if n == 0:
      lines.append(rule)
  return "\n".join(lines)


def _cell(value: float | int | None) -> str:
  if value is None:
    return f"{'-':>9}"
  return f"{value:9.1f}" if isinstance(value, float) else f"{value:9d}"
