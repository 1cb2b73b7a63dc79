"""Tests of decoding, cropping and scaling."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from jtsm_jax.data import transforms
from jtsm_jax.types import InputError, Proposals, pack_members

# Left half red, right half blue; top row of the red half green.
PICTURE = np.zeros((4, 6, 3), np.uint8)
PICTURE[:, :3] = (255, 0, 0)
PICTURE[:, 3:] = (0, 0, 255)
PICTURE[0, :3] = (0, 255, 0)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
  data = io.BytesIO()
  image.save(data, format=file_format, **options)
  return data.getvalue()


def fit(image, superpixels, boxes, *, canvas, flip):
  """The parts together: an image and its proposals on a canvas."""
  h, w = transforms.scaled_size(superpixels.shape, canvas)
  image_out = np.zeros((*canvas, 3), np.uint8)
  if image is not None:
    transforms.scale_image(image, image_out[:h, :w], flip=flip)
  superpixels_out = np.full(canvas, -1, np.int32)
  transforms.scale_labels(superpixels, superpixels_out[:h, :w], flip=flip)
  boxes = transforms.scale_boxes(boxes, superpixels.shape, (h, w), flip=flip)
  return image_out, np.array([h, w]), superpixels_out, boxes


def test_png_is_decoded_exactly():
  decoded = transforms.decode_image(encode(Image.fromarray(PICTURE)))
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, PICTURE)


# What a viewer does with each orientation, written with numpy alone.
UPRIGHT = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: np.rot90(a, -1),
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_exif_rotation_is_applied(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(Image.fromarray(PICTURE), exif=exif)
  decoded = transforms.decode_image(data)
  np.testing.assert_array_equal(decoded, UPRIGHT[orientation](PICTURE))


def test_garbled_exif_is_no_rotation():
  data = encode(
    Image.fromarray(PICTURE), "JPEG", exif=b"Exif\0\0garbage", quality=95
  )
  assert transforms.decode_image(data).shape == (4, 6, 3)


def test_grey_becomes_rgb():
  grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
  decoded = transforms.decode_image(encode(Image.fromarray(grey)))
  np.testing.assert_array_equal(decoded, np.stack([grey] * 3, -1))


def test_one_bit_becomes_black_and_white():
  bits = np.array([[0, 255], [255, 0]], np.uint8)
  decoded = transforms.decode_image(encode(Image.fromarray(bits).convert("1")))
  np.testing.assert_array_equal(decoded[..., 0], bits)


def test_sixteen_bits_keep_the_high_byte():
  grey = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
  decoded = transforms.decode_image(encode(Image.fromarray(grey)))
  np.testing.assert_array_equal(decoded[..., 1], [[0, 0, 1], [128, 255, 255]])


def test_palette_becomes_rgb():
  image = Image.fromarray(PICTURE).quantize(4)
  assert image.mode == "P"
  decoded = transforms.decode_image(encode(image))
  np.testing.assert_array_equal(decoded, PICTURE)


def test_cmyk_jpeg_becomes_rgb():
  flat = Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK")
  decoded = transforms.decode_image(encode(flat, "JPEG", quality=95))
  assert decoded.shape == (16, 16, 3)
  np.testing.assert_allclose(decoded[8, 8], (200, 40, 40), atol=4)


def test_transparent_pixels_lie_on_white():
  rgba = np.zeros((1, 3, 4), np.uint8)
  rgba[0, :, 3] = (0, 255, 51)  # Hidden, opaque and 20 % black.
  decoded = transforms.decode_image(encode(Image.fromarray(rgba)))
  np.testing.assert_array_equal(decoded[0, :, 0], (255, 0, 204))


def test_one_pixel():
  data = encode(Image.fromarray(PICTURE[:1, :1]))
  np.testing.assert_array_equal(transforms.decode_image(data), PICTURE[:1, :1])


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 48)])
def test_jpeg_is_what_pillow_makes_of_it(size, subsampling, progressive):
  noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  data = encode(
    Image.fromarray(noise),
    "JPEG",
    quality=80,
    subsampling=subsampling,
    progressive=progressive,
  )
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(image)
  np.testing.assert_array_equal(transforms.decode_image(data), expected)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (20_000, 3)])
def test_a_long_strip(shape):
  pixels = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
  decoded = transforms.decode_image(encode(Image.fromarray(pixels)))
  np.testing.assert_array_equal(decoded[..., 2], pixels)
  image, size, superpixels, _ = fit(
    decoded,
    np.zeros(shape, np.int32),
    np.zeros((0, 4)),
    canvas=(64, 96),
    flip=True,
  )
  assert image.shape == (64, 96, 3)
  assert size.min() == 1
  assert (superpixels == 0).sum() == size.prod()


def test_sixteen_bits_of_colour():
  high = np.array([[[1, 2, 3], [250, 128, 0]]], np.uint8)
  wide = high.astype(np.uint16) * 256 + 7
  data = cv2.imencode(".png", wide[..., ::-1])[1].tobytes()
  np.testing.assert_array_equal(transforms.decode_image(data), high)


def test_only_the_first_frame_counts():
  frames = [Image.new("RGB", (4, 3), c) for c in ("red", "blue")]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  decoded = transforms.decode_image(data)
  np.testing.assert_array_equal(decoded, np.full((3, 4, 3), (255, 0, 0)))


def test_empty_file_is_refused():
  with pytest.raises(InputError, match=r"cow\.jpg: the file is empty"):
    transforms.decode_image(b"", name="cow.jpg")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_truncated_file_is_refused(file_format):
  noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
  data = encode(Image.fromarray(noise.astype(np.uint8)), file_format)
  with pytest.raises(InputError, match="cow: cannot be decoded"):
    transforms.decode_image(data[: len(data) // 2], name="cow")


def test_text_is_refused():
  with pytest.raises(InputError, match=r"no known image format.*replace it"):
    transforms.decode_image(b"<html>not found</html>")


@pytest.mark.parametrize("side", [9_000, 30_000])
def test_decompression_bomb_is_refused(side):
  # A few bytes that promise side x side pixels.
  header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
  data += struct.pack(">I", zlib.crc32(header))
  body = b"IDAT" + zlib.compress(bytes(1000))
  data += struct.pack(">I", len(body) - 4) + body
  data += struct.pack(">I", zlib.crc32(body))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with pytest.raises(InputError, match=r"scale the image down|bomb"):
      transforms.decode_image(data)


def test_fit_shrinks_by_two():
  # 4 x 6 on a canvas of 4 x 3: scale min(1, 1/2), so 2 x 3 pixels.
  superpixels = np.arange(24, dtype=np.int32).reshape(4, 6)
  boxes = np.array([[0, 0, 4, 6], [1, 2, 3, 4]])
  image, size, out, boxes = fit(
    PICTURE, superpixels, boxes, canvas=(4, 3), flip=False
  )
  np.testing.assert_array_equal(size, [2, 3])
  # The centre of pixel i lies at 2 i + 1: source pixel 2 i + 1.
  np.testing.assert_array_equal(
    out, [[7, 9, 11], [19, 21, 23], [-1, -1, -1], [-1, -1, -1]]
  )
  np.testing.assert_array_equal(boxes, [[0, 0, 2, 3], [0.5, 1, 1.5, 2]])
  assert boxes.dtype == np.float32
  # Area: the mean of 2 x 2 pixels. Top row: half green, half red.
  np.testing.assert_allclose(image[0, 0], (127.5, 127.5, 0), atol=1)
  np.testing.assert_array_equal(
    image[1], [(255, 0, 0), (128, 0, 128), (0, 0, 255)]
  )
  assert not image[2:].any()


def test_fit_enlarges_by_three():
  superpixels = np.array([[0, 1]], np.int32)
  image, size, out, boxes = fit(
    np.full((1, 2, 3), 9, np.uint8),
    superpixels,
    np.array([[0, 1, 1, 2]]),
    canvas=(3, 8),
    flip=False,
  )
  np.testing.assert_array_equal(size, [3, 6])
  np.testing.assert_array_equal(out, [[0, 0, 0, 1, 1, 1, -1, -1]] * 3)
  np.testing.assert_array_equal(boxes, [[0, 3, 3, 6]])
  assert (image[:, :6] == 9).all()
  assert not image[:, 6:].any()


def test_flip_mirrors_inside_the_images_own_width():
  superpixels = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
  picture = PICTURE[:2, 1:4]
  image, _, out, boxes = fit(
    picture, superpixels, np.array([[0, 0, 1, 1]]), canvas=(3, 3), flip=True
  )
  np.testing.assert_array_equal(out, [[2, 1, 0], [5, 4, 3], [-1, -1, -1]])
  np.testing.assert_array_equal(boxes, [[0, 2, 1, 3]])
  np.testing.assert_array_equal(image[:2], picture[:, ::-1])
  # Now with padding at the right: it stays there.
  _, _, out, boxes = fit(
    None, superpixels, np.array([[0, 0, 1, 1]]), canvas=(2, 5), flip=True
  )
  np.testing.assert_array_equal(out, [[2, 1, 0, -1, -1], [5, 4, 3, -1, -1]])
  np.testing.assert_array_equal(boxes, [[0, 2, 1, 3]])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("canvas", [(50, 70), (13, 64), (200, 31)])
def test_boxes_stay_around_their_masks(canvas, flip):
  superpixels = np.zeros((29, 41), np.int32)
  superpixels[5:20, 8:31] = 1
  _, size, out, boxes = fit(
    None, superpixels, np.array([[5, 8, 20, 31]]), canvas=canvas, flip=flip
  )
  rows, columns = np.nonzero(out == 1)
  tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
  np.testing.assert_allclose(boxes[0], tight, atol=0.5 + 1e-5)
  assert (out[: size[0], : size[1]] >= 0).all()
  assert (out == -1).sum() == out.size - size.prod()
  assert size[0] == canvas[0] or size[1] == canvas[1]


def test_an_extreme_image_keeps_one_pixel():
  _, size, out, _ = fit(
    None,
    np.zeros((1, 500), np.int32),
    np.zeros((0, 4)),
    canvas=(8, 8),
    flip=False,
  )
  np.testing.assert_array_equal(size, [1, 8])
  assert (out[0] == 0).all()


def shown_boxes(superpixels, membership):
  """Tight boxes of what a map shows of each proposal, pixel by pixel."""
  boxes = []
  for members in membership:
    rows, columns = np.nonzero(members[superpixels])
    boxes.append(
      [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
      if len(rows)
      else None
    )
  return boxes


@pytest.mark.parametrize("seed", range(20))
def test_crop_keeps_boxes_tight(seed):
  rng = np.random.default_rng(seed)
  h, w = rng.integers(1, 30, 2)
  superpixels = rng.integers(0, 9, (h, w)).astype(np.int32)
  membership = rng.random((21, 9)) < 0.2
  whole = shown_boxes(superpixels, membership)
  kept = [b is not None for b in whole]
  membership = membership[kept]
  boxes = np.array([b for b in whole if b], np.int32).reshape(-1, 4)
  proposals = Proposals(
    superpixels, pack_members(membership), boxes, np.ones(len(boxes))
  )
  y0, y1 = sorted(rng.choice(h + 1, 2, replace=False).tolist())
  x0, x1 = sorted(rng.choice(w + 1, 2, replace=False).tolist())
  part, found, left = transforms.crop_proposals(proposals, (y0, x0, y1, x1))
  np.testing.assert_array_equal(part, superpixels[y0:y1, x0:x1])
  for box, any_left, wanted in zip(
    found.tolist(), left, shown_boxes(part, membership), strict=True
  ):
    assert any_left == (wanted is not None)
    assert box == (wanted or [0, 0, 1, 1])


def test_a_window_of_the_whole_image_changes_nothing():
  superpixels = np.array([[0, 1], [2, 2]], np.int32)
  boxes = np.array([[0, 0, 2, 2], [0, 1, 1, 2]], np.int32)
  members = np.array([[1, 0, 1], [0, 1, 0]], bool)
  proposals = Proposals(superpixels, pack_members(members), boxes, np.ones(2))
  part, found, left = transforms.crop_proposals(proposals, (0, 0, 2, 2))
  np.testing.assert_array_equal(part, superpixels)
  np.testing.assert_array_equal(found, boxes)
  assert left.all()
