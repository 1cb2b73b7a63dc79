"""A run as one HTML page: curves, figures, and its images stage by stage.

The page works from a file, without network and without a server: everything but
the pictures is inside it. `gallery.html` beside this file is the template, with
its style and its program; this module fills in the data.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from jtsm_jax.reporting.visualize import class_colours, score_ramp
from jtsm_jax.types import Categories, InputError

MAX_POINTS = 400
"""Of a curve; more could not be told apart."""

_RAMP_STEPS = 9


@dataclasses.dataclass(frozen=True)
class Picture:
  """One stage of an image.

  Attributes:
    file: path of the picture, relative to the page.
    caption: what it shows, in a few words.
    alt: what is to be seen, for those who do not see it.
  """

  file: str
  caption: str
  alt: str


@dataclasses.dataclass(frozen=True)
class Group:
  """Pictures that belong together: the result, or what is known of a class.

  Attributes:
    title: the heading.
    pictures: in the order in which they are to be looked at.
    category: class index, or None where it is of no class.
    note: a sentence, or "".
  """

  title: str
  pictures: list[Picture]
  category: int | None = None
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Image:
  """One image of the gallery.

  Attributes:
    id: of the image.
    width, height: pixels.
    cover: two small pictures for the overview, relative to the page.
    groups: all pictures.
    tags: class indices.
    facts: rows of a heading and the class indices it holds, each with a number
      of segments.
    classes: class indices by which the image can be found.
    pq: of this image alone, in percent, or None where it cannot be told.
  """

  id: str
  width: int
  height: int
  cover: list[str]
  groups: list[Group]
  tags: list[int]
  facts: list[tuple[str, list[tuple[int, int]]]]
  classes: list[int]
  pq: float | None = None


@dataclasses.dataclass(frozen=True)
class Section:
  """Images of one kind.

  Attributes:
    key: short name, of letters.
    title: the heading.
    note: what is shown, and how many of how many.
    images: the images.
  """

  key: str
  title: str
  note: str
  images: list[Image]


def write_page(
  path: pathlib.Path,
  *,
  title: str,
  summary: list[tuple[str, str]],
  categories: Categories,
  metrics: dict[str, Any] | None,
  curves: list[dict[str, Any]],
  sections: list[Section],
  settings: dict[str, Any],
) -> None:
  """Writes the page.

  Args:
    path: the HTML file; pictures are looked for from its folder.
    title: of the page.
    summary: names and values, said first.
    categories: the classes that everything refers to by index.
    metrics: `evaluation/metrics.json`, or None where nothing was compared.
    curves: from `read_curves`.
    sections: the images.
    settings: `config.json`, with those of the evaluation that is shown.
  """
  colours = class_colours(categories)
  content = {
    "title": title,
    "summary": summary,
    "classes": [
      {"name": c.name, "isThing": c.is_thing, "colour": _hex(colour)}
      for c, colour in zip(categories.items, colours, strict=True)
    ],
    "ramp": [_hex(colour) for colour in score_ramp(_RAMP_STEPS)],
    "metrics": metrics,
    "curves": curves,
    "sections": [dataclasses.asdict(section) for section in sections],
    "settings": settings,
  }
  values = {"TITLE": html.escape(title), "DATA": script_json(content)}
  template = pathlib.Path(__file__).with_name("gallery.html").read_text("utf-8")
  # In one pass: what is filled in is not looked through again.
  page = re.sub(r"@@(TITLE|DATA)@@", lambda m: values[m.group(1)], template)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding="utf-8")


def script_json(content: Any) -> str:
  """JSON that can stand inside <script>, whatever the strings in it are.

  Numbers that are not finite become null, since JSON has none.
  """
  text = json.dumps(_finite(content), allow_nan=False, ensure_ascii=True)
  # Inside a JSON text these stand in strings alone.
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def read_curves(path: pathlib.Path) -> list[dict[str, Any]]:
  """The series of a metrics.jsonl.

  Args:
    path: the file; an absent one has no series.

  Returns:
    {"name": str, "points": [[step, value or None], ...], "logged": the number
    of lines that have it} for each name, in the order of the file. Of more than
    `MAX_POINTS` lines some are taken, evenly, the first and the last among
    them.

  Raises:
    InputError: a line is no metrics line.
  """
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8")
  series: dict[str, list] = {}
  # What stands behind the last newline is being written, or was cut off.
  for number, line in enumerate(text.split("\n")[:-1], start=1):
    try:
      values = json.loads(line)
      step = int(values["step"])
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(
        f"{path} line {number} is no metrics line: {line[:80]!r}."
        ' Wanted {"step": ..., ...}. Mend or remove the line'
      ) from error
    for name, value in values.items():
      if name not in ("step", "time"):
        series.setdefault(name, []).append([step, value])
  return [
    {
      "name": name,
      "points": [points[i] for i in spread(len(points), MAX_POINTS)],
      "logged": len(points),
    }
    for name, points in series.items()
  ]


def spread(count: int, limit: int) -> list[int]:
  """At most `limit` of the positions 0 .. count - 1, evenly, with both ends."""
  chosen = np.linspace(0, count - 1, max(min(count, limit), 0)).round()
  return chosen.astype(int).tolist()


def choose(pq: list[float | None], limit: int) -> list[int]:
  """Which images to show: half of them the worst, half from all the others.

  Args:
    pq: of each image; None where it cannot be told, which counts as best.
    limit: how many.

  Returns:
    Positions, ascending.
  """
  order = sorted(
    range(len(pq)), key=lambda i: math.inf if pq[i] is None else pq[i]
  )
  if all(value is None for value in pq):
    return spread(len(pq), limit)
  worst = max(limit - limit // 2, 0)
  rest = order[worst:]
  others = [rest[i] for i in spread(len(rest), limit - worst)]
  return sorted(order[:worst] + others)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _hex(colour: np.ndarray) -> str:
  return "#" + "".join(f"{int(c):02x}" for c in colour)
