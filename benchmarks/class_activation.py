"""The baseline to beat: class activation maps of the same backbone.

    python benchmarks/class_activation.py --config=configs/folder.py \
        --workdir=runs/mine

Takes a finished run's data, proposals, features and fusion, and
puts in place of all that the run has learnt a linear classifier of the mean
feature, trained on the same tags: at each cell it is a class activation map
(Zhou et al., "Learning deep features for discriminative localization", 2016).
A proposal's score is how well it matches the map of the class, times the
image's score; the map of the stuff classes joins the proposals' votes, and
masks, which have no instance branch, are the proposals' own, with the run's
outlines. This is the "combination" row of Table 4 in small: nothing is mined or
refined.

Prints the table of --mode=evaluate, and writes
WORKDIR/class_activation/metrics.json.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.data.pipeline import inference_batches
from jtsm_jax.evaluation.evaluate import evaluate, write_metrics
from jtsm_jax.evaluation.inference import Scores, Steps
from jtsm_jax.evaluation.predict import learn_calibration, predict
from jtsm_jax.evaluation.tables import final_table
from jtsm_jax.losses import mil
from jtsm_jax.mining.cells import map_overlap
from jtsm_jax.modes.data import prepare
from jtsm_jax.modes.proposals import open_proposals
from jtsm_jax.modes.trained import prediction_settings
from jtsm_jax.train import build, caches, checkpoints

_CONFIG = config_flags.DEFINE_config_file("config", None, "Of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run, finished.")
_STEPS = flags.DEFINE_integer("steps", 2000, "Of the classifier.")
_POWER = flags.DEFINE_float("power", 1.0, "Of the maps: above 1, narrower.")


def main(_: list[str]) -> None:
  """Trains the classifier, calibrates, evaluates."""
  config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
  data = prepare(config, workdir)  # opens what is there
  store = open_proposals(config, workdir, data)
  model = build.build_model(config, data.categories)
  _, variables = checkpoints.restore_variables(workdir / "checkpoints")
  settings = prediction_settings(config)
  features = {
    split: caches.open_feature_cache(
      config, workdir, model, variables, data.splits[split], split=split
    )
    for split in ("train", "val")
  }
  x, tags = mean_features(
    model, variables, data.splits["train"], store, settings, features["train"]
  )
  params = train_classifier(x, tags, steps=_STEPS.value, seed=config.seed)
  num_things = data.categories.num_things
  power = _POWER.value

  @jax.jit
  def judge(batch):
    return score(
      model, variables, params, batch, num_things=num_things, power=power
    )

  steps = Steps(judge, None)
  calibration = learn_calibration(
    steps,
    data.splits["train"],
    store,
    settings=settings,
    cache=features["train"],
  )
  result = evaluate(
    predict(
      steps,
      data.splits["val"],
      store,
      calibration=calibration,
      num_things=num_things,
      settings=settings,
      cache=features["val"],
    ),
    data.splits["val"],
    data.categories,
    task=config.task,
  )
  write_metrics(workdir / "class_activation" / "metrics.json", result)
  print(final_table(result))


def mean_features(model, variables, source, store, settings, cache):
  """The mean feature of each image, both ways round: [N, C], tags [N, K]."""

  @jax.jit
  def mean(batch):
    features = model.apply(variables, batch, method="features")
    inside = model.inside(batch)[..., None]
    return (features * inside).sum((1, 2)) / inside.sum((1, 2))

  found, tags = [], []
  for batch in inference_batches(
    source,
    store,
    canvases=settings.canvases,
    batch_size=settings.batch_size,
    max_proposals=settings.max_proposals,
    max_superpixels=settings.max_superpixels,
    load_images=cache is None,
    flips=(False, True),
  ):
    real = batch.image_index >= 0
    attached = batch if cache is None else cache.attach(batch)
    found.append(np.asarray(mean(attached))[real])
    tags.append(source.tags[batch.image_index[real]])
  return np.concatenate(found), np.concatenate(tags)


def train_classifier(x, tags, *, steps, seed):
  """A linear layer with dropout, by AdamW, as the run's own heads."""
  params = {
    "kernel": jnp.zeros((x.shape[1], tags.shape[1])),
    "bias": jnp.zeros(tags.shape[1]),
  }
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(1e-2, steps), weight_decay=0.1
  )

  @jax.jit
  def step(params, state, key):
    def loss(params):
      kept = jax.random.bernoulli(key, 0.5, x.shape)
      logits = (x * kept * 2) @ params["kernel"] + params["bias"]
      return mil.tag_loss(logits, tags, valid=jnp.ones(len(x), bool))

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state = optimizer.init(params)
  for key in jax.random.split(jax.random.key(seed), steps):
    params, state, value = step(params, state, key)
  print(f"class activation: {len(x)} images, loss {float(value):.3f}")
  return params


def score(model, variables, params, batch, *, num_things, power):
  """What the maps say of a batch, in the form of `make_score_step`."""
  features = model.apply(variables, batch, method="features")
  inside = model.inside(batch)[..., None]
  logits = features @ params["kernel"] + params["bias"]
  mean = (logits * inside).sum((1, 2)) / inside.sum((1, 2))
  image = jax.nn.sigmoid(mean)
  # The activation above 0, as a share of the image's highest: [B, Hf, Wf, K].
  maps = jax.nn.relu(logits - params["bias"]) * inside
  maps = maps / jnp.maximum(maps.max((1, 2), keepdims=True), 1e-6)
  maps = maps**power
  scores = map_overlap(maps, batch) * image[:, None]
  weighted = maps * image[:, None, None]
  thing = weighted[..., :num_things].max(-1, keepdims=True)
  semantic = jnp.concatenate([thing, weighted[..., num_things:]], -1)
  semantic /= jnp.maximum(semantic.sum(-1, keepdims=True), 1e-6)
  return Scores(
    proposals=jnp.where(batch.valid[..., None], scores, 0.0),
    image=image,
    semantic=semantic,
    features=features,
  )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
