"""Fusion of strips of ten pixels, worked by hand."""

import numpy as np

from jtsm_jax.evaluation.fusion import FusionSettings, fuse
from jtsm_jax.types import Detections
from tests.run_lengths import pack

# Things 0 and 1, stuff 2 and 3.
T = 2


def _strip(text):
  """A mask [1, 10] from a string: # is covered."""
  assert len(text) == 10
  return np.array([[c == "#" for c in text]])


def _detections(*entries):
  masks = np.array([_strip(mask) for _, _, mask in entries], bool)
  return Detections(
    proposal=np.arange(len(entries), dtype=np.int32),
    category=np.array([c for c, _, _ in entries], np.int32),
    score=np.array([s for _, s, _ in entries], np.float32),
    boxes=np.zeros((len(entries), 4), np.int32),
    **pack(masks.reshape(-1, 1, 10)),
  )


def _fuse(detections, stuff, **options):
  """The map as a string of ids, and (category, score, area) of each."""
  stuff = np.array([[-1 if c == "." else int(c) for c in stuff]], np.int32)
  score = np.linspace(0.1, 1.0, 10, dtype=np.float32)[None]
  settings = {"instance_score": 0.5, "stuff_area": 0.2} | options.pop(
    "settings", {}
  )
  found = fuse(
    detections,
    stuff,
    score,
    num_things=T,
    settings=FusionSettings(**settings),
    **options,
  )
  assert found.ids.dtype == np.int32
  assert [s.id for s in found.segments] == list(
    range(1, len(found.segments) + 1)
  )
  assert all(s.is_thing == (s.category < T) for s in found.segments)
  assert all((found.ids == s.id).sum() == s.area for s in found.segments)
  segments = [(s.category, round(s.score, 5), s.area) for s in found.segments]
  return "".join(str(i) for i in found.ids[0]), segments


def test_the_better_detection_comes_first_and_stuff_fills_the_rest():
  detections = _detections((1, 0.9, "###......."), (0, 0.6, ".####....."))
  # The second has four pixels of which two are taken: half, which may be.
  ids, segments = _fuse(detections, "2222222233")
  assert ids == "1112233344"
  assert segments == [
    (1, 0.9, 3),
    (0, 0.6, 2),
    (2, round((0.6 + 0.7 + 0.8) / 3, 5), 3),
    (3, 0.95, 2),
  ]


def test_detections_that_are_taken_by_more_than_the_share_are_left_out():
  taken = (1, 0.9, "####......"), (0, 0.8, "..###.....")
  assert _fuse(_detections(*taken), "..........")[0] == "1111000000"
  # Two of three are taken: more than a half, not more than 0.7.
  ids, _ = _fuse(
    _detections(*taken), "..........", settings={"instance_overlap": 0.7}
  )
  assert ids == "1111200000"
  # One that is covered wholly is left out even where all may be taken.
  hidden = (1, 0.9, "####......"), (0, 0.8, ".##.......")
  ids, segments = _fuse(
    _detections(*hidden), "..........", settings={"instance_overlap": 1.0}
  )
  assert ids == "1111000000"
  assert len(segments) == 1


def test_scores_below_the_threshold_are_left_out():
  detections = _detections((1, 0.5, "##........"), (0, 0.4, "....##...."))
  assert _fuse(detections, "..........")[0] == "1100000000"
  low = {"instance_score": 0.4}
  assert _fuse(detections, "..........", settings=low)[0] == "1100220000"


def test_small_stuff_is_void_and_area_is_what_is_left_of_it():
  # Stuff 3 has two pixels, 0.2 of the image, until a detection takes one.
  assert _fuse(_detections(), "22222222 3".replace(" ", "3"))[0] == "1111111122"
  detections = _detections((0, 0.9, ".........#"))
  assert _fuse(detections, "2222222233")[0] == "2222222201"
  assert (
    _fuse(_detections(), "2222222233", settings={"stuff_area": 0.3})[0]
    == "1111111100"
  )


def test_nothing_gives_a_void_map():
  assert _fuse(_detections(), "..........") == ("0000000000", [])
