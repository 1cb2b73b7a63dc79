"""Decoding, resizing and colour of one image, as plain numpy functions."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jtsm_jax.types import PADDING, InputError

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


def fit_to_canvas(
  image: np.ndarray | None,
  superpixels: np.ndarray,
  boxes: np.ndarray,
  *,
  canvas: tuple[int, int],
  flip: bool,
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]:
  """Scales an image and its proposals into the top left of a canvas.

  The scale is min(H / h, W / w), so the aspect ratio is kept up to the rounding
  to whole pixels. `flip` mirrors inside the image's own width: the padding
  stays at the right and at the bottom.

  Args:
    image: [h, w, 3] uint8, or None where only the proposals are wanted.
    superpixels: [h, w] int32.
    boxes: [P, 4] (y0, x0, y1, x1) in pixels of the image.
    canvas: (H, W), pixels.
    flip: mirror left and right.

  Returns:
    (image [H, W, 3] uint8 padded with 0, or None;
    size [2] int32, height and width of the image on the canvas;
    superpixels [H, W] int32 padded with -1, nearest sampling at pixel centres;
    boxes [P, 4] float32, pixels of the canvas).

  Raises:
    ValueError: image and superpixel map differ in size.
  """
  h, w = superpixels.shape
  if image is not None and image.shape[:2] != (h, w):
    raise ValueError(
      f"image is {image.shape[:2]} but superpixels are {(h, w)}; both must"
      " have the size of the image"
    )
  scale = min(canvas[0] / h, canvas[1] / w)
  new_h = min(max(round(h * scale), 1), canvas[0])
  new_w = min(max(round(w * scale), 1), canvas[1])

  resized = cv2.resize(
    superpixels, (new_w, new_h), interpolation=cv2.INTER_NEAREST_EXACT
  )
  superpixels_out = np.full(canvas, PADDING, np.int32)
  superpixels_out[:new_h, :new_w] = resized[:, ::-1] if flip else resized

  factors = np.array([new_h / h, new_w / w] * 2, np.float64)
  boxes_out = np.asarray(boxes, np.float64).reshape(-1, 4) * factors
  if flip:
    boxes_out[:, [1, 3]] = new_w - boxes_out[:, [3, 1]]
  boxes_out = boxes_out.astype(np.float32)

  size = np.array([new_h, new_w], np.int32)
  if image is None:
    return None, size, superpixels_out, boxes_out
  if (new_h, new_w) != (h, w):
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(image, (new_w, new_h), interpolation=method)
  if flip:
    image = cv2.flip(image, 1)
  image_out = np.zeros((*canvas, 3), np.uint8)
  image_out[:new_h, :new_w] = image
  return image_out, size, superpixels_out, boxes_out


def jitter_hsv(
  rng: np.random.Generator, image: np.ndarray, *, factor: float = 1.5
) -> np.ndarray:
  """Changes exposure and saturation at random (paper, section 4.1).

  Value and saturation of the HSV space are each multiplied by a number that is
  log-uniform in [1 / factor, factor], so that darker is as likely as brighter.

  Args:
    rng: the generator that the two numbers are drawn from.
    image: [H, W, 3] uint8 RGB.
    factor: the largest change, >= 1.

  Returns:
    [H, W, 3] uint8 RGB.

  Raises:
    ValueError: factor < 1.
  """
  if factor < 1:
    raise ValueError(f"factor is {factor}, must be >= 1 (1 changes nothing)")
  saturation, value = np.exp(rng.uniform(-1, 1, 2) * np.log(factor))
  # HSV's value is the top t, its saturation (t - low) / t: a channel c becomes
  # (t - (t - c) * by) * gain, where neither may exceed 1. OpenCV, since numpy
  # would keep other threads waiting.
  planes = cv2.split(image)
  top = cv2.max(cv2.max(planes[0], planes[1]), planes[2])
  low = cv2.min(cv2.min(planes[0], planes[1]), planes[2])
  levels = np.maximum(np.arange(256), 1).astype(np.float32)
  inverse_span = cv2.LUT(cv2.subtract(top, low), 1 / levels)
  by = cv2.multiply(top, inverse_span, dtype=cv2.CV_32F)
  by = cv2.min(by, saturation)
  gain = cv2.LUT(top, np.minimum(value, 255 / levels).astype(np.float32))
  slope = cv2.multiply(by, gain)
  offset = cv2.multiply(top, cv2.subtract(gain, slope), dtype=cv2.CV_32F)
  planes = [
    cv2.add(cv2.multiply(c, slope, dtype=cv2.CV_32F), offset, dtype=cv2.CV_8U)
    for c in planes
  ]
  return cv2.merge(planes)
