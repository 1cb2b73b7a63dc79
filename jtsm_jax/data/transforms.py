"""Decoding, cropping and scaling of one image, as plain numpy functions."""

from __future__ import annotations

import io

import cv2
import numpy as np
import scipy.ndimage
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jtsm_jax.types import InputError, Proposals

MAX_PIXELS = 64_000_000
"""Largest image that is decoded; guards against decompression bombs."""

_END_OF_JPEG = b"\xff\xd9"


def decode_image(data: bytes, *, name: str = "image") -> np.ndarray:
  """Decodes any common image file into RGB as a viewer would show it.

  EXIF rotation is applied, grey and palette images become RGB, CMYK is
  converted, 16 bits are reduced to 8, and transparent pixels lie on white.

  Args:
    data: the bytes of the file.
    name: what error messages call the image.

  Returns:
    [H, W, 3] uint8 RGB.

  Raises:
    InputError: the bytes are no image, are truncated, or the image has more
      than `MAX_PIXELS` pixels.
  """
  if not data:
    raise InputError(f"{name}: the file is empty (0 bytes); replace it")
  try:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if height * width > MAX_PIXELS:
      raise InputError(
        f"{name}: {width} x {height} pixels are more than the limit of"
        f" {MAX_PIXELS}; scale the image down"
      )
    if _is_plain_jpeg(image, data):
      # The same library as Pillow's and the same pixels, without the copies.
      pixels = cv2.imdecode(
        np.frombuffer(data, np.uint8),
        cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
      )
      if pixels is not None:
        return pixels
    image.load()
    return np.array(_to_rgb(_upright(image)))
  except InputError:
    raise
  except UnidentifiedImageError:
    raise InputError(
      f"{name}: cannot be decoded (no known image format); expected a JPEG, PNG"
      " or other common image file: replace it"
    ) from None
  except Exception as error:  # Pillow's plugins raise whatever they meet.
    raise InputError(
      f"{name}: cannot be decoded ({error}); expected a complete JPEG, PNG or"
      " other common image file: replace it"
    ) from error


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
  """A JPEG in colour, upright, and whole: OpenCV does not tell if it is cut."""
  if image.format != "JPEG" or image.mode != "RGB":
    return False
  return data.endswith(_END_OF_JPEG) and _orientation(image) == 1


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # A garbled EXIF block tells no rotation.
    return 1


def _upright(image: Image.Image) -> Image.Image:
  if _orientation(image) == 1:
    return image  # exif_transpose would copy it
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # A garbled EXIF block tells no rotation.
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == "F":
    raise ValueError("floating-point pixels have no defined range")
  if image.mode.startswith("I"):  # 16-bit grey; "I" holds it in 32 bits.
    grey = np.asarray(image).astype(np.int64) >> 8
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert(
      "RGB"
    )
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image if image.mode == "RGB" else image.convert("RGB")


def scaled_size(
  size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[int, int]:
  """Height and width of an image that is scaled to fit a canvas, pixels.

  The scale is min(H / h, W / w), so the aspect ratio is kept up to the rounding
  to whole pixels.
  """
  scale = min(canvas[0] / size[0], canvas[1] / size[1])
  height, width = (
    min(max(round(n * scale), 1), most)
    for n, most in zip(size, canvas, strict=True)
  )
  return height, width


def scale_image(image: np.ndarray, out: np.ndarray, *, flip: bool) -> None:
  """Scales [h, w, 3] uint8 into `out` [H, W, 3], mirrored if `flip`."""
  if image.shape[0] > out.shape[0] or image.shape[1] > out.shape[1]:
    method = cv2.INTER_AREA
  else:
    method = cv2.INTER_LINEAR
  size = out.shape[1::-1]
  if flip:
    cv2.flip(cv2.resize(image, size, interpolation=method), 1, dst=out)
  else:
    cv2.resize(image, size, dst=out, interpolation=method)


def scale_labels(labels: np.ndarray, out: np.ndarray, *, flip: bool) -> None:
  """Scales [h, w] int32 into `out` [H, W], sampled at the pixels' centres."""
  size = out.shape[1::-1]
  scaled = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
  out[:] = cv2.flip(scaled, 1) if flip else scaled


def scale_boxes(
  boxes: np.ndarray,
  size: tuple[int, int],
  new_size: tuple[int, int],
  *,
  flip: bool,
) -> np.ndarray:
  """Boxes in a scaled image.

  Args:
    boxes: [P, 4] (y0, x0, y1, x1), pixels of an image of `size`.
    size: (height, width).
    new_size: (height, width) after scaling.
    flip: mirror left and right.

  Returns:
    [P, 4] float32, pixels of the scaled image.
  """
  factors = np.array(new_size, np.float64) / size
  scaled = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(factors, 2)
  if flip:
    scaled[:, [1, 3]] = new_size[1] - scaled[:, [3, 1]]
  return scaled.astype(np.float32)


def crop_proposals(
  proposals: Proposals, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """What is left of the proposals inside a window of their image.

  Args:
    proposals: of the whole image.
    window: (y0, x0, y1, x1), half-open, pixels.

  Returns:
    (superpixels [h, w] int32 of the window;
    boxes [P, 4] int32 in the window, tight around what is left of each mask,
    (0, 0, 1, 1) where nothing is;
    [P] bool, whether a pixel is left).
  """
  y0, x0, y1, x1 = (int(n) for n in window)
  superpixels = proposals.superpixels[y0:y1, x0:x1]
  if superpixels.shape == proposals.superpixels.shape:
    return superpixels, proposals.boxes, np.ones(len(proposals), bool)
  low, high = proposals.boxes[:, :2], proposals.boxes[:, 2:]
  boxes = proposals.boxes - np.tile([y0, x0], 2).astype(np.int32)
  cut = ((low < (y0, x0)) | (high > (y1, x1))).any(1)
  if not cut.any():
    return superpixels, boxes, np.ones(len(boxes), bool)
  # Boxes of the superpixels; of one that is not in the window an empty one.
  far = max(superpixels.shape)
  corners = np.tile([far, far, 0, 0], (len(proposals.member_bits), 1))
  slices = scipy.ndimage.find_objects(superpixels + 1)
  for index, found in enumerate(slices):
    if found is not None:
      rows, columns = found
      corners[index] = rows.start, columns.start, rows.stop, columns.stop
  members = proposals.membership[cut]
  boxes[cut] = np.stack(
    [
      *(np.where(members, c, far).min(1) for c in corners[:, :2].T),
      *(np.where(members, c, 0).max(1) for c in corners[:, 2:].T),
    ],
    axis=1,
  )
  left = boxes[:, 2] > boxes[:, 0]
  boxes[~left] = 0, 0, 1, 1
  return superpixels, boxes, left
