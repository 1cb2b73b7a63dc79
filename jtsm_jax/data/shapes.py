"""The embedded data set: drawn pictures, made from a seed in seconds.

Eight classes of things, each one a shape with a texture, lie on one to three of
four textured kinds of ground. Colours are drawn anew for every object and say
nothing about the class; each texture belongs to two shapes, so neither does
the texture alone. Light, shadows, blur and noise are those of a photograph.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from jtsm_jax.data.source import LazyRecords, Source
from jtsm_jax.types import (
  Categories,
  Category,
  PanopticMap,
  Record,
  Segment,
)

_THINGS = (
  ("striped disc", "disc", "stripes"),
  ("striped star", "star", "stripes"),
  ("checked square", "square", "checks"),
  ("checked heart", "heart", "checks"),
  ("dotted triangle", "triangle", "dots"),
  ("dotted ring", "ring", "dots"),
  ("shaded cross", "cross", "gradient"),
  ("shaded moon", "moon", "gradient"),
)
_STUFF = ("waves", "bricks", "gravel", "clouds")

SHAPES_CATEGORIES = Categories(
  tuple(
    Category(i, name, is_thing)
    for i, (name, is_thing) in enumerate(
      [(t[0], True) for t in _THINGS] + [(s, False) for s in _STUFF], start=1
    )
  )
)
"""Eight things, then four kinds of stuff; ids 1 .. 12."""

_SPLITS = {"train": 0, "val": 1}
_FINE = 2  # Everything is drawn at twice the size and averaged.
_MIN_PIXELS = 40  # of a segment, so that tags and masks agree.
_MIN_STUFF = 0.03  # of the image, for the same reason.
_MIN_VISIBLE = 0.5  # of a thing that others may cover.


def shapes_source(
  *,
  seed: int = 0,
  side: int = 160,
  num_train: int = 500,
  num_val: int = 120,
) -> Source:
  """The data set for `prepare`: JPEG images, targets in "val" only.

  Args:
    seed: of all pictures.
    side: height and width, pixels.
    num_train: training images.
    num_val: validation images.
  """

  def records(split: str, count: int) -> LazyRecords:
    return LazyRecords(count, lambda i: _record(split, i, seed, side))

  splits = {"train": records("train", num_train)}
  if num_val:
    splits["val"] = records("val", num_val)
  return Source(name="shapes", categories=SHAPES_CATEGORIES, splits=splits)


def _record(split: str, index: int, seed: int, side: int) -> Record:
  image, target, tags = generate_shapes(
    index, seed=seed, side=side, split=split
  )
  data = io.BytesIO()
  Image.fromarray(image).save(data, format="JPEG", quality=90)
  return Record(
    image_id=f"{split}_{index:05d}",
    image=data.getvalue(),
    height=side,
    width=side,
    tags=tags,
    target=target if split == "val" else None,
    file_name=f"{split}_{index:05d}.jpg",
  )


def generate_shapes(
  index: int, *, seed: int, side: int = 160, split: str = "train"
) -> tuple[np.ndarray, PanopticMap, tuple[int, ...]]:
  """Draws one picture, a pure function of its arguments.

  Args:
    index: >= 0, of the picture in its split.
    seed: >= 0, of the data set.
    side: height and width, pixels; at least 64.
    split: "train" or "val", which share no stream of random numbers.

  Returns:
    (image [side, side, 3] uint8 RGB; its panoptic map, without void; the
    classes in it, ascending). Every segment has at least 40 pixels.

  Raises:
    ValueError: side < 64, or the split is unknown.
  """
  if side < 64:
    raise ValueError(f"side is {side}, must be at least 64 pixels")
  if split not in _SPLITS:
    raise ValueError(f"split is {split!r}, must be one of {sorted(_SPLITS)}")
  rng = np.random.default_rng((seed, _SPLITS[split], index))
  while True:
    drawing = _draw(rng, side)
    if drawing is not None:
      break
  image, ids, categories = drawing
  segments = tuple(
    Segment(
      id=i,
      category=category,
      is_thing=category < len(_THINGS),
      score=1.0,
      area=int((ids == i).sum()),
    )
    for i, category in enumerate(categories, start=1)
  )
  tags = tuple(sorted(set(categories)))
  return image, PanopticMap(ids, segments), tags


def _draw(
  rng: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray, list[int]] | None:
  """(image, ids, class of each id from 1); None if a segment is too small."""
  fine = side * _FINE
  kinds = rng.permutation(len(_STUFF))[: rng.integers(1, 4)]
  ids = _regions(rng, fine, len(kinds)) + 1
  image = np.zeros((fine, fine, 3), np.float32)
  for i, kind in enumerate(kinds, start=1):
    image[ids == i] = _paint_stuff(rng, fine, _STUFF[kind])[ids == i]
  categories = [len(_THINGS) + int(k) for k in kinds]

  full_areas = {}
  for _ in range(rng.integers(1, 6)):
    category = int(rng.integers(len(_THINGS)))
    for _ in range(30):  # Places that hide too much of a thing are given up.
      thing = _place_thing(rng, fine, category)
      after = np.where(thing[0], len(categories) + 1, ids)
      if all(
        (after == i).sum() >= _MIN_VISIBLE * area
        for i, area in full_areas.items()
      ):
        break
    else:
      continue
    image = _paint_thing(rng, image, *thing, _THINGS[category][2])
    ids = after
    categories.append(category)
    full_areas[len(categories)] = int(thing[0].sum())

  ids = ids[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE].astype(np.int32)
  areas = np.bincount(ids.ravel(), minlength=len(categories) + 1)[1:]
  stuff = areas[: len(kinds)]
  if areas.min() < _MIN_PIXELS or stuff.min() < _MIN_STUFF * side * side:
    return None
  return _photograph(rng, image, side), ids, categories


def _photograph(
  rng: np.random.Generator, image: np.ndarray, side: int
) -> np.ndarray:
  """Uneven light, blur and noise; [fine, fine, 3] float to [side, side, 3]."""
  _, x = _rotated(rng, len(image))
  light = 1 + rng.uniform(0.05, 0.3) * x / len(image)
  light += 0.08 * _noise(rng, len(image), 0.5)
  image = cv2.GaussianBlur(
    image * light[..., None], (0, 0), rng.uniform(0.5, 1.1) * _FINE / 2
  )
  image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
  grain = rng.normal(0, rng.uniform(0.01, 0.03), image.shape)
  return np.rint(255 * np.clip(image + grain, 0, 1)).astype(np.uint8)


# Geometry. Coordinates are pixels of the fine drawing.


def _rotated(
  rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Centred coordinates [size, size], turned by a random angle."""
  y, x = np.mgrid[:size, :size].astype(np.float32) - (size - 1) / 2
  angle = rng.uniform(0, 2 * np.pi)
  c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
  return c * y - s * x, s * y + c * x


def _noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
  """Smooth noise [size, size], standard deviation about 1.

  `scale` is the distance of its knots as a fraction of the size.
  """
  knots = rng.normal(size=(2 * (round(1 / scale) + 2),) * 2).astype(np.float32)
  spacing = max(round(size * scale), 1)
  field = cv2.resize(
    knots, None, fx=spacing, fy=spacing, interpolation=cv2.INTER_CUBIC
  )
  return field[spacing : spacing + size, spacing : spacing + size]


def _regions(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
  """Cuts the square into `count` parts of irregular outline, [size, size]."""
  y, x = np.mgrid[:size, :size].astype(np.float32)
  for scale, amount in ((0.3, 0.07), (0.08, 0.012)):
    y = y + amount * size * _noise(rng, size, scale)
    x = x + amount * size * _noise(rng, size, scale)
  angles = rng.uniform(0, 2 * np.pi) + np.arange(count) * 2 * np.pi / count
  radii = rng.uniform(0.2, 0.5, count) * size
  distances = [
    (y - size / 2 - r * np.sin(a)) ** 2 + (x - size / 2 - r * np.cos(a)) ** 2
    for a, r in zip(angles, radii, strict=True)
  ]
  return np.argmin(distances, 0)


def _place_thing(
  rng: np.random.Generator, size: int, category: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
  """(mask, y, x, radius): y and x run along the thing's own axes."""
  radius = size * rng.uniform(0.09, 0.28)
  y, x = _rotated(rng, 2 * size)
  top, left = (rng.uniform(0.1, 0.9, 2) * size).astype(int)
  window = np.s_[size - top : 2 * size - top, size - left : 2 * size - left]
  y, x = y[window], x[window]
  mask = _SHAPES[_THINGS[category][1]](y / radius, x / radius)
  return mask, y, x, radius


def _triangle(y: np.ndarray, x: np.ndarray) -> np.ndarray:
  sides = [
    y * np.sin(a) + x * np.cos(a) for a in np.array([1, 5, 9]) * np.pi / 6
  ]
  return np.max(sides, 0) < 0.56


def _star(y: np.ndarray, x: np.ndarray) -> np.ndarray:
  # Five spikes: the edge runs straight from radius 1.1 to radius 0.48.
  sector = np.pi / 5
  angle = np.abs((np.arctan2(y, x) + sector) % (2 * sector) - sector)
  outer = np.array([1.1, 0.0])
  inner = 0.48 * np.array([np.cos(sector), np.sin(sector)])
  normal = np.array([inner[1], outer[0] - inner[0]])
  along = normal[0] * np.cos(angle) + normal[1] * np.sin(angle)
  return np.hypot(y, x) * along < normal @ outer


def _moon(y: np.ndarray, x: np.ndarray) -> np.ndarray:
  return (np.hypot(y, x) < 1.05) & (np.hypot(y, x - 0.55) > 0.75)


def _heart(y: np.ndarray, x: np.ndarray) -> np.ndarray:
  y, x = 1.15 * -y + 0.1, 1.15 * x
  return (x**2 + y**2 - 0.75) ** 3 < 1.6 * x**2 * y**3


# Each takes coordinates in units of the radius; areas are about alike.
_SHAPES = {
  "disc": lambda y, x: np.hypot(y, x) < 0.9,
  "square": lambda y, x: np.maximum(abs(y), abs(x)) < 0.8,
  "triangle": _triangle,
  "star": _star,
  "ring": lambda y, x: (np.hypot(y, x) < 1) & (np.hypot(y, x) > 0.45),
  "cross": lambda y, x: (
    (np.maximum(abs(y), abs(x)) < 0.95) & (np.minimum(abs(y), abs(x)) < 0.33)
  ),
  "heart": _heart,
  "moon": _moon,
}


# Paint. A texture mixes two colours; 0 is the first, 1 the second.


def _colours(
  rng: np.random.Generator,
  saturation: tuple[float, float],
  contrast: float,
) -> np.ndarray:
  """Two RGB colours [2, 3] whose brightness differs by `contrast`."""
  hues = rng.uniform(0, 360) + rng.uniform(-60, 60, 2) * np.array([0, 1])
  dark = rng.uniform(0.25, 0.95 - contrast)
  hsv = np.stack(
    [hues % 360, rng.uniform(*saturation, 2), [dark, dark + contrast]], -1
  ).astype(np.float32)
  return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def _mix(colours: np.ndarray, amount: np.ndarray) -> np.ndarray:
  return colours[0] + (colours[1] - colours[0]) * amount[..., None]


def _wave(position: np.ndarray, period: float) -> np.ndarray:
  """A square wave with softened edges, in [0, 1]."""
  return 0.5 + 0.5 * np.tanh(4 * np.sin(2 * np.pi * position / period))


def _paint_thing(
  rng: np.random.Generator,
  image: np.ndarray,
  mask: np.ndarray,
  y: np.ndarray,
  x: np.ndarray,
  radius: float,
  texture: str,
) -> np.ndarray:
  """Lays a thing and its shadow on the image."""
  period = max(rng.uniform(0.42, 0.6) * radius, 5 * _FINE)
  if texture == "stripes":
    amount = _wave(y, period)
  elif texture == "checks":
    amount = np.abs(_wave(y, 1.5 * period) - _wave(x, 1.5 * period))
  elif texture == "dots":
    period = max(0.8 * period, 5 * _FINE)
    cell_y, cell_x = (np.abs(v / period % 1 - 0.5) for v in (y, x))
    amount = 1 / (1 + np.exp(20 * (np.hypot(cell_y, cell_x) - 0.31)))
  else:
    amount = np.clip(0.5 + 0.6 * y / radius, 0, 1)
  colours = _colours(rng, (0.45, 0.95), 0.5)
  if rng.random() < 0.5:
    colours = colours[::-1]
  paint = _mix(colours, amount)
  # A rim that darkens towards the edge makes it look solid.
  inside = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.06 * radius)
  paint = paint * (0.55 + 0.45 * np.clip(2 * inside - 1, 0, 1))[..., None]

  offset = round(0.12 * radius)
  shadow = np.zeros_like(inside)
  shadow[offset:, offset:] = mask[:-offset, :-offset]
  shadow = cv2.GaussianBlur(shadow, (0, 0), 0.08 * radius)
  image = image * (1 - 0.5 * shadow[..., None])
  return np.where(mask[..., None], paint, image).astype(np.float32)


def _paint_stuff(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
  """[size, size, 3] float32 of one kind of ground."""
  y, x = _rotated(rng, size)
  unit = size / 160  # Periods are pixels of a drawing with side 160.
  if kind == "waves":
    period = rng.uniform(10, 14) * unit
    bend = period * np.sin(2 * np.pi * x / (rng.uniform(3, 4) * period))
    bend += 0.5 * period * _noise(rng, size, 0.2)
    amount = 0.5 + 0.5 * np.sin(2 * np.pi * (y + 0.5 * bend) / period)
  elif kind == "bricks":
    height = rng.uniform(10, 14) * unit
    width, joint = 2.2 * height, 1.8 * unit
    row = np.floor(y / height).astype(int)
    along = x + row % 2 * width / 2
    column = np.floor(along / width).astype(int)
    shade = rng.uniform(0.45, 1, 997)[(row * 131 + column * 37) % 997]
    gap = np.minimum(y % height, along % width)
    amount = shade * np.clip((gap - joint) / unit + 1, 0, 1)
  elif kind == "gravel":
    grain = rng.uniform(1.3, 1.8) * unit
    rough = ndimage.gaussian_filter(rng.normal(size=(size, size)), grain)
    rough -= ndimage.gaussian_filter(rough, 3 * grain)
    amount = 0.5 + 0.5 * np.tanh(1.6 * rough / rough.std())
  else:
    amount = sum(
      weight * _noise(rng, size, scale)
      for weight, scale in ((1, 0.25), (0.5, 0.12), (0.2, 0.06))
    )
    amount = 1 / (1 + np.exp(-1.8 * amount))
  contrast = {"waves": 0.3, "bricks": 0.4, "gravel": 0.4, "clouds": 0.35}[kind]
  return _mix(_colours(rng, (0.1, 0.6), contrast), amount)
