"""Sheets: which tiles they hold."""

import numpy as np
import pytest

from jtsm_jax.proposals.quality import segments_of_map
from jtsm_jax.reporting import stages
from jtsm_jax.types import (
  Categories,
  Category,
  PanopticMap,
  Proposals,
  Segment,
  pack_members,
)

CATEGORIES = Categories((Category(1, "cow", True), Category(2, "grass", False)))
IMAGE = np.full((40, 60, 3), 120, np.uint8)
LEFT = np.zeros((40, 60), bool)
LEFT[:, :30] = True
PANOPTIC = PanopticMap(
  np.where(LEFT, 1, 2).astype(np.int32),
  (Segment(1, 0, True, 0.9, 1200), Segment(2, 1, False, 0.8, 1200)),
)
PROPOSALS = Proposals(
  superpixels=(~LEFT).astype(np.int32),
  member_bits=pack_members(np.eye(2, dtype=bool)),
  boxes=np.array([[0, 0, 40, 30], [0, 30, 40, 60]], np.int32),
  scores=np.array([2.0, 1.0], np.float32),
)


@pytest.fixture
def sheets(monkeypatch):
  """The rows and titles that are laid out, besides the true picture."""
  calls = []
  true_sheet = stages.contact_sheet

  def contact_sheet(rows, titles, **options):
    calls.append((rows, titles))
    return true_sheet(rows, titles, **options)

  monkeypatch.setattr(stages, "contact_sheet", contact_sheet)
  return calls


@pytest.mark.parametrize("target", [None, PANOPTIC])
def test_prediction_sheet_has_the_target_only_where_there_is_one(
  sheets, target
):
  found = stages.prediction_sheet(
    IMAGE, PROPOSALS, PANOPTIC, target, CATEGORIES
  )
  [([row], titles)] = sheets
  assert len(row) == len(titles) == (4 if target is None else 5)
  assert ("ground truth" in titles) == (target is not None)
  np.testing.assert_array_equal(row[0], IMAGE)
  # Every other tile shows something else than the photograph.
  assert all(
    len(np.unique(tile.reshape(-1, 3), axis=0)) > 1 for tile in row[1:]
  )
  assert found.dtype == np.uint8
  assert found.ndim == 3


def test_mining_sheet_has_a_row_for_each_segment(sheets):
  found = stages.mining_sheet(
    IMAGE, [(0, LEFT, LEFT), (1, ~LEFT, LEFT)], CATEGORIES
  )
  [(rows, titles)] = sheets
  assert titles == ["image", "mined segment", "pseudo mask"]
  assert [len(row) for row in rows] == [3, 3]
  # The first segment was left as it is, the second was not.
  np.testing.assert_array_equal(rows[0][1], rows[0][2])
  assert (rows[1][1] != rows[1][2]).any()
  one = stages.mining_sheet(IMAGE, [(0, LEFT, None)], CATEGORIES)
  assert found.shape[0] > one.shape[0]
  assert sheets[1][0][0][2] is None  # no mask, no picture of it


def test_an_image_of_which_nothing_is_mined_is_shown_alone(sheets):
  stages.mining_sheet(IMAGE, [], CATEGORIES)  # it has no tag
  [([[image, *others]], _)] = sheets
  np.testing.assert_array_equal(image, IMAGE)
  assert others == [None, None]


def test_best_proposals_are_labelled_with_their_iou():
  """A small thing before a large one, each covered in part."""
  ids = np.ones((4, 10), np.int32)
  ids[:2, :2] = 2
  ids[3] = 0  # void, which counts nowhere
  target = PanopticMap(
    ids, (Segment(2, 0, True, 1.0, 4), Segment(1, 1, False, 1.0, 26))
  )
  superpixels = np.zeros((4, 10), np.int32)
  superpixels[:2, :3] = 1
  superpixels[:, 5:] = 2
  proposals = Proposals(
    superpixels=superpixels,
    member_bits=pack_members(np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1]], bool)),
    boxes=np.zeros((3, 4), np.int32),
    scores=np.array([3.0, 2.0, 1.0], np.float32),
  )
  found = stages.best_proposals(proposals, segments_of_map(target))
  assert [s.id for s in found.segments] == [2, 1]  # in the order of the truth
  assert [s.category for s in found.segments] == [1, 0]
  assert [s.score for s in found.segments] == pytest.approx([26 / 30, 4 / 6])
  np.testing.assert_array_equal(found.ids == 1, superpixels == 1)
  assert [s.area for s in found.segments] == [34, 6]


def test_proposal_sheet(sheets):
  truth = segments_of_map(PANOPTIC)
  stages.proposal_sheet(IMAGE, PROPOSALS, truth, CATEGORIES)
  [([row], titles)] = sheets
  assert len(row) == len(titles) == 4
  assert titles[0] == "2 superpixels"
  assert titles[1] == "first 2 of 2 proposals"
