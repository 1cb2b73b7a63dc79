"""Pictures, checked where their pixels can be worked out by hand."""

import dataclasses
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from jtsm_jax.reporting import visualize
from jtsm_jax.types import (
  Categories,
  Category,
  PanopticMap,
  Proposals,
  Segment,
  pack_members,
)


def categories(num_things, num_stuff):
  k = num_things + num_stuff
  return Categories(
    tuple(Category(i + 1, f"class{i}", i < num_things) for i in range(k))
  )


def chroma(rgb):
  lab = cv2.cvtColor((rgb[None] / 255).astype(np.float32), cv2.COLOR_RGB2Lab)
  return np.linalg.norm(lab[0, :, 1:], axis=1)


def halves(score=1.0):
  """Two things left and right of column 40, void in the last 20 rows."""
  ids = np.zeros((80, 80), np.int32)
  ids[:60, :40] = 11
  ids[:60, 40:] = 5
  return PanopticMap(
    ids,
    (
      Segment(11, 0, True, score, 2400),
      Segment(5, 0, True, score, 2400),
    ),
  )


GREY = np.full((80, 80, 3), 100, np.uint8)


@pytest.mark.parametrize(
  ("things", "stuff"), [(15, 6), (80, 53), (0, 2), (1, 0)]
)
def test_class_colours_are_distinct_vivid_and_muted(things, stuff):
  colours = visualize.class_colours(categories(things, stuff))
  assert colours.shape == (things + stuff, 3)
  assert colours.dtype == np.uint8
  apart = np.abs(colours[:, None].astype(int) - colours[None]).sum(-1)
  np.fill_diagonal(apart, 999)
  assert apart.min() >= 12
  if things and stuff:
    assert chroma(colours[:things]).min() > chroma(colours[things:]).max()


@pytest.mark.parametrize(("things", "stuff"), [(900, 0), (0, 900), (900, 900)])
def test_the_first_two_hundred_of_each_kind_are_distinct(things, stuff):
  colours = visualize.class_colours(categories(things, stuff))
  assert colours.shape == (things + stuff, 3)
  for kind in (colours[:things], colours[things:]):
    assert len(np.unique(kind[:200], axis=0)) == len(kind[:200])
    # The others share them evenly.
    shared = np.unique(kind, axis=0, return_counts=True)[1]
    assert not len(kind) or shared.max() - shared.min() <= 1


def test_class_colours_do_not_depend_on_the_number_of_classes():
  few = visualize.class_colours(categories(3, 2))
  many = visualize.class_colours(categories(20, 9))
  np.testing.assert_array_equal(few[:3], many[:3])
  np.testing.assert_array_equal(few[3:], many[20:22])


def test_overlay_mixes_colours_and_leaves_void_bare():
  names = categories(1, 1)
  out = visualize.overlay_panoptic(GREY, halves(), names, labels=False)
  assert out.shape == (640, 640, 3)
  assert out.dtype == np.uint8
  first, second, void = out[240, 160], out[240, 480], out[600, 320]
  assert void.tolist() == [100, 100, 100]
  colour = visualize.class_colours(names)[0]
  # The first instance has the colour of its class, the second a lighter one.
  np.testing.assert_allclose(first, 0.45 * 100 + 0.55 * colour, atol=1.5)
  assert second.astype(int).sum() > first.astype(int).sum() + 20
  # A white line on a dark halo stands between them.
  row = out[240, 300:340].astype(int).sum(axis=1)
  assert row.max() > 630
  assert row.min() < first.astype(int).sum() - 40


def test_alpha_is_the_opacity_of_the_colour():
  out = visualize.overlay_panoptic(
    GREY, halves(), categories(1, 1), alpha=0, labels=False
  )
  assert out[240, 160].tolist() == [100, 100, 100]


def test_label_stands_inside_its_segment_and_shows_the_score():
  names = categories(1, 1)
  plain, certain, scored = (
    visualize.overlay_panoptic(GREY, halves(s), names, labels=b)
    for s, b in ((1.0, False), (1.0, True), (0.75, True))
  )
  where = (certain != plain).any(axis=2)
  assert where.any()
  assert not where[480:].any()  # the void
  assert not where[:, 318:322].any()  # the line between the two
  # The score makes the label longer.
  assert (scored != plain).any(axis=2).sum() > 1.3 * where.sum()


def test_segment_smaller_than_its_label_has_none():
  ids = np.zeros((80, 80), np.int32)
  ids[10:12, 10:12] = 1
  tiny = PanopticMap(ids, (Segment(1, 0, True, 1.0, 4),))
  drawn = [
    visualize.overlay_panoptic(GREY, tiny, categories(1, 1), labels=b)
    for b in (False, True)
  ]
  np.testing.assert_array_equal(*drawn)


def test_labels_of_neighbours_do_not_cover_each_other():
  """Four thin rows, whose labels would overlap at their middles."""
  ids = np.repeat(np.arange(1, 17, dtype=np.int32), 5)[:, None].repeat(80, 1)
  rows = PanopticMap(
    ids, tuple(Segment(i, 0, True, 1.0, 400) for i in range(1, 17))
  )
  names = categories(1, 0)
  plain, labelled = (
    visualize.overlay_panoptic(GREY, rows, names, labels=b)
    for b in (False, True)
  )
  changed = (plain != labelled).any(axis=2).astype(np.uint8)
  # One plate has 24 x 80 pixels or so; all of them are there.
  one = PanopticMap(
    np.ones((80, 80), np.int32), (Segment(1, 0, True, 1, 6400),)
  )
  plate = (
    visualize.overlay_panoptic(GREY, one, names, labels=False)
    != visualize.overlay_panoptic(GREY, one, names)
  ).any(axis=2)
  assert changed.sum() > 15.5 * plate.sum()


def test_large_image_keeps_its_size_and_tiny_and_empty_ones_work():
  names = categories(1, 1)
  empty = PanopticMap(np.zeros((30, 900), np.int32), ())
  image = np.full((30, 900, 3), 7, np.uint8)
  out = visualize.overlay_panoptic(image, empty, names)
  np.testing.assert_array_equal(out, image)
  assert out is not image
  dot = PanopticMap(np.ones((1, 1), np.int32), (Segment(1, 1, False, 1.0, 1),))
  assert visualize.overlay_panoptic(
    np.zeros((1, 1, 3), np.uint8), dot, names
  ).shape == (640, 640, 3)


def test_lines_of_a_panorama_leave_room_for_its_segments():
  # Of 4 : 1 the lines are as thick as of 2 : 1, of a longer one no thicker.
  def lines(width):
    ids = np.repeat(np.int32([1, 2]), width // 2)[None].repeat(320, 0)
    halves = PanopticMap(
      ids, tuple(Segment(i, 0, True, 1.0, ids.size // 2) for i in (1, 2))
    )
    image = np.full((*ids.shape, 3), 100, np.uint8)
    out = visualize.overlay_panoptic(
      image, halves, categories(1, 1), labels=False
    )
    row = out[160].astype(int)
    return ((row != row[0]) & (row != row[-1])).any(1).sum()

  assert lines(640) < lines(1280) == lines(6400)


def test_input_image_is_not_changed():
  image = GREY.copy()
  visualize.overlay_panoptic(image, halves(), categories(1, 1))
  visualize.draw_mask(image, halves().ids == 5, (255, 0, 0), "cow")
  np.testing.assert_array_equal(image, GREY)


def test_superpixels_change_borders_and_padding_only():
  ids = np.zeros((80, 80), np.int32)
  ids[:, 40:] = 1
  ids[:, 70:] = -1
  out = visualize.draw_superpixels(GREY, ids)
  assert (out[:, 10:310] == 100).all()
  assert (out[:, 330:550] == 100).all()
  assert (out[100, 310:330] != 100).any()
  assert (out[:, 570:] < 60).all()


def proposals(membership):
  superpixels = np.zeros((80, 80), np.int32)
  superpixels[:, 40:] = 1
  superpixels[:, 70:] = -1
  p = len(membership)
  return Proposals(
    superpixels,
    pack_members(np.array(membership, bool).reshape(p, 2)),
    np.zeros((p, 4), np.int32),
    np.linspace(1, 0, p).astype(np.float32),
  )


def test_proposals_are_outlined_and_padding_belongs_to_none():
  # Superpixel 1 ends at column 70 x 8: a line there, none at the image's edge.
  out = visualize.draw_proposals(GREY, proposals([[False, True]]), 5)
  assert (out[:600, 630:] == 100).all()
  assert (out[100, 550:570] != 100).any()
  # The best is yellow.
  line = out[100, 550:570].astype(int)
  assert (line[:, 0] - line[:, 2]).max() > 100


def test_best_proposal_is_on_top_and_n_limits():
  both = proposals([[True, False], [True, False], [False, True]])
  one = proposals([[True, False]])
  first = visualize.draw_proposals(GREY, one, 1)
  np.testing.assert_array_equal(visualize.draw_proposals(GREY, both, 1), first)
  line = visualize.draw_proposals(GREY, both, 2)[100, 310:330].astype(int)
  assert (line[:, 0] - line[:, 2]).max() > 100  # yellow over violet
  np.testing.assert_array_equal(
    visualize.draw_proposals(GREY, both, 0),
    visualize.draw_proposals(GREY, proposals([]), 3),
  )


def test_scores_are_colours_and_the_best_is_on_top():
  colour = visualize.score_ramp(256).astype(int)
  # Left: 0.2 below 1.0. Right: 0.4. Padding, at the far right: none.
  store = proposals([[True, True], [False, True], [True, False]])
  scores = np.array([0.2, 0.4, 1.0], np.float32)
  out = visualize.draw_scores(GREY, store, scores, 9)
  left, right = out[320, 160], out[320, 500]
  np.testing.assert_allclose(left, (100 + colour[255]) / 2, atol=1)
  np.testing.assert_allclose(right, (100 + colour[102]) / 2, atol=1)
  assert (out[:600, 630:] == 100).all()
  # One of them alone; and what has no score is left out.
  out = visualize.draw_scores(GREY, store, scores, 1)
  np.testing.assert_allclose(out[320, 160], left, atol=1)
  np.testing.assert_array_equal(out[320, 500], [100] * 3)
  for nothing in (np.zeros(3, np.float32), scores):
    count = 9 if not nothing.any() else 0
    out = visualize.draw_scores(GREY, store, nothing, count)
    assert (out == 100).all()


def test_scores_outline_what_better_ones_hide():
  # The right half lies below the best, which is everything.
  store = proposals([[True, True], [False, True]])
  out = visualize.draw_scores(GREY, store, np.array([0.9, 0.1], np.float32), 2)
  even = out[320, 160]
  assert (out[320, 310:330] != even).any()
  np.testing.assert_array_equal(out[320, 500], even)


def test_scores_lie_on_grey():
  image = np.zeros((80, 80, 3), np.uint8)
  image[..., 0] = 255
  out = visualize.draw_scores(image, proposals([]), np.zeros(0, np.float32), 3)
  assert (out == out[..., :1]).all()


def test_large_pictures_for_sheets_are_small_and_look_the_same():
  """Outlines on millions of pixels would take long."""
  rng = np.random.default_rng(0)
  image = np.kron(rng.integers(60, 200, (4, 8, 1)), np.ones((400, 400, 3)))
  image = image.astype(np.uint8)
  store = dataclasses.replace(
    proposals([[False, True], [True, False]]),
    superpixels=np.repeat(np.repeat([[0, 1], [1, 0]], 800, 0), 1600, 1),
  )
  ids = np.where(store.superpixels == 0, 5, 0).astype(np.int32)
  panoptic = PanopticMap(ids, (Segment(5, 0, True, 0.5, int((ids > 0).sum())),))
  scores = np.array([0.3, 0.9], np.float32)
  kinds = categories(1, 1)
  drawn = {
    "superpixels": lambda i, s: visualize.draw_superpixels(i, s),
    "proposals": lambda i, s: visualize.draw_proposals(
      i, dataclasses.replace(store, superpixels=s), 2
    ),
    "scores": lambda i, s: visualize.draw_scores(
      i, dataclasses.replace(store, superpixels=s), scores, 2
    ),
    "mask": lambda i, s: visualize.draw_mask(i, s == 0, (255, 0, 0), "cow"),
    "panoptic": lambda i, s: visualize.sketch_panoptic(
      i,
      dataclasses.replace(panoptic, ids=np.where(s == 0, 5, 0)),
      kinds,
    ),
  }
  half = image[::2, ::2], store.superpixels[::2, ::2]
  for name, draw in drawn.items():
    out = draw(image, store.superpixels)
    assert out.shape == (640, 1280, 3), name
    wanted = cv2.resize(draw(*half), (1280, 640), interpolation=cv2.INTER_AREA)
    difference = np.abs(out.astype(int) - wanted)
    assert difference.mean() < 3, name
  assert visualize.overlay_panoptic(image, panoptic, kinds).shape == image.shape


def test_draw_mask_paints_the_mask_only():
  mask = np.zeros((80, 80), bool)
  mask[20:60, 20:60] = True
  out = visualize.draw_mask(GREY, mask, (200, 0, 0), alpha=0.5)
  np.testing.assert_allclose(out[320, 320], [150, 50, 50], atol=1)
  assert (out[:140] == 100).all()
  labelled = visualize.draw_mask(GREY, mask, (200, 0, 0), "cow", alpha=0.5)
  changed = np.argwhere((labelled != out).any(axis=2))
  assert len(changed) > 100
  assert changed.min() > 160
  assert changed.max() < 480


@pytest.mark.parametrize(
  ("draw", "message"),
  [
    (lambda i: visualize.draw_mask(i, np.ones((3, 3)), (0, 0, 0)), "mask"),
    (lambda i: visualize.draw_superpixels(i, np.ones((3, 3))), "superpixel"),
    (
      lambda i: visualize.overlay_panoptic(
        i, PanopticMap(np.zeros((3, 3), np.int32), ()), categories(1, 1)
      ),
      r"panoptic map is \(3, 3\), the image \(80, 80\)",
    ),
    (
      lambda i: visualize.draw_mask(i / 255, np.ones((80, 80)), (0, 0, 0)),
      "float64",
    ),
  ],
)
def test_wrong_shapes_and_types_are_named(draw, message):
  with pytest.raises(ValueError, match=message):
    draw(GREY)


def test_contact_sheet_places_tiles_in_a_grid():
  red = np.zeros((50, 100, 3), np.uint8) + np.uint8([255, 0, 0])
  blue = np.zeros((100, 50, 3), np.uint8) + np.uint8([0, 0, 255])
  sheet = visualize.contact_sheet([[red, blue], [None, red]], tile_size=200)
  gap = 5
  assert sheet.shape == (gap + 200 + gap + 100 + gap, 2 * 200 + 3 * gap, 3)
  assert sheet[gap + 50, gap + 100].tolist() == [255, 0, 0]
  assert sheet[gap + 150, gap + 100].tolist() == [255, 255, 255]
  assert sheet[gap + 100, 2 * gap + 300].tolist() == [0, 0, 255]
  assert (sheet[gap + 210 :, : gap + 200] == 255).all()  # the gap
  titled = visualize.contact_sheet(
    [[red, blue], [None, red]],
    ["a title that is far too long for a column", "b"],
    row_titles=["first", "second"],
    tile_size=200,
  )
  assert titled.shape[1] == sheet.shape[1]
  assert titled.shape[0] > sheet.shape[0]
  assert (titled[:20] < 128).any()  # there is text
  # A long title is cut and stays in its column.
  assert (titled[:20, gap + 200 : 2 * gap + 200] == 255).all()


def test_contact_sheet_faults():
  tile = np.zeros((4, 4, 3), np.uint8)
  with pytest.raises(ValueError, match="at least one"):
    visualize.contact_sheet([[]])
  with pytest.raises(ValueError, match="2 titles for 1 columns"):
    visualize.contact_sheet([[tile]], ["a", "b"])
  with pytest.raises(ValueError, match="1 row titles for 2 rows"):
    visualize.contact_sheet([[tile], [tile]], row_titles=["a"])
  with pytest.raises(ValueError, match="wanted uint8"):
    visualize.contact_sheet([[tile[..., 0]]])


@pytest.mark.parametrize(("name", "error"), [("a.png", 0), ("b.JPG", 12)])
def test_write_image_keeps_rgb_order(tmp_path, name, error):
  ramp = np.linspace(0, 200, 32).astype(np.uint8)
  rgb = np.stack(np.broadcast_arrays(ramp[:, None], ramp, 30), axis=-1)
  path = tmp_path / "new" / name
  visualize.write_image(path, rgb.astype(np.uint8))
  back = cv2.imread(str(path))[..., ::-1].astype(int)
  assert np.abs(back - rgb).max() <= error
  assert os.listdir(path.parent) == [name]


@pytest.mark.parametrize(
  ("name", "limit"), [("a.jpg", 65_500), ("a.png", 1_000_000)]
)
@pytest.mark.parametrize("is_wide", [False, True])
def test_what_is_too_long_for_its_format_is_shrunk(
  tmp_path, name, limit, is_wide
):
  ramp = np.linspace(0, 250, 2 * limit + 100).astype(np.uint8)
  rgb = np.repeat(ramp[:, None, None], 3, 2).repeat(3, 1)
  rgb = rgb.swapaxes(0, 1) if is_wide else rgb
  visualize.write_image(tmp_path / name, rgb)
  with Image.open(tmp_path / name) as image:
    assert image.size == ((limit, 1) if is_wide else (1, limit))
    ends = np.asarray(image).reshape(-1, 3)[[0, -1]]
  np.testing.assert_allclose(ends, [[0] * 3, [250] * 3], atol=2)


def test_failed_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  path.write_bytes(b"old")

  def full(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(OSError, match="disk full"):
    visualize.write_image(path, GREY)
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["a.png"]


def test_write_image_wants_a_known_suffix(tmp_path):
  with pytest.raises(ValueError, match=r"a\.tif: wanted .*\.png"):
    visualize.write_image(tmp_path / "a.tif", GREY)
