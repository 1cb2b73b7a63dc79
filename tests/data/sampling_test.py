"""Tests of the plan of batches."""

import numpy as np
import pytest

from jtsm_jax.data import sampling

# 7 landscape images (one square), 4 portrait ones.
SIZES = np.array([[10, 20]] * 6 + [[30, 30]] + [[20, 10]] * 4, np.int32)
PORTRAIT = {7, 8, 9, 10}
CANVASES = ((32, 48), (48, 32), (40, 40), (64, 96))


def plans(steps, **options):
  settings = dict(seed=3, sizes=SIZES, canvases=CANVASES, batch_size=3)
  settings |= options
  return [sampling.batch_plan(step, **settings) for step in steps]


def test_batches_per_epoch_rounds_up_each_group():
  # ceil(7 / 3) + ceil(4 / 3) = 3 + 2
  assert sampling.num_batches_per_epoch(SIZES, batch_size=3) == 5
  assert sampling.num_batches_per_epoch(SIZES[:6], batch_size=3) == 2
  assert sampling.num_batches_per_epoch(SIZES, batch_size=100) == 2


def test_epoch_shows_every_image_and_mixes_no_orientation():
  for epoch in range(3):
    batches = plans(range(5 * epoch, 5 * epoch + 5))
    for plan in batches:
      inside = set(plan.indices.tolist()) & PORTRAIT
      assert len(inside) in (0, len(set(plan.indices.tolist())))
      height, width = plan.canvas
      assert height >= width if inside else width >= height
    counts = np.bincount(np.concatenate([p.indices for p in batches]))
    # 7 images in 9 places and 4 in 6: two of each group come twice.
    assert sorted(counts[:7]) == [1] * 5 + [2] * 2
    assert sorted(counts[7:]) == [1] * 2 + [2] * 2


def test_plan_is_a_function_of_seed_and_step():
  forward = plans(range(12))
  sampling._epoch.cache_clear()
  backward = plans(range(11, -1, -1))[::-1]
  for one, two in zip(forward, backward, strict=True):
    assert one.canvas == two.canvas
    np.testing.assert_array_equal(one.indices, two.indices)
    np.testing.assert_array_equal(one.flips, two.flips)
  other = plans(range(12), seed=4)
  assert any(
    a.indices.tolist() != b.indices.tolist()
    for a, b in zip(forward, other, strict=True)
  )


def test_epochs_differ():
  order = [p.indices.tolist() for p in plans(range(15))]
  assert order[:5] != order[5:10] != order[10:]


def test_all_fitting_canvases_are_drawn():
  seen = {(p.canvas, p.indices[0] in PORTRAIT) for p in plans(range(200))}
  assert seen == {
    ((32, 48), False),
    ((64, 96), False),
    ((40, 40), False),
    ((40, 40), True),
    ((48, 32), True),
  }


def test_any_canvas_serves_where_none_fits():
  (plan,) = plans([0], sizes=SIZES[7:], canvases=((32, 48),))
  assert plan.canvas == (32, 48)


def test_flips_are_fair_and_can_be_off():
  flips = np.concatenate([p.flips for p in plans(range(300))])
  assert flips.mean() == pytest.approx(0.5, abs=0.06)
  assert not np.concatenate(
    [p.flips for p in plans(range(20), flip=False)]
  ).any()


def test_a_group_smaller_than_the_batch_repeats():
  (plan,) = plans([0], sizes=SIZES[:2], batch_size=5)
  assert sorted(np.bincount(plan.indices)) == [2, 3]
  assert plan.indices.dtype == np.int32


def test_inference_shows_each_image_in_all_its_views():
  batches = sampling.inference_plans(
    sizes=SIZES, canvases=CANVASES, batch_size=3, flips=(False, True)
  )
  views = [(p.canvas, p.flips.tolist()) for p in batches]
  landscape = [
    (canvas, [flip] * 3)
    for canvas in ((32, 48), (40, 40), (64, 96))
    for flip in (False, True)
  ]
  portrait = [
    (canvas, [flip] * 3)
    for canvas in ((48, 32), (40, 40))
    for flip in (False, True)
  ]
  assert views == landscape * 3 + portrait * 2
  indices = [p.indices.tolist() for p in batches]
  assert indices == (
    [[0, 1, 2]] * 6
    + [[3, 4, 5]] * 6
    + [[6, -1, -1]] * 6
    + [[7, 8, 9]] * 4
    + [[10, -1, -1]] * 4
  )
  np.testing.assert_array_equal(batches[12].windows[0], [0, 0, 30, 30])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(sizes=np.zeros((0, 2))), "sizes is empty"),
    (dict(canvases=()), "canvases is empty"),
    (dict(batch_size=0), "batch_size is 0"),
  ],
)
def test_wrong_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    plans([0], **options)
