"""Mining of single images: what numpy finds in the same scores."""

import jax
import numpy as np
import pytest

from jtsm_jax.data.pipeline import inference_batches
from jtsm_jax.data.prepare import prepare
from jtsm_jax.data.prepared import open_prepared
from jtsm_jax.data.shapes import shapes_source
from jtsm_jax.models.cell_head import CellHead
from jtsm_jax.models.neck_and_heads import MiningHeads
from jtsm_jax.reporting.mined_images import mine_images
from jtsm_jax.train.objectives import (
  LossSettings,
  MiningSettings,
  mining_counts,
  mining_loss,
)
from jtsm_jax.train.random_keys import DropoutKeys
from jtsm_jax.types import Proposals, pack_members
from tests import tiny

SETTINGS = MiningSettings(
  num_things=8, num_slots=16, segments_per_thing=1, segments_per_stuff=1
)


class Grid:
  """A store that proposes each of 16 tiles of every image."""

  def __contains__(self, image_id):
    return True

  def get(self, image_id):
    y, x = np.mgrid[:64, :64] // 16
    corners = [(16 * a, 16 * b) for a, b in np.ndindex(4, 4)]
    return Proposals(
      superpixels=(4 * y + x).astype(np.int32),
      member_bits=pack_members(np.eye(16, dtype=bool)),
      boxes=np.array([[a, b, a + 16, b + 16] for a, b in corners], np.int32),
      scores=np.linspace(1, 0, 16, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  prepare(shapes_source(num_train=5, num_val=1, side=64), folder)
  return open_prepared(folder).splits["train"]


def _model(num_refinements, has_cells):
  return tiny.make_model(dropout=0.5).clone(
    heads=MiningHeads(num_classes=12, num_refinements=num_refinements),
    cells=CellHead(num_classes=12) if has_cells else None,
  )


@pytest.mark.parametrize("canvases", [((64, 64),), ((64, 96), (64, 64))])
@pytest.mark.parametrize("num_refinements", [0, 2])
@pytest.mark.parametrize("cells", [False, True])
def test_each_tag_has_its_best_proposal(
  source, num_refinements, canvases, cells
):
  model = _model(num_refinements, cells)
  batch = tiny.make_batch(1)
  variables = tiny.make_variables(model, batch)
  found = list(
    mine_images(
      model,
      jax.device_put(variables),
      source,
      store=Grid(),
      settings=SETTINGS,
      tag_advantage=2.0,
      canvases=canvases,
      batch_size=2,
      max_proposals=20,
      max_superpixels=20,
    )
  )
  assert sorted(x.index for x in found) == [0, 1, 2, 3, 4]  # each once
  for image in found:
    assert image.scores.shape == (16, 12)  # without what is padded
    assert (image.scores >= 0).all()
    assert (image.scores <= 1).all()
    tags = np.flatnonzero(source.tags[image.index]).tolist()
    assert sorted(k for k, _, _ in image.segments) == tags
    for k, proposal, score in image.segments:
      assert score == pytest.approx(image.scores[:, k].max())
      assert image.scores[proposal, k] == pytest.approx(score)
    assert len(np.unique(image.scores)) > 16


class Dotted(Grid):
  """As many, and among them three that vanish when the image is halved."""

  places = (5, 12, 18)

  def get(self, image_id):
    tiles = super().get(image_id)
    superpixels = tiles.superpixels.copy()
    superpixels[0, 0] = 16  # odd rows and columns are sampled
    membership = np.zeros((19, 17), bool)
    membership[self.places, 16] = True
    membership[self.kept, :16] = tiles.membership
    boxes = np.array([[0, 0, 1, 1]] * 19, np.int32)
    boxes[self.kept] = tiles.boxes
    return Proposals(
      superpixels,
      pack_members(membership),
      boxes,
      np.linspace(1, 0, 19, dtype=np.float32),
    )

  @property
  def kept(self):
    return np.delete(np.arange(19), self.places)


@pytest.mark.parametrize("num_refinements", [0, 2])
def test_scores_are_those_of_their_proposals(source, num_refinements):
  model = _model(num_refinements, has_cells=True)
  variables = jax.device_put(tiny.make_variables(model, tiny.make_batch(1)))
  plain, dotted = (
    list(
      mine_images(
        model,
        variables,
        source,
        store=store,
        settings=SETTINGS,
        tag_advantage=2.0,
        canvases=((32, 32),),
        batch_size=5,
        max_proposals=20,
        max_superpixels=20,
      )
    )
    for store in (Grid(), Dotted())
  )
  for a, b in zip(plain, dotted, strict=True):
    assert b.scores.shape == (18, 12)  # to the last that is seen
    assert not b.scores[[5, 12]].any()
    found = b.scores[Dotted().kept]
    np.testing.assert_allclose(found, a.scores, rtol=1e-4)
    for k, proposal, score in b.segments:
      assert b.scores[proposal, k] == pytest.approx(score)


@pytest.mark.parametrize("num_refinements", [0, 2])
@pytest.mark.parametrize("has_cells", [False, True])
def test_segments_are_those_of_the_training(source, num_refinements, has_cells):
  model = _model(num_refinements, has_cells)
  variables = tiny.make_variables(model, tiny.make_batch(1))
  sizes = dict(max_proposals=20, max_superpixels=20)
  found = mine_images(
    model,
    jax.device_put(variables),
    source,
    store=Grid(),
    settings=SETTINGS,
    tag_advantage=LossSettings().tag_advantage,
    canvases=((64, 64),),
    batch_size=5,
    proposal_block=8,
    **sizes,
  )
  shown = {image.index: sorted(image.segments) for image in found}
  (batch,) = inference_batches(
    source, Grid(), canvases=((64, 64),), batch_size=5, **sizes
  )
  _, (_, mined, _) = mining_loss(
    model,
    variables,
    batch,
    DropoutKeys(None, None),
    counts=mining_counts(batch),
    mining=SETTINGS,
    losses=LossSettings(),
  )
  for i, index in enumerate(batch.image_index):
    taught = [
      (int(mined.category[i, m]), int(mined.proposal[i, m]))
      for m in np.flatnonzero(mined.valid[i])
    ]
    assert [x[:2] for x in shown[int(index)]] == sorted(taught)
