"""How the branches are put together."""

import jax
import numpy as np
import pytest

from tests import tiny

BATCH = tiny.make_batch()


def test_init_makes_every_branch_and_the_constants():
  model = tiny.make_model(projection=4, center=True, average=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)
  assert set(shapes["params"]) == {
    "extractor",
    "neck",
    "heads",
    "instance",
    "semantic",
    "tag_head",
  }
  constants = {k: v.shape for k, v in tiny.paths(shapes["constants"]).items()}
  assert constants == {
    "extractor/project/mean": (8,),
    "extractor/project/matrix": (8, 4),
    "proposal_features/mean_0": (2 * 2 * 4,),
    "proposal_features/scale_0": (),
    "proposal_features/mean_1": (4,),
    "proposal_features/scale_1": (),
  }
  # The tag head reads the stages before the projection, mining after it.
  kernel = shapes["params"]["tag_head"]["Dense_0"]["kernel"]
  assert kernel.shape == (8, tiny.K)


@pytest.mark.parametrize(
  ("instance", "semantic"), [(True, False), (False, False)]
)
def test_tasks_without_a_branch(instance, semantic):
  model = tiny.make_model(instance=instance, semantic=semantic)
  params = jax.eval_shape(model.init, jax.random.key(0), BATCH)["params"]
  assert ("instance" in params) == instance
  assert ("semantic" in params) == semantic
  assert "cells" not in params


def test_cells_inside_the_image():
  rows, columns = (-(-side // tiny.STRIDE) for side in tiny.IMAGE)
  wanted = np.zeros((2, *(side // tiny.STRIDE for side in tiny.CANVAS)), bool)
  wanted[:, :rows, :columns] = True
  found = tiny.make_model().bind({}).inside(BATCH)
  np.testing.assert_array_equal(found, wanted)


def test_cached_features_replace_the_images():
  model = tiny.make_model()
  variables = tiny.make_variables(model, BATCH)
  features = model.apply(variables, BATCH.images, method="extract")
  cached = BATCH.replace(images=None, features=np.asarray(features, np.float16))
  direct = model.apply(variables, BATCH, method="features")
  found = model.apply(variables, cached, method="features")
  np.testing.assert_array_equal(features, direct)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, direct, rtol=1e-3, atol=1e-5)
  # `init` reads the shapes of the images, whatever is cached.
  jax.eval_shape(
    model.init, jax.random.key(0), BATCH.replace(features=features)
  )


def test_mining_is_pooling_then_neck_then_heads():
  model = tiny.make_model()
  variables = tiny.make_variables(model, BATCH)
  features = model.apply(variables, BATCH, method="features")
  found = model.apply(variables, features, BATCH, method="mine")
  params = variables["params"]
  [x] = model.apply(variables, features, BATCH, method="pool")
  layer = params["neck"]["fc1"]
  x = np.maximum(np.asarray(x) @ layer["kernel"] + layer["bias"], 0)
  for r, logits in enumerate(found.refinement_logits, start=1):
    head = params["heads"][f"refinement_{r}"]
    np.testing.assert_allclose(
      logits, x @ head["kernel"] + head["bias"], rtol=1e-3, atol=1e-4
    )


def test_tag_logits_see_the_image_only():
  model = tiny.make_model()
  variables = tiny.make_variables(model, BATCH)
  rng = np.random.default_rng(1)
  stages = rng.normal(size=(2, 8, 8, 8)).astype(np.float32)
  # 33 x 48 pixels reach into the fifth row and fill six columns of cells.
  size = np.array([[33, 48], [64, 64]])
  found = model.apply(variables, stages, size, method="tag_logits")
  mean = np.stack([stages[0, :5, :6].mean((0, 1)), stages[1].mean((0, 1))])
  layer = variables["params"]["tag_head"]["Dense_0"]
  np.testing.assert_allclose(
    found, mean @ layer["kernel"] + layer["bias"], rtol=1e-4, atol=1e-5
  )
