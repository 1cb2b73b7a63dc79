"""Data that flows between the parts of jtsm_jax, and the conventions it obeys.

Conventions, said once for the whole package:

- Axes: B images, P proposals, S superpixels, K classes, C channels, H x W
  pixels, Hf x Wf cells of the feature grid. Arrays are NHWC.
- Boxes are (y0, x0, y1, x1), half-open, in pixels of the image they belong to.
- Classes: things are 0 .. T-1, stuff is T .. K-1; the background class of a
  refinement head is K.
- A panoptic map is int32 [H, W] of segment ids; 0 is void.
- P, S and the canvas are static; what is padding is marked by `valid` masks,
  and padded pixels of a superpixel map are -1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

VOID = 0
"""Segment id of a pixel that belongs to no segment."""

PADDING = -1
"""Superpixel id of a pixel that lies outside the image."""

Array = jax.Array | np.ndarray


class InputError(Exception):
  """A fault in what the user gave: a path, a file, a flag, a config field.

  The message names it, says what was found and what was wanted, and gives the
  remedy. `main.py` prints it without a traceback and exits with code 2.
  """


@dataclasses.dataclass(frozen=True)
class Category:
  """One class of a data set."""

  id: int  # the id that the data set's own files use
  name: str
  is_thing: bool


@dataclasses.dataclass(frozen=True)
class Categories:
  """The classes of a data set: things first, then stuff.

  The position in `items` is the class index that the model uses.
  """

  items: tuple[Category, ...]

  @classmethod
  def from_list(cls, entries: list[dict[str, Any]]) -> Categories:
    """Builds from COCO's `[{"id", "name", "isthing"}]`, in any order."""
    categories = [
      Category(int(e["id"]), str(e["name"]), bool(e["isthing"]))
      for e in entries
    ]
    categories.sort(key=lambda c: not c.is_thing)  # stable: keeps file order
    return cls(tuple(categories))

  def to_list(self) -> list[dict[str, Any]]:
    """The inverse of `from_list`."""
    return [
      {"id": c.id, "name": c.name, "isthing": int(c.is_thing)}
      for c in self.items
    ]

  def __len__(self) -> int:
    return len(self.items)

  @property
  def num_things(self) -> int:
    return sum(c.is_thing for c in self.items)

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(c.name for c in self.items)


@dataclasses.dataclass(frozen=True)
class Proposals:
  """Segment proposals of one image, best first (numpy, host).

  A proposal is a set of superpixels: its mask is
  `membership[p][superpixels]`.

  Attributes:
    superpixels: [H, W] int32, ids 0 .. S-1.
    member_bits: [S, ceil(P / 8)] uint8, from `pack_members`.
    boxes: [P, 4] int32, tight around each mask.
    scores: [P] float32, descending; only their order has a meaning.
  """

  superpixels: np.ndarray
  member_bits: np.ndarray
  boxes: np.ndarray
  scores: np.ndarray

  def __len__(self) -> int:
    return len(self.boxes)

  @functools.cached_property
  def membership(self) -> np.ndarray:
    """[P, S] bool: which superpixels each proposal is made of."""
    bits = np.unpackbits(self.member_bits, axis=1, count=len(self))
    return np.ascontiguousarray(bits.T).view(bool)

  def mask(self, index: int) -> np.ndarray:
    """[H, W] bool: the pixels of one proposal."""
    members = self.member_bits[:, index // 8] >> 7 - index % 8 & 1
    return members.astype(bool)[self.superpixels]

  def best(self, count: int) -> Proposals:
    """The first `count` of them, or all if there are fewer."""
    bits = self.member_bits[:, : -(-count // 8)]
    if count < len(self) and count % 8:
      bits = bits.copy()
      bits[:, -1] &= 0xFF << 8 - count % 8 & 0xFF
    return Proposals(
      self.superpixels, bits, self.boxes[:count], self.scores[:count]
    )


def pack_members(membership: np.ndarray) -> np.ndarray:
  """Packs [..., P, S] bool into [..., S, ceil(P / 8)] uint8.

  An eighth of the memory and of the transfer to the device. By superpixels,
  since most proposals agree about a superpixel, which then compresses well.
  """
  return np.packbits(np.swapaxes(membership, -1, -2), axis=-1)


@flax.struct.dataclass
class Batch:
  """What a training or inference step reads: static shapes, no ground truth.

  Attributes:
    image_index: [B] int32, position in the split; -1 marks a padding example.
    images: [B, H, W, 3] uint8 RGB, top-left aligned on the canvas, or None when
      `features` are given.
    features: [B, Hf, Wf, C] cached features of a frozen backbone, or None.
    colour: [B, 2] float32, what the step multiplies the images' saturation and
      value by, or None.
    size: [B, 2] int32, height and width of the image on the canvas, pixels.
    flip: [B] bool, True where the image is mirrored on the canvas.
    window: [B, 4] int32 (y0, x0, y1, x1), the part of the image that is on the
      canvas, half-open, pixels of the image.
    tags: [B, K] float32, 1 for the classes that the image is tagged with.
    superpixels: [B, H, W] int16, -1 outside the image.
    member_bits: [B, S, ceil(P / 8)] uint8, from `pack_members`.
    boxes: [B, P, 4] float32, canvas pixels.
    valid: [B, P] bool, False for padded proposals.
  """

  image_index: Array
  images: Array | None
  features: Array | None
  colour: Array | None
  size: Array
  flip: Array
  window: Array
  tags: Array
  superpixels: Array
  member_bits: Array
  boxes: Array
  valid: Array

  @property
  def membership(self) -> jax.Array:
    """[B, P, S] bool: which superpixels each proposal is made of."""
    count = self.boxes.shape[1]
    bits = jnp.unpackbits(self.member_bits, axis=-1, count=count)
    return jnp.swapaxes(bits, -1, -2).astype(bool)


@flax.struct.dataclass
class MiningOutputs:
  """What the panoptic mining branch says of each proposal.

  Attributes:
    mil_scores: [B, P, K] float32, S^MIL; 0 for padded proposals.
    image_scores: [B, K] float32 in (0, 1), y: sum of S^MIL over proposals.
    refinement_logits: n_r arrays [B, P, K + 1] float32, one per head.
  """

  mil_scores: Array
  image_scores: Array
  refinement_logits: tuple[Array, ...]


@flax.struct.dataclass
class Mined:
  """The segments mined from one scoring of the proposals, and who is like them.

  M slots per image, one for each mined segment.

  Attributes:
    proposal: [B, M] int32, the mined proposal.
    category: [B, M] int32, its class.
    score: [B, M] float32, its score for that class.
    valid: [B, M] bool, False for unused slots.
    label: [B, P] int32, pseudo label of each proposal; K is background.
    weight: [B, P] float32, y of the class of the nearest mined segment; 0 for
      padded and for ignored proposals.
    slot: [B, P] int32, the nearest mined segment.
  """

  proposal: Array
  category: Array
  score: Array
  valid: Array
  label: Array
  weight: Array
  slot: Array


@flax.struct.dataclass
class PseudoMasks:
  """Re-estimated masks of the mined segments: pixel-wise pseudo labels.

  Attributes:
    masks: [B, M, h, w] bool on the canvas divided by the mask stride.
    valid: [B, M] bool.
  """

  masks: Array
  valid: Array


@dataclasses.dataclass(frozen=True)
class Detections:
  """Scored segments of one image, best first (numpy, host).

  Attributes:
    proposal: [N] int32, the proposal each one comes from.
    category: [N] int32 class index.
    score: [N] float32.
    boxes: [N, 4] int32, of the proposals, pixels of the original image; AP of
      boxes and CorLoc compare these. The masks lie inside, unless their
      outlines follow the colours, and need not reach to the sides: files of
      predictions have the tight boxes of the masks, which are the same ones
      where the masks are the proposals' own (the task "detection").
    size: (H, W) of the image, pixels.
    rles: N masks as COCO's compressed run lengths (`counts`): 100 masks of a
      photograph as arrays would fill the memory. () before they are made.
  """

  proposal: np.ndarray
  category: np.ndarray
  score: np.ndarray
  boxes: np.ndarray
  size: tuple[int, int]
  rles: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Segment:
  """One segment of a panoptic map.

  Attributes:
    id: the value of its pixels in the map, > 0.
    category: class index (position in `Categories`), not the data set's id.
    is_thing: whether it is an instance of a thing.
    score: confidence in [0, 1]; 1 for ground truth.
    area: pixels.
    is_crowd: COCO's crowd flag; only ever True in ground truth.
  """

  id: int
  category: int
  is_thing: bool
  score: float
  area: int
  is_crowd: bool = False


@dataclasses.dataclass(frozen=True)
class PanopticMap:
  """A panoptic segmentation of one image, predicted or ground truth.

  Attributes:
    ids: [H, W] int32 segment ids, 0 = void.
    segments: one entry per id that occurs in `ids`.
  """

  ids: np.ndarray
  segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Instances:
  """Ground truth of the things of one image, which may overlap.

  Attributes:
    category: [N] int32 class index.
    boxes: [N, 4] float64 (y0, x0, y1, x1), pixels, half-open; may be fractions.
    area: [N] float64, pixels, as the data set counts them.
    is_crowd: [N] bool, COCO's crowd flag.
    is_difficult: [N] bool, VOC's flag.
    rles: N masks as COCO's compressed run lengths (`counts`), or () where there
      are boxes alone.
  """

  category: np.ndarray
  boxes: np.ndarray
  area: np.ndarray
  is_crowd: np.ndarray
  is_difficult: np.ndarray
  rles: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Record:
  """One image of a data set.

  Attributes:
    image_id: unique in its split; a file-system safe string.
    image: the bytes of its file, in any format that `decode_image` reads.
    height, width: pixels, after EXIF rotation; 0 while they are not known.
    tags: class indices, ascending, the image's own tags.
    target: the panoptic ground truth; None in every training split.
    instances: the ground truth of its things; None in every training split.
    file_name: of the image, as the data set names it; "" where that is
      `image_id`.
    source_id: of the image in the data set's JSON, None where it has none.
  """

  image_id: str
  image: bytes
  height: int
  width: int
  tags: tuple[int, ...]
  target: PanopticMap | None = None
  instances: Instances | None = None
  file_name: str = ""
  source_id: int | str | None = None
