"""Tests of the proposals of whole images."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from jtsm_jax.proposals import generate
from jtsm_jax.types import InputError


def scene(side=120):
  """A disc and a striped square on a plain and a checkered ground.

  Returns the image and the masks of the four regions.
  """
  y, x = np.mgrid[:side, :side]
  ground = x + 0.2 * y > side * 0.6
  disc = np.hypot(y - side * 0.3, x - side * 0.3) < side * 0.15
  square = (abs(y - side * 0.7) < side * 0.15) & (
    abs(x - side * 0.65) < side * 0.15
  )
  stripes, checks = (x // 3) % 2, (x // 4 + y // 4) % 2
  image = np.empty((side, side, 3))
  image[:] = (90, 130, 80)
  image[ground] = np.array([150, 120, 70]) + 50 * checks[ground][:, None]
  image[disc] = (60, 60, 200)
  image[square] = np.where(
    stripes[square][:, None] == 0, (210, 40, 60), (120, 20, 110)
  )
  image += np.random.default_rng(5).normal(0, 4, image.shape)
  masks = [disc, square, ground & ~square & ~disc, ~ground & ~square & ~disc]
  return np.clip(image, 0, 255).astype(np.uint8), masks


def best_iou(proposals, mask):
  masks = proposals.membership[:, proposals.superpixels]
  return ((masks & mask).sum((1, 2)) / (masks | mask).sum((1, 2))).max()


def check(proposals, shape, settings):
  """What every result obeys."""
  superpixels, member = proposals.superpixels, proposals.membership
  assert superpixels.shape == shape
  assert superpixels.dtype == np.int32
  np.testing.assert_array_equal(
    np.unique(superpixels), np.arange(member.shape[1])
  )
  assert 1 <= len(member) <= settings.max_proposals
  assert len(np.unique(member, axis=0)) == len(member)
  assert member.any(1).all()
  assert member.all(1).sum() == 1  # the whole image, once
  assert proposals.boxes.dtype == np.int32
  assert proposals.scores.dtype == np.float32
  assert (np.diff(proposals.scores) < 0).all()
  for mask_of, box in list(zip(member, proposals.boxes, strict=True))[::17]:
    rows, columns = np.nonzero(mask_of[superpixels])
    np.testing.assert_array_equal(
      box,
      [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1],
    )


@pytest.fixture(scope="module")
def proposals():
  return generate.generate_proposals(scene()[0])


def test_known_regions_are_found(proposals):
  check(proposals, (120, 120), generate.ProposalSettings())
  for mask in scene()[1]:
    assert best_iou(proposals, mask) > 0.9


def test_same_image_same_result(proposals):
  again = generate.generate_proposals(scene()[0])
  for field in dataclasses.fields(proposals):
    np.testing.assert_array_equal(
      getattr(again, field.name), getattr(proposals, field.name)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (2, 2), (8, 8)])
@pytest.mark.parametrize("kind", ["constant", "noise", "grey"])
def test_tiny_images(shape, kind):
  rng = np.random.default_rng(0)
  image = {
    "constant": np.full((*shape, 3), 200),
    "noise": rng.integers(0, 256, (*shape, 3)),
    "grey": np.repeat(rng.integers(0, 256, (*shape, 1)), 3, 2),
  }[kind].astype(np.uint8)
  check(generate.generate_proposals(image), shape, generate.ProposalSettings())


@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_image(value):
  found = generate.generate_proposals(np.full((60, 80, 3), value, np.uint8))
  check(found, (60, 80), generate.ProposalSettings())


def test_noise_uses_all_superpixels():
  image = np.random.default_rng(1).integers(0, 256, (100, 90, 3), np.uint8)
  settings = generate.ProposalSettings(num_superpixels=80, max_proposals=60)
  found = generate.propose(image, settings)
  check(found, (100, 90), settings)
  assert found.membership.shape == (60, 80)


@pytest.mark.parametrize("max_proposals", [1, 2, 5])
def test_few_proposals_still_hold_the_whole_image(max_proposals):
  settings = generate.ProposalSettings(max_proposals=max_proposals)
  found = generate.propose(scene(60)[0], settings)
  check(found, (60, 60), settings)


def test_large_image_is_computed_small_and_returned_in_full():
  small, masks = scene(100)
  image = np.repeat(np.repeat(small, 5, 0), 7, 1)
  settings = generate.ProposalSettings(max_side=140)
  found = generate.propose(image, settings)
  check(found, (500, 700), settings)
  thinned = dataclasses.replace(
    found, superpixels=found.superpixels[2::5, 3::7]
  )
  for mask in masks:
    assert best_iou(thinned, mask) > 0.85


def test_photograph_of_twelve_megapixels():
  small, _ = scene(200)
  image = np.repeat(np.repeat(small, 15, 0), 20, 1)
  found = generate.generate_proposals(image, preset="fast")
  settings = generate.PRESETS["fast"]
  assert found.superpixels.shape == (3000, 4000)
  assert len(found.membership) <= settings.max_proposals
  assert found.membership.shape[1] <= settings.num_superpixels
  assert (found.boxes[:, 2:] <= (3000, 4000)).all()
  assert (found.boxes[:, :2] < found.boxes[:, 2:]).all()


@pytest.mark.parametrize("preset", generate.PRESETS)
def test_grey_photograph(preset):
  grey = scene(90)[0].mean(2).astype(np.uint8)
  image = np.repeat(grey[..., None], 3, 2)
  found = generate.generate_proposals(image, preset=preset, max_proposals=300)
  check(found, (90, 90), generate.preset_settings(preset, max_proposals=300))


def test_every_proposal_is_connected():
  found = generate.generate_proposals(scene()[0], max_proposals=300)
  for row in found.membership:
    mask = row[found.superpixels].astype(np.uint8)
    assert cv2.connectedComponents(mask, connectivity=4)[0] == 2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(preset="best"), "'best' is unknown"),
    (dict(max_proposals=0), "max_proposals is 0"),
    (dict(max_proposals=4001), "max_proposals is 4001"),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    generate.generate_proposals(scene(20)[0], **options)


def test_extreme_shape():
  image = np.random.default_rng(0).integers(0, 256, (2, 3000, 3), np.uint8)
  check(
    generate.generate_proposals(image),
    (2, 3000),
    generate.ProposalSettings(),
  )


def test_large_superpixels_are_proposals():
  """A plain ground with few superpixels: each large one stands alone."""
  settings = generate.ProposalSettings(num_superpixels=6)
  found = generate.propose(scene(80)[0], settings)
  sizes = np.bincount(found.superpixels.ravel())
  large = np.flatnonzero(sizes >= 0.05 * 80 * 80)
  assert len(large) >= 3
  single = found.membership[found.membership.sum(1) == 1]
  assert single[:, large].any(0).all()


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((4, 4), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((4, 4, 3), np.float32),
    np.zeros((0, 4, 3), np.uint8),
  ],
)
def test_wrong_images_are_refused(image):
  with pytest.raises(ValueError, match=r"image is"):
    generate.generate_proposals(image)


def test_settings_are_checked_and_keyed():
  with pytest.raises(InputError, match="num_superpixels is 0"):
    generate.ProposalSettings(num_superpixels=0)
  key = generate.settings_key(generate.ProposalSettings())
  assert key == generate.settings_key(generate.ProposalSettings())
  assert key.startswith(f"v{generate.VERSION}-")
  other = generate.ProposalSettings(max_proposals=399)
  assert key != generate.settings_key(other)
