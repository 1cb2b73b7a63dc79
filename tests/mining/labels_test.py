"""Mining against loops over pixels written from its description."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtsm_jax.mining import labels
from jtsm_jax.types import Batch, pack_members

T, K = 2, 4
P, S, M = 9, 7, 6


def _loop_mine(
  scores,
  image_scores,
  tags,
  masks,
  boxes,
  valid,
  *,
  num_things=T,
  num_slots=M,
  segments_per_thing=1,
  segments_per_stuff=3,
  score_ratio=0.5,
  foreground_iou=0.5,
  background_iou=(0.0, 0.5),
  iou_kind="masks",
):
  """One image; masks [P, H, W]. Returns slots and (label, weight, slot)."""
  num_classes = len(tags)
  firsts, others = [], []
  for c in range(num_classes):
    if not tags[c]:
      continue
    quota = segments_per_thing if c < num_things else segments_per_stuff
    mined = []
    while len(mined) < quota:
      best = None
      for p in range(len(scores)):
        apart = not any((masks[p] & masks[q]).any() for q in mined)
        better = best is None or scores[p, c] > scores[best, c]
        if valid[p] and apart and better:
          best = p
      if best is None:
        break
      if mined and scores[best, c] < score_ratio * scores[mined[0], c]:
        break
      (others if mined else firsts).append((best, c, scores[best, c]))
      mined.append(best)
  best_first = lambda found: sorted(found, key=lambda s: -s[2])  # noqa: E731
  slots = (best_first(firsts) + best_first(others))[:num_slots]

  rows = []
  for p in range(len(scores)):
    nearest, nearest_iou = 0, -1.0
    for m, (q, _, _) in enumerate(slots):
      a, b = masks[p], masks[q]
      if iou_kind == "boxes":
        a, b = (_filled(boxes[i]) for i in (p, q))
      union = (a | b).sum()
      iou = (a & b).sum() / union if union else 0.0
      if iou > nearest_iou:
        nearest, nearest_iou = m, iou
    foreground = nearest_iou >= foreground_iou
    background = background_iou[0] <= nearest_iou < background_iou[1]
    weight = 0.0
    if valid[p] and (foreground or background):
      if nearest_iou > 0:
        weight = image_scores[slots[nearest][1]]
      else:
        weight = max(y for y, t in zip(image_scores, tags, strict=True) if t)
    label = slots[nearest][1] if foreground else num_classes
    rows.append((label, weight, nearest))
  return slots, rows


def _filled(box):
  mask = np.zeros((8, 10), bool)
  y0, x0, y1, x1 = box.astype(int)
  mask[y0:y1, x0:x1] = True
  return mask


def _random_boxes(rng, batch_size):
  """Boxes on 8 x 10 pixels, whole numbers, not those of the masks."""
  start = rng.integers(0, (7, 9), (batch_size, P, 2))
  end = rng.integers(start + 1, (9, 11))
  return np.concatenate([start, end], -1).astype(np.float32)


def _random_batch(rng, *, batch_size=2):
  """Superpixels of random sizes; padded proposals and padded pixels."""
  height, width = 8, 10
  superpixels = rng.integers(0, S, (batch_size, height, width))
  # Bands instead of noise in half of the cases: equal areas, equal IoUs.
  if rng.random() < 0.5:
    superpixels[:] = np.arange(width) * S // width
  superpixels[:, :, 8:] = np.where(rng.random() < 0.5, -1, 2)
  membership = rng.random((batch_size, P, S)) < rng.uniform(0.15, 0.5)
  # Pixels without a proposal are common, a proposal without pixels is not.
  membership[..., 1] |= ~membership[..., :3].any(-1)
  tags = (rng.random((batch_size, K)) < 0.6).astype(np.float32)
  return Batch(
    image_index=np.arange(batch_size),
    images=None,
    features=None,
    colour=None,
    size=np.full((batch_size, 2), 8),
    flip=np.zeros(batch_size, bool),
    window=np.tile([0, 0, 8, 8], (batch_size, 1)),
    tags=tags,
    superpixels=superpixels.astype(np.int32),
    member_bits=pack_members(membership),
    boxes=_random_boxes(rng, batch_size),
    valid=rng.random((batch_size, P)) < 0.85,
  )


@functools.cache
def _jitted(**options):
  return jax.jit(functools.partial(labels.mine, **options))


def _mine(scores, image_scores, batch, **options):
  options = {"num_things": T, "num_slots": M, **options}
  return jax.device_get(_jitted(**options)(scores, image_scores, batch))


def _masks(batch, b):
  inside = batch.superpixels[b] >= 0
  membership = np.asarray(batch.membership[b])
  return membership[:, np.maximum(batch.superpixels[b], 0)] & inside


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"num_slots": 2},
    {"segments_per_thing": 2, "segments_per_stuff": 1, "score_ratio": 0.0},
    {"segments_per_stuff": 4, "score_ratio": 0.9, "num_slots": 12},
    {"foreground_iou": 0.6, "background_iou": (0.1, 0.3)},
    {"iou_kind": "boxes"},
    {"iou_kind": "boxes", "background_iou": (0.1, 0.3), "foreground_iou": 0.4},
  ],
)
def test_equals_the_loops(options):
  seen = {"further": 0, "ignored": 0, "apart": 0, "cut": 0}
  for seed in range(30):
    rng = np.random.default_rng(seed)
    batch = _random_batch(rng)
    scores = rng.random((2, P, K + 1)).astype(np.float32)
    image_scores = rng.random((2, K)).astype(np.float32)
    found = _mine(scores, image_scores, batch, **options)
    assert found.proposal.shape == (2, options.get("num_slots", M))
    for b in range(2):
      slots, rows = _loop_mine(
        scores[b, :, :K],
        image_scores[b],
        batch.tags[b],
        _masks(batch, b),
        batch.boxes[b],
        batch.valid[b],
        **options,
      )
      used = found.valid[b]
      assert used.tolist() == [i < len(slots) for i in range(len(used))]
      np.testing.assert_array_equal(
        np.stack([found.proposal[b], found.category[b]], 1)[used],
        np.reshape([s[:2] for s in slots], (-1, 2)),
      )
      np.testing.assert_array_equal(
        found.score[b][used], np.array([s[2] for s in slots], np.float32)
      )
      label, weight, slot = zip(*rows, strict=True)
      np.testing.assert_array_equal(found.label[b], label)
      np.testing.assert_array_equal(
        found.weight[b], np.array(weight, np.float32)
      )
      np.testing.assert_array_equal(found.slot[b], slot)
      classes = [s[1] for s in slots]
      seen["further"] += len(classes) - len(set(classes))
      seen["ignored"] += (batch.valid[b] & (found.weight[b] == 0)).any()
      seen["cut"] += len(slots) < batch.tags[b].sum()
      seen["apart"] += (found.weight[b] > 0).any()
  assert seen["apart"]
  if options.get("num_slots") == 2:
    assert seen["cut"]
  else:
    assert seen["further"]
  if "background_iou" in options:
    assert seen["ignored"]


def _strip(membership, tags, *, valid=None):
  """One image of S superpixels with 1, 2, 3, ... pixels, side by side."""
  membership = np.array(membership, bool)
  areas = np.arange(membership.shape[1]) + 1
  superpixels = np.repeat(np.arange(len(areas)), areas)
  if valid is None:
    valid = np.ones(len(membership), bool)
  return Batch(
    image_index=np.zeros(1, np.int32),
    images=None,
    features=None,
    colour=None,
    size=np.array([[1, len(superpixels)]]),
    flip=np.zeros(1, bool),
    window=np.array([[0, 0, 1, len(superpixels)]]),
    tags=np.array([tags], np.float32),
    superpixels=superpixels.astype(np.int32)[None, None],
    member_bits=pack_members(membership[None]),
    boxes=np.zeros((1, len(membership), 4), np.float32),
    valid=np.array([valid]),
  )


def test_hand_worked_assignment():
  # Superpixels of 1, 2, 3 and 4 pixels. Thing 0 and stuff 2 are tagged; y of
  # the untagged class 3 is the largest and must not matter.
  #   p   superpixels  pixels  best for
  #   0   {2}            3     thing 0 (0.9)
  #   1   {2, 1}         5     IoU with p 0: 3/5 -> thing 0
  #   2   {2, 1, 0}      6     3/6 = 0.5 -> thing 0, the border counts
  #   3   {2, 3}         7     3/7 with p 0, 4/7 with p 4 -> stuff 2
  #   4   {3}            4     stuff 2 (0.8)
  #   5   {0}            1     touches neither: background, largest y 0.6
  #   6   {2, 1, 0, 3}  10     3/10 and 4/10: background, nearest is p 4
  #   7   padding
  batch = _strip(
    [
      [0, 0, 1, 0],
      [0, 1, 1, 0],
      [1, 1, 1, 0],
      [0, 0, 1, 1],
      [0, 0, 0, 1],
      [1, 0, 0, 0],
      [1, 1, 1, 1],
      [0, 0, 0, 0],
    ],
    [1, 0, 1, 0],
    valid=[True] * 7 + [False],
  )
  scores = np.zeros((1, 8, K), np.float32)
  scores[0, 0, 0], scores[0, 4, 2] = 0.9, 0.8
  scores[0, 7] = 1.0  # padding is never mined
  y = np.array([[0.3, 0.9, 0.6, 0.95]], np.float32)
  found = _mine(scores, y, batch, segments_per_stuff=1)
  assert found.proposal[0, :2].tolist() == [0, 4]
  assert found.category[0, :2].tolist() == [0, 2]
  assert found.valid[0].tolist() == [True, True] + [False] * 4
  assert found.label[0, :7].tolist() == [0, 0, 0, 2, 2, K, K]
  weight = [0.3, 0.3, 0.3, 0.6, 0.6, 0.6, 0.6, 0.0]
  np.testing.assert_allclose(found.weight[0], weight, rtol=1e-6)
  assert found.slot[0, :7].tolist()[:5] == [0, 0, 0, 1, 1]
  assert found.slot[0, 6] == 1

  # With an ignore band of [0.1, 0.5): p 6 is ignored, p 5 too (0 < 0.1).
  found = _mine(
    scores, y, batch, segments_per_stuff=1, background_iou=(0.1, 0.35)
  )
  np.testing.assert_allclose(found.weight[0, 5:], [0, 0, 0])


def test_stuff_has_further_components_above_half_of_the_first():
  # Four disjoint proposals and one over the first two.
  batch = _strip(np.vstack([np.eye(4), [[1, 1, 0, 0]]]), [0, 0, 1, 0])
  scores = np.zeros((1, 5, K), np.float32)
  scores[0, :, 2] = 0.3, 0.8, 0.4, 0.39, 0.7
  y = np.full((1, K), 0.5, np.float32)
  found = _mine(scores, y, batch)
  # 0.7 overlaps the first; 0.4 is half of 0.8; 0.39 is below.
  assert found.proposal[0][found.valid[0]].tolist() == [1, 2]
  found = _mine(scores, y, batch, score_ratio=0.25)
  assert found.proposal[0][found.valid[0]].tolist() == [1, 2, 3]
  thing = batch.replace(tags=np.array([[0, 1, 0, 0]], np.float32))
  found = _mine(scores[..., [0, 2, 1, 3]], y, thing, score_ratio=0.25)
  assert found.proposal[0][found.valid[0]].tolist() == [1]


def test_a_proposal_that_lost_its_pixels_takes_no_part():
  # Thin ones may vanish as their image shrinks to the canvas.
  batch = _strip(np.eye(4), [0, 0, 1, 0])
  superpixels = np.where(batch.superpixels == 2, 3, batch.superpixels)
  batch = batch.replace(superpixels=superpixels)
  scores = np.zeros((1, 4, K), np.float32)
  scores[0, :, 2] = [0.5, 0.6, 0.9, 0.4]
  found = _mine(scores, np.full((1, K), 0.5, np.float32), batch)
  assert found.proposal[0][found.valid[0]].tolist() == [1, 0, 3]
  assert found.label[0].tolist() == [2, 2, K, 2]
  assert found.weight[0].tolist() == [0.5, 0.5, 0, 0.5]


def test_without_tags_nothing_is_learnt():
  batch = _strip(np.eye(4), [0, 0, 0, 0])
  rng = np.random.default_rng(0)
  found = _mine(
    rng.random((1, 4, K), np.float32), np.full((1, K), 0.5, np.float32), batch
  )
  assert not found.valid.any()
  assert not found.weight.any()


def test_no_gradient_flows_through_mining():
  batch = _random_batch(np.random.default_rng(3))
  rng = np.random.default_rng(4)
  scores = jnp.array(rng.random((2, P, K)), jnp.float32)
  y = jnp.array(rng.random((2, K)), jnp.float32)

  def total(scores, y):
    mined = labels.mine(scores, y, batch, num_things=T, num_slots=M)
    return (mined.weight.sum() + mined.score.sum()) * scores.mean()

  by_scores, by_y = jax.jit(jax.grad(total, argnums=(0, 1)))(scores, y)
  # What is left is the gradient of the mean alone, the same everywhere.
  assert float(jnp.ptp(by_scores)) == 0
  assert float(by_scores[0, 0, 0]) > 0
  np.testing.assert_array_equal(by_y, np.zeros_like(y))


def test_segment_iou_by_hand():
  # Areas 1, 2 and 3; the segment {1, 2} has 5 pixels.
  members = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]], jnp.float32)
  areas = jnp.array([1.0, 2.0, 3.0])
  found = labels.segment_iou(members, areas, jnp.array([1, 2]))
  expected = [[2 / 6, 1, 0, 5 / 6], [0, 0, 0, 0]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_slots_needed():
  tags = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
  count = functools.partial(labels.slots_needed, num_things=2)
  assert count(tags, segments_per_thing=1, segments_per_stuff=3) == 7
  assert count(tags, segments_per_thing=4, segments_per_stuff=1) == 8
  assert count(tags[2:], segments_per_thing=1, segments_per_stuff=3) == 1
