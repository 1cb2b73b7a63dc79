"""RoIAlign against a loop over its sample points."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import roi_align as eager_roi_align

roi_align = jax.jit(
  eager_roi_align, static_argnames=("stride", "output_size", "sampling_ratio")
)


def _sample(features, y, x):
  """Bilinear interpolation; zero more than a cell outside the grid."""
  height, width, channels = features.shape
  if y < -1 or y > height or x < -1 or x > width:
    return np.zeros(channels)
  y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
  y0, x0 = int(y), int(x)
  y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
  top = features[y0, x0] * (x0 + 1 - x) + features[y0, x1] * (x - x0)
  bottom = features[y1, x0] * (x0 + 1 - x) + features[y1, x1] * (x - x0)
  return top * (y0 + 1 - y) + bottom * (y - y0)


def _loop(features, boxes, stride, output_size, ratio):
  out = np.zeros((len(boxes), *output_size, features.shape[2]))
  for p, box in enumerate(boxes):
    y0, x0, y1, x1 = box / stride - 0.5
    bin_height, bin_width = (
      (y1 - y0) / output_size[0],
      (x1 - x0) / output_size[1],
    )
    rows = ratio or math.ceil(bin_height)
    columns = ratio or math.ceil(bin_width)
    for u in range(output_size[0]):
      for v in range(output_size[1]):
        for m in range(rows):
          for n in range(columns):
            y = y0 + (u + (m + 0.5) / rows) * bin_height
            x = x0 + (v + (n + 0.5) / columns) * bin_width
            out[p, u, v] += _sample(features, y, x) / (rows * columns)
  return out


def _case(proposals=10):
  rng = np.random.default_rng(0)
  features = rng.normal(size=(7, 9, 3)).astype(np.float32)
  boxes = np.sort(rng.uniform(-20, 90, (proposals, 2, 2)), axis=1)
  boxes = boxes.reshape(proposals, 4).astype(np.float32)
  boxes[0] = 0, 0, 56, 72
  return features, boxes


@pytest.mark.parametrize("output_size", [(7, 7), (2, 5)])
@pytest.mark.parametrize("ratio", [1, 2, 3, None])
def test_equals_the_loop(output_size, ratio):
  features, boxes = _case()
  got = roi_align(
    features, boxes, stride=8, output_size=output_size, sampling_ratio=ratio
  )
  expected = _loop(features, boxes, 8, output_size, ratio)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_ramp_gives_the_bin_centres():
  # Feature (y, x) is the pixel at the centre of its cell.
  centres = (np.arange(16) + 0.5) * 4
  features = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1)
  boxes = jnp.array([[8.0, 12.0, 40.0, 52.0]])
  got = roi_align(
    jnp.asarray(features, jnp.float32), boxes, stride=4, output_size=(4, 5)
  )
  np.testing.assert_allclose(got[0, :, 0, 0], [12, 20, 28, 36], rtol=1e-6)
  np.testing.assert_allclose(got[0, 0, :, 1], [16, 24, 32, 40, 48], rtol=1e-6)


@pytest.mark.parametrize("aligned_ratio", [2, None])
def test_equals_torchvision(aligned_ratio):
  torch = pytest.importorskip("torch", reason="the extra 'bench' has it")
  ops = pytest.importorskip("torchvision.ops")
  features, boxes = _case(30)
  boxes[1] = 8, 8, 8, 30  # no height
  image = torch.from_numpy(features.transpose(2, 0, 1)[None].copy())
  rois = np.concatenate([np.zeros((30, 1)), boxes[:, [1, 0, 3, 2]]], 1)
  expected = ops.roi_align(
    image,
    torch.from_numpy(rois.astype("f")),
    (4, 3),
    spatial_scale=1 / 8,
    sampling_ratio=aligned_ratio or -1,
    aligned=True,
  )
  got = roi_align(
    features, boxes, stride=8, output_size=(4, 3), sampling_ratio=aligned_ratio
  )
  np.testing.assert_allclose(
    got, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("ratio", [2, None])
@pytest.mark.parametrize("proposals", [1, 10])
def test_gradient(proposals, ratio):
  features, boxes = _case(proposals)
  check_grads(
    lambda f: roi_align(
      f, boxes, stride=8, output_size=(3, 2), sampling_ratio=ratio
    ),
    (jnp.asarray(features),),
    order=1,
    modes=["rev"],
    rtol=1e-2,
    atol=1e-2,
  )


@pytest.mark.parametrize("ratio", [2, None])
def test_accelerators_make_the_products_in_float32(ratio):
  features, boxes = _case(2)
  gradient = jax.jit(
    jax.grad(
      lambda f: roi_align(f, boxes, stride=8, sampling_ratio=ratio).sum()
    )
  )
  products = [
    line
    for line in gradient.lower(features).as_text().splitlines()
    if "dot_general" in line
  ]
  assert products
  # Their default is bfloat16 on TPUs, TF32 on GPUs.
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_vmap_bfloat16_and_no_proposals():
  features, boxes = _case()
  images = jnp.stack([features, features[::-1]])
  got = jax.vmap(lambda f: roi_align(f, boxes, stride=8))(images)
  for image, one in zip(images, got, strict=True):
    expected = _loop(np.asarray(image), boxes, 8, (7, 7), 2)
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)
  low = roi_align(images[0].astype(jnp.bfloat16), boxes, stride=8)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(low, np.float32), got[0], rtol=0.02, atol=0.02
  )
  gradient = jax.grad(lambda f: roi_align(f, boxes[:0], stride=8).sum())
  np.testing.assert_array_equal(gradient(images[0]), 0)


def test_bad_arguments():
  features, boxes = _case()
  with pytest.raises(ValueError, match=r"features.*vmap"):
    roi_align(features[None], boxes, stride=8)
  with pytest.raises(ValueError, match=r"boxes.*\[4, 10\]"):
    roi_align(features, boxes.T, stride=8)
  with pytest.raises(ValueError, match=r"boxes.*bool"):
    roi_align(features, boxes > 0, stride=8)
  for stride in (0, -8):
    with pytest.raises(ValueError, match=f"stride.*{stride}"):
      roi_align(features, boxes, stride=stride)
  for output_size in ((0, 7), 7):
    with pytest.raises(ValueError, match="output_size"):
      roi_align(features, boxes, stride=8, output_size=output_size)
  for ratio in (0, 2.0):
    with pytest.raises(ValueError, match=f"sampling_ratio.*{ratio}"):
      roi_align(features, boxes, stride=8, sampling_ratio=ratio)


@pytest.mark.parametrize("ratio", [2, None])
def test_number_of_boxes_may_be_left_open_in_an_export(ratio):
  (count,) = jax.export.symbolic_shape("n")
  align = functools.partial(roi_align, stride=2.0, sampling_ratio=ratio)
  exported = jax.export.export(jax.jit(align))(
    jax.ShapeDtypeStruct((5, 6, 3), jnp.float32),
    jax.ShapeDtypeStruct((count, 4), jnp.float32),
  )
  rng = np.random.default_rng(0)
  features = rng.normal(size=(5, 6, 3)).astype(np.float32)
  for n in (1, 4):
    boxes = np.tile(np.float32([0, 1, 7, 9]), (n, 1))
    np.testing.assert_allclose(
      exported.call(features, boxes), align(features, boxes), rtol=1e-5
    )
