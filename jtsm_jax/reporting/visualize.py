"""Pictures of what goes in and comes out: overlays, contours, contact sheets.

Images are uint8 [H, W, 3] RGB. The drawing functions return a new image of the
same aspect, enlarged where it is small: the longest side is 640 pixels or more,
so that labels can be read. What is drawn with many outlines, for sheets and
pages, is not larger than 1,280: on a photograph of 12 megapixels forty outlines
take most of a minute.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np

from jtsm_jax.types import (
  PADDING,
  Categories,
  PanopticMap,
  Proposals,
  Segment,
)

_LONGEST_SIDE = 640  # of a picture, at least
_SKETCH_SIDE = 1280  # of a picture for a sheet or a page, at most
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE = (255, 255, 255)
_DARK = (24, 24, 28)


def class_colours(categories: Categories) -> np.ndarray:
  """One colour for each class: things vivid, stuff muted.

  Each next class takes the colour farthest from those before it in CIELAB, so
  the n-th thing, and the n-th stuff class, looks the same in every data set.
  200 things and 200 stuff classes are all distinct; then colours come again.

  Returns:
    [K, 3] uint8 RGB.
  """
  things = categories.num_things
  vivid = _spread(things, lightness=(48, 60, 72), chroma=(64, 84), start=25)
  muted = _spread(
    len(categories) - things, lightness=(44, 58, 72), chroma=(16, 30), start=140
  )
  return np.concatenate([vivid, muted])


def _spread(
  count: int,
  *,
  lightness: tuple[float, ...],
  chroma: tuple[float, ...],
  start: float,
) -> np.ndarray:
  """[count, 3] uint8 RGB, farthest-point order among hues from `start`."""
  hue = np.deg2rad(start + np.arange(0, 360, 10))
  grid = np.meshgrid(lightness, chroma, hue, indexing="ij")
  light, c, h = (axis.ravel() for axis in grid)
  lab = np.stack([light, c * np.cos(h), c * np.sin(h)], axis=1)
  rgb = _lab_to_rgb(lab)
  lab = _rgb_to_lab(rgb)  # what is left of it inside the gamut
  first = np.ravel_multi_index(
    (1, len(chroma) - 1, 0), (len(lightness), len(chroma), len(hue))
  )
  chosen = [int(first)]
  distance = np.full(len(lab), np.inf)
  while len(chosen) < count:
    distance = np.minimum(
      distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1)
    )
    if not distance.any():  # all are taken
      break
    chosen.append(int(distance.argmax()))
  return np.resize(rgb[chosen], (count, 3))


def overlay_panoptic(
  image: np.ndarray,
  panoptic: PanopticMap,
  categories: Categories,
  *,
  alpha: float = 0.55,
  labels: bool = True,
  most: float = math.inf,
) -> np.ndarray:
  """Paints the segments over the image.

  A class has one colour; its instances differ in lightness. A label stands in
  the largest region of its segment, with the score where that is below 1, and
  is left out where the region is much smaller than the label. Void shows the
  bare image.

  Args:
    image: [H, W, 3] uint8 RGB.
    panoptic: of the same size.
    categories: the classes that `panoptic` refers to.
    alpha: opacity of the colours, 0 .. 1.
    labels: whether to write the class names.
    most: longest side of the picture, pixels.

  Returns:
    uint8 RGB, see the head of the module.

  Raises:
    ValueError: the image is not uint8 RGB, or the map has another size.
  """
  _check(image, panoptic.ids, "panoptic map")
  canvas = _canvas(image, most=most)
  segments = sorted(panoptic.segments, key=lambda s: -s.area)
  ids = _shrink_ids(panoptic.ids, canvas.shape[:2])
  index = _enlarge_labels(
    _to_index(ids, [s.id for s in segments]), canvas.shape[:2]
  )
  colours = _segment_colours(segments, class_colours(categories))
  canvas = _paint(canvas, index, colours, alpha)
  canvas = _draw_edges(canvas, index)
  if labels:
    names = categories.names
    texts = [
      names[s.category] + (f" {s.score:.2f}" if s.score < 1 else "")
      for s in segments
    ]
    _draw_labels(canvas, index, texts, colours)
  return canvas


def sketch_panoptic(
  image: np.ndarray,
  panoptic: PanopticMap,
  categories: Categories,
  *,
  labels: bool = True,
) -> np.ndarray:
  """`overlay_panoptic`, no larger than sheets and pages need it."""
  return overlay_panoptic(
    image, panoptic, categories, labels=labels, most=_SKETCH_SIDE
  )


def draw_superpixels(image: np.ndarray, superpixels: np.ndarray) -> np.ndarray:
  """Draws the borders of the superpixels; padding is darkened.

  Args:
    image: [H, W, 3] uint8 RGB.
    superpixels: [H, W] int32, ids from 0, -1 outside the image.

  Raises:
    ValueError: the image is not uint8 RGB, or the map has another size.
  """
  _check(image, superpixels, "superpixel map")
  canvas = _canvas(image, most=_SKETCH_SIDE)
  height, width = canvas.shape[:2]
  ids = cv2.resize(
    superpixels.astype(np.int32),
    (width, height),
    interpolation=cv2.INTER_NEAREST,
  )
  canvas = _paint(canvas, (ids == PADDING).astype(int), [_DARK], 0.7)
  border = _borders(ids).astype(np.float32)
  return _blend(canvas, (255, 224, 64), 0.75 * border)


def draw_proposals(
  image: np.ndarray, proposals: Proposals, n: int
) -> np.ndarray:
  """Draws the outlines of the n best proposals, the best one on top.

  Colours run from yellow (the best) to violet (the n-th), as the bar in the
  corner tells.

  Args:
    image: [H, W, 3] uint8 RGB.
    proposals: of this image.
    n: how many; all there are, if fewer.

  Raises:
    ValueError: the image is not uint8 RGB, or has another size.
  """
  _check(image, proposals.superpixels, "superpixel map of the proposals")
  canvas = _canvas(image, most=_SKETCH_SIDE)
  superpixels = _shrink_ids(proposals.superpixels, canvas.shape[:2])
  proposals = dataclasses.replace(proposals, superpixels=superpixels)
  n = min(n, len(proposals))
  colours = _ramp(n)
  for rank in reversed(range(n)):
    mask = proposals.mask(rank)
    # Padding is -1, which indexes the last superpixel.
    mask = mask & (superpixels != PADDING)
    index = _enlarge_labels(mask.astype(int), canvas.shape[:2])
    canvas = _draw_edges(canvas, index, colour=tuple(colours[rank]))
  _draw_ramp(canvas, colours)
  return canvas


def draw_scores(
  image: np.ndarray, proposals: Proposals, scores: np.ndarray, n: int
) -> np.ndarray:
  """Paints and outlines the n best-scored proposals, the best one on top.

  Colours run from violet (score 0) to yellow (1), see `score_ramp`; the image
  below is grey, so that they keep their meaning.

  Args:
    image: [H, W, 3] uint8 RGB.
    proposals: P of this image.
    scores: [P] float32 in [0, 1]; proposals of score 0 are left out.
    n: how many; all there are, if fewer.

  Raises:
    ValueError: the image is not uint8 RGB, or has another size.
  """
  _check(image, proposals.superpixels, "superpixel map of the proposals")
  canvas = _canvas(image, most=_SKETCH_SIDE)
  superpixels = _shrink_ids(proposals.superpixels, canvas.shape[:2])
  grey = cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY)
  canvas = np.repeat(grey[..., None], 3, axis=2)
  order = np.argsort(-scores, kind="stable")[:n]
  order = order[scores[order] > 0]
  # One column more: padding is -1, which indexes the last one.
  count = len(proposals.member_bits)
  members = np.zeros((len(order) + 1, count + 1), bool)
  members[:-1, :-1] = proposals.membership[order]
  members[-1] = True  # what no proposal holds
  top = members.argmax(0)
  top = np.where(top == len(order), 0, top + 1)
  index = _enlarge_labels(top[superpixels], canvas.shape[:2])
  colours = _viridis((255 * scores[order].clip(0, 1)).astype(np.uint8))
  canvas = _paint(canvas, index, colours, 0.5)
  for rank in reversed(range(len(order))):
    mask = members[rank][superpixels].astype(np.float32)
    mask = cv2.resize(mask, canvas.shape[1::-1]) >= 0.5
    outline, _ = cv2.findContours(
      mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
    )
    for colour, width in ((_DARK, 4), (colours[rank], 2)):
      line = max(round(width * _unit(canvas)), 1)
      colour = tuple(map(int, colour))
      cv2.drawContours(canvas, outline, -1, colour, line, cv2.LINE_AA)
  return canvas


def score_ramp(n: int) -> np.ndarray:
  """[n, 3] uint8 RGB, the colours of the scores from 0 to 1."""
  return _viridis(np.linspace(0, 255, n).astype(np.uint8))


def draw_mask(
  image: np.ndarray,
  mask: np.ndarray,
  colour: Sequence[int],
  label: str = "",
  *,
  alpha: float = 0.55,
) -> np.ndarray:
  """Paints one mask over the image.

  Args:
    image: [H, W, 3] uint8 RGB.
    mask: [H, W] bool.
    colour: RGB, 0 .. 255.
    label: written into the largest region of the mask.
    alpha: opacity of the colour, 0 .. 1.

  Raises:
    ValueError: the image is not uint8 RGB, or the mask has another size.
  """
  _check(image, mask, "mask")
  canvas = _canvas(image, most=_SKETCH_SIDE)
  index = _shrink_ids(mask.astype(bool).astype(np.int32), canvas.shape[:2])
  index = _enlarge_labels(index, canvas.shape[:2])
  colours = np.array([colour], np.uint8)
  canvas = _draw_edges(_paint(canvas, index, colours, alpha), index)
  if label:
    _draw_labels(canvas, index, [label], colours)
  return canvas


def contact_sheet(
  tiles: Sequence[Sequence[np.ndarray | None]],
  titles: Sequence[str] = (),
  *,
  row_titles: Sequence[str] = (),
  tile_size: int = 480,
) -> np.ndarray:
  """Puts pictures into a grid on white.

  Args:
    tiles: rows of uint8 RGB images of any size; None leaves a gap.
    titles: one above each column, or none.
    row_titles: one above the left end of each row, or none.
    tile_size: width of a column, and the most that a row is high, pixels. Tiles
      are fitted into it.

  Raises:
    ValueError: no tiles, a tile is not uint8 RGB, or the number of titles is
      not that of the columns or rows.
  """
  columns = max((len(row) for row in tiles), default=0)
  if not columns:
    raise ValueError("a contact sheet needs at least one tile")
  if titles and len(titles) != columns:
    raise ValueError(f"got {len(titles)} titles for {columns} columns")
  if row_titles and len(row_titles) != len(tiles):
    raise ValueError(f"got {len(row_titles)} row titles for {len(tiles)} rows")
  gap = max(tile_size // 40, 4)
  text_size = max(tile_size / 34, 9)
  line = round(2.6 * text_size)
  width = columns * (tile_size + gap) + gap

  strips = []
  if titles:
    strip = np.full((line, width, 3), 255, np.uint8)
    for c, title in enumerate(titles):
      title = _shorten(title, text_size, tile_size)
      _text(strip, title, gap + c * (tile_size + gap), line // 2, text_size)
    strips.append(strip)
  for r, row in enumerate(tiles):
    if row_titles:
      strip = np.full((line, width, 3), 255, np.uint8)
      title = _shorten(row_titles[r], 0.85 * text_size, width - 2 * gap)
      _text(strip, title, gap, line // 2, 0.85 * text_size, (110, 110, 116))
      strips.append(strip)
    fitted = [None if t is None else _fit(t, tile_size) for t in row]
    height = max((t.shape[0] for t in fitted if t is not None), default=gap)
    strip = np.full((height + gap, width, 3), 255, np.uint8)
    for c, tile in enumerate(fitted):
      if tile is not None:
        h, w = tile.shape[:2]
        x = gap + c * (tile_size + gap) + (tile_size - w) // 2
        strip[:h, x : x + w] = tile
    strips.append(strip)
  top = (
    [] if titles or row_titles else [np.full((gap, width, 3), 255, np.uint8)]
  )
  return np.concatenate(top + strips)


def write_image(
  path: str | os.PathLike[str], rgb: np.ndarray, *, quality: int = 92
) -> None:
  """Writes a PNG or JPEG, by the suffix; the file appears only when complete.

  A picture with a longer side than its format allows, 65,500 pixels of a JPEG
  and a million of a PNG, is shrunk to that.

  Args:
    path: ends with .png, .jpg or .jpeg; missing folders are made.
    rgb: [H, W, 3] uint8 RGB.
    quality: of a JPEG, 0 .. 100.

  Raises:
    ValueError: another suffix, or the image is not uint8 RGB.
  """
  path = pathlib.Path(path)
  jpeg = 65_500, [cv2.IMWRITE_JPEG_QUALITY, quality]
  options = {".png": (1_000_000, []), ".jpg": jpeg, ".jpeg": jpeg}
  suffix = path.suffix.lower()
  if suffix not in options:
    raise ValueError(f"{path}: wanted a name that ends in {', '.join(options)}")
  _check(rgb)
  limit, flags = options[suffix]
  if max(rgb.shape) > limit:
    rgb = _fit(rgb, limit)
  _, data = cv2.imencode(suffix, rgb[..., ::-1], flags)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    draft.write_bytes(data.tobytes())
    os.replace(draft, path)
  finally:
    draft.unlink(missing_ok=True)


# Sizes -----------------------------------------------------------------------


def _check(
  image: np.ndarray, ids: np.ndarray | None = None, what: str = ""
) -> None:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(
      f"the image is {image.dtype} {image.shape}, wanted uint8 [H, W, 3]"
    )
  if ids is not None and ids.shape != image.shape[:2]:
    raise ValueError(
      f"the {what} is {ids.shape}, the image {image.shape[:2]}: both must have"
      " one size"
    )


def _canvas(image: np.ndarray, *, most: float = math.inf) -> np.ndarray:
  """A copy whose longest side is at least _LONGEST_SIDE and at most `most`."""
  longest = max(image.shape[:2])
  return _fit(image, min(max(longest, _LONGEST_SIDE), most))


def _shrink_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[h, w] -> [H, W] where that is smaller."""
  if ids.shape[0] <= size[0]:
    return ids
  return cv2.resize(
    ids.astype(np.int32), size[::-1], interpolation=cv2.INTER_NEAREST
  )


def _enlarge_labels(index: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[h, w] labels from 0 -> [H, W] with smooth borders instead of stairs."""
  if index.shape == size:
    return index
  best = np.full(size, -1, np.float32)
  result = np.zeros(size, int)
  for label in np.unique(index):
    share = cv2.resize(
      (index == label).astype(np.float32), size[::-1],
      interpolation=cv2.INTER_LINEAR,
    )  # fmt: skip
    share = cv2.GaussianBlur(share, (0, 0), size[0] / index.shape[0] / 2)
    result[share > best] = label
    best = np.maximum(best, share)
  return result


def _fit(image: np.ndarray, size: int) -> np.ndarray:
  _check(image)
  scale = size / max(image.shape[:2])
  target = tuple(max(round(s * scale), 1) for s in image.shape[1::-1])
  method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  return cv2.resize(image, target, interpolation=method)


def _unit(canvas: np.ndarray) -> float:
  """Width of a thin line, pixels; of a panorama as of an image of 4 : 1."""
  short, long = sorted(canvas.shape[:2])
  return max(min(long, 4 * short) / _LONGEST_SIDE, 1)


# Colours ---------------------------------------------------------------------


def _lab_to_rgb(lab: np.ndarray) -> np.ndarray:
  """[N, 3] CIELAB (L 0 .. 100) -> [N, 3] uint8, clipped to the gamut."""
  rgb = cv2.cvtColor(lab[None].astype(np.float32), cv2.COLOR_Lab2RGB)[0]
  return np.rint(255 * rgb.clip(0, 1)).astype(np.uint8)


def _rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
  return cv2.cvtColor((rgb[None] / 255).astype(np.float32), cv2.COLOR_RGB2Lab)[
    0
  ]


def _segment_colours(
  segments: Sequence[Segment], colours: np.ndarray
) -> np.ndarray:
  """[N, 3] uint8: the class colour, its lightness varied over instances."""
  if not segments:
    return np.zeros((0, 3), np.uint8)
  steps = (0, 16, -14, 28, -24, 8, -8)
  seen = dict.fromkeys(range(len(colours)), 0)
  lab = _rgb_to_lab(np.stack([colours[s.category] for s in segments]))
  for row, segment in zip(lab, segments, strict=True):
    if segment.is_thing:
      row[0] += steps[seen[segment.category] % len(steps)]
      seen[segment.category] += 1
  return _lab_to_rgb(lab.clip([12, -128, -128], [94, 127, 127]))


def _ramp(n: int) -> np.ndarray:
  """[n, 3] uint8, yellow to violet."""
  levels = np.linspace(245, 20, max(n, 1)).astype(np.uint8)[:, None]
  return cv2.applyColorMap(levels, cv2.COLORMAP_PLASMA)[:n, 0, ::-1]


def _viridis(levels: np.ndarray) -> np.ndarray:
  """[N, 3] uint8 of levels [N] uint8, violet to yellow."""
  if not len(levels):
    return np.zeros((0, 3), np.uint8)
  return cv2.applyColorMap(levels[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]


# Drawing ---------------------------------------------------------------------


def _to_index(ids: np.ndarray, order: Sequence[int]) -> np.ndarray:
  """Position of each pixel's id in `order`, from 1; 0 for any other."""
  index = np.zeros(ids.shape, np.int32)
  for position, wanted in enumerate(order, start=1):
    index[ids == wanted] = position
  return index


def _blend(
  canvas: np.ndarray, colour: Sequence[int], opacity: np.ndarray
) -> np.ndarray:
  """Mixes in one colour, or one for each pixel, by opacity [H, W] in 0 .. 1."""
  opacity = opacity.astype(np.float32, copy=False)
  paint = np.empty_like(canvas)
  paint[:] = colour
  return cv2.blendLinear(canvas, paint, 1 - opacity, opacity)


def _paint(
  canvas: np.ndarray,
  index: np.ndarray,
  colours: Sequence[Sequence[int]],
  alpha: float,
) -> np.ndarray:
  """Paints label i with colour i - 1, and leaves label 0 alone."""
  table = np.zeros((len(colours) + 1, 3), np.uint8)
  table[1:] = np.asarray(colours).reshape(-1, 3)
  return _blend(canvas, table[index], np.float32(alpha) * (index > 0))


def _borders(labels: np.ndarray) -> np.ndarray:
  """[H, W] bool, pixels whose right or lower neighbour has another label."""
  border = np.zeros(labels.shape, bool)
  border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
  border[:-1] |= labels[:-1] != labels[1:]
  return border


def _draw_edges(
  canvas: np.ndarray, index: np.ndarray, *, colour: Sequence[int] = _WHITE
) -> np.ndarray:
  """A line between labels, on a dark halo that makes it show on any ground."""
  unit = _unit(canvas)
  border = _borders(index).astype(np.float32)
  for line_colour, width, opacity in ((_DARK, 4, 0.5), (colour, 2, 0.9)):
    size = max(round(width * unit), 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    line = cv2.GaussianBlur(cv2.dilate(border, kernel), (0, 0), 0.5 * unit)
    canvas = _blend(canvas, line_colour, opacity * line)
  return canvas


@functools.cache
def _cap_height() -> float:
  """Height of a capital at OpenCV's scale 1, which depends on its version."""
  canvas = np.zeros((200, 200), np.uint8)
  cv2.putText(canvas, "H", (20, 150), _FONT, 4, 255, 1)
  return np.count_nonzero(canvas.any(axis=1)) / 4


def _text_width(text: str, size: float) -> tuple[int, float]:
  """Width in pixels, and OpenCV's scale, of text with capitals `size` high."""
  scale = size / _cap_height()
  return cv2.getTextSize(text, _FONT, scale, 1)[0][0], scale


def _text(
  canvas: np.ndarray,
  text: str,
  x: int,
  y_middle: int,
  size: float,
  colour: Sequence[int] = _DARK,
) -> None:
  """Writes onto the canvas, capitals `size` pixels high."""
  _, scale = _text_width(text, size)
  origin = (int(x), round(y_middle + size / 2))
  cv2.putText(
    canvas, text, origin, _FONT, scale, tuple(map(int, colour)), 1, cv2.LINE_AA
  )


def _shorten(text: str, size: float, width: int) -> str:
  while len(text) > 4 and _text_width(text, size)[0] > width:
    text = text[:-4] + "..."
  return text


def _draw_labels(
  canvas: np.ndarray,
  index: np.ndarray,
  texts: Sequence[str],
  colours: np.ndarray,
) -> None:
  """Writes text i - 1 into the largest region of label i."""
  height, width = canvas.shape[:2]
  size = 10.5 * _unit(canvas)
  box_h = round(2.1 * size)
  taken: list[tuple[int, int, int, int]] = []
  for label, text in enumerate(texts, start=1):
    box_w = _text_width(text, size)[0] + round(size)
    y, x, area = _inmost_point(index == label)
    if area < 0.4 * box_w * box_h:
      continue
    x0 = int(np.clip(x - box_w // 2, 0, max(width - box_w, 0)))
    # Off the labels that are there already: up or down, the nearest free place.
    for shift in (0, -1, 1, -2, 2, -3, 3):
      y0 = y - box_h // 2 + shift * (box_h + 2)
      y0 = int(np.clip(y0, 0, max(height - box_h, 0)))
      box = (y0, x0, y0 + box_h, x0 + box_w)
      if not any(_touch(box, other) for other in taken):
        break
    taken.append(box)
    _draw_plate(canvas, box, colours[label - 1])
    _text(canvas, text, x0 + round(size / 2), y0 + box_h // 2, size, _WHITE)


def _inmost_point(mask: np.ndarray) -> tuple[int, int, int]:
  """(y, x) farthest from the border of the largest region, and its area."""
  count, regions, stats, _ = cv2.connectedComponentsWithStats(
    mask.astype(np.uint8), connectivity=4
  )
  if count < 2:
    return 0, 0, 0
  largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
  region = np.pad((regions == largest).astype(np.uint8), 1)
  distance = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
  y, x = np.unravel_index(int(distance.argmax()), distance.shape)
  return int(y), int(x), int(stats[largest, cv2.CC_STAT_AREA])


def _touch(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_plate(
  canvas: np.ndarray, box: tuple[int, int, int, int], colour: np.ndarray
) -> None:
  """A rounded plate in a dark shade of the colour, for white text."""
  y0, x0, y1, x1 = box
  radius = (y1 - y0) // 4
  plate = np.zeros(canvas.shape[:2], np.float32)
  cv2.rectangle(plate, (x0 + radius, y0), (x1 - radius - 1, y1 - 1), 1, -1)
  cv2.rectangle(plate, (x0, y0 + radius), (x1 - 1, y1 - radius - 1), 1, -1)
  for cy in (y0 + radius, y1 - radius - 1):
    for cx in (x0 + radius, x1 - radius - 1):
      cv2.circle(plate, (cx, cy), radius, 1, -1, cv2.LINE_AA)
  lab = _rgb_to_lab(colour[None])
  lab[:, 0] = np.minimum(lab[:, 0], 32)
  canvas[:] = _blend(canvas, _lab_to_rgb(lab)[0], 0.85 * plate)


def _draw_ramp(canvas: np.ndarray, colours: np.ndarray) -> None:
  """The legend of ranks in the lower right corner."""
  if len(colours) < 2:
    return
  size = 9 * _unit(canvas)
  texts = ("1", str(len(colours)))
  widths = [_text_width(t, size)[0] for t in texts]
  pad, bar_w, bar_h = round(size * 0.6), round(10 * size), round(size)
  box_w = sum(widths) + bar_w + 4 * pad
  box_h = bar_h + 2 * pad
  y1, x1 = canvas.shape[0] - pad, canvas.shape[1] - pad
  if box_w > canvas.shape[1] or box_h > canvas.shape[0]:
    return
  _draw_plate(
    canvas, (y1 - box_h, x1 - box_w, y1, x1), np.array(_DARK, np.uint8)
  )
  y, x = y1 - box_h // 2, x1 - box_w + pad
  _text(canvas, texts[0], x, y, size, _WHITE)
  x += widths[0] + pad
  ranks = np.arange(bar_w) * len(colours) // bar_w
  top = y - bar_h // 2
  canvas[top : top + bar_h, x : x + bar_w] = colours[ranks]
  _text(canvas, texts[1], x + bar_w + pad, y, size, _WHITE)
