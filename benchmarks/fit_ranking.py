"""Fits a ranker of proposals on photographs with panoptic ground truth.

    python benchmarks/fit_ranking.py --preset quality --named \
        --json panoptic_train2017.json --masks panoptic_train2017 \
        --images images --output jtsm_jax/proposals/ranking_quality.npz

With --named, on those that results/proposal_images.json names "fitted".

For every true segment, the candidates of the image compete in a softmax over
their scores, and those within a few hundredths of the best IoU should win. The
figures printed first come from two fits on one half of the images each,
measured on the other half. Each image is seen as it is and mirrored, in full
and in reduced size, so that no scale is learned by heart.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax import workers
from jtsm_jax.data.panoptic_files import read_panoptic
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.proposals import generate, quality, ranking
from jtsm_jax.types import VOID, Categories

NAMED = pathlib.Path(__file__).parent / "results" / "proposal_images.json"
TEMPERATURE = 0.02  # of the IoU below the best, in the targets
LEAST_IOU = 0.3  # no candidate of less is a target
STUFF_WEIGHT = 0.5
SMALL, FULL_WEIGHT, SIZE_EXPONENT = 0.05, 9216.0, 0.15
"""A segment of area a weighs clip(a / FULL_WEIGHT, SMALL, 1)^SIZE_EXPONENT."""
HIDDEN, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 64, 12, 3e-3, 1e-4
COUNTS = (100, 500, 1000, 2000, 4000)


@dataclasses.dataclass(frozen=True)
class Case:
  """One view of one image: N candidates and G true segments.

  Attributes:
    cues: [N, F] float16.
    target: [N] float32, how much a candidate should win; sums to the weight
      of the image's segments.
  """

  cues: np.ndarray
  target: np.ndarray


def main() -> None:
  """Fits, measures on held-out images, and writes the weights."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--preset", choices=ranking.FITTED, required=True)
  parser.add_argument("--json", type=pathlib.Path, required=True)
  parser.add_argument("--masks", type=pathlib.Path, required=True)
  parser.add_argument("--images", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--named", action="store_true", help=str(NAMED))
  args = parser.parse_args()
  entries = json.loads(args.json.read_text())
  truth = read_panoptic(
    args.json, args.masks, Categories.from_list(entries["categories"])
  )
  settings = generate.preset_settings(args.preset)
  make = functools.partial(make_case, args.images, truth, settings)
  check = functools.partial(best_ious, args.images, truth, settings)
  names = sorted(truth)
  if args.named:
    chosen = json.loads(NAMED.read_text())["fitted"]["COCO 2017 train"]
    names = [n for n in names if int(pathlib.Path(n).stem) in chosen]
  views = [(scale, flip) for scale in (1.0, 0.6) for flip in (False, True)]
  with workers.start_processes(workers.available_cores()) as pool:
    jobs = [pool.submit(make, name, *view) for name in names for view in views]
    made = [job.result() for job in jobs]
    cue_names = made[0][0]
    cases = [case for _, case in made]
    cases = [
      cases[i : i + len(views)] for i in range(0, len(cases), len(views))
    ]
    print(f"{len(cases)} images, {len(views)} views of each", flush=True)
    for half in (0, 1):
      train = [view for image in cases[half::2] for view in image]
      weights = fit(cue_names, train)
      jobs = [pool.submit(check, weights, n) for n in names[1 - half :: 2]]
      report([job.result() for job in jobs])
    weights = fit(cue_names, [view for image in cases for view in image])
    np.savez_compressed(args.output, **dataclasses.asdict(weights))
    pool.shutdown()
    print(f"fitted on all, written to {args.output}")


def make_case(images, truth, settings, name, scale, flip):
  """The names of the cues, and one view of an image."""
  image = decode_image((images / name).read_bytes())
  size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
  image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  if flip:
    image = np.ascontiguousarray(image[:, ::-1])
  superpixels, graph, candidates = generate.find_candidates(image, settings)
  segments = [s for s in truth[name].segments if not s.is_crowd]
  ids = truth[name].ids[:, ::-1] if flip else truth[name].ids
  everything = candidates.membership(np.arange(len(candidates)))
  iou = segment_iou(superpixels, everything, ids, segments)
  area = np.array([(ids == s.id).sum() for s in segments]) * scale**2
  weight = np.clip(area / FULL_WEIGHT, SMALL, 1) ** SIZE_EXPONENT
  weight *= [1 if s.is_thing else STUFF_WEIGHT for s in segments]
  best = iou.max(0)
  target = np.exp((iou - best) / TEMPERATURE) * (iou > LEAST_IOU)
  target *= weight * best / np.maximum(target.sum(0), 1e-9)
  cues = ranking.ranking_cues(candidates, graph.shape)
  return tuple(cues), Case(
    cues=np.stack(list(cues.values()), 1).astype(np.float16),
    target=target.sum(1).astype(np.float32),
  )


def best_ious(images, truth, settings, weights, name):
  """Best IoU of each segment among the first `COUNTS`, [G, 5]; things [G]."""
  image = decode_image((images / name).read_bytes())
  settings = dataclasses.replace(settings, max_proposals=max(COUNTS))
  superpixels, graph, candidates = generate.find_candidates(image, settings)
  scores = weights.score(ranking.ranking_cues(candidates, graph.shape))
  membership = generate.choose(candidates, graph, scores, settings)
  segments = [s for s in truth[name].segments if not s.is_crowd]
  iou = segment_iou(superpixels, membership, truth[name].ids, segments)
  best = np.stack([iou[:n].max(0) for n in COUNTS], 1)
  return best, np.array([s.is_thing for s in segments], bool)


def segment_iou(superpixels, membership, ids, segments):
  """IoU of sets of superpixels with segments, [P, G]."""
  ids = generate.stretch(ids, superpixels.shape)
  masks = np.stack([ids == s.id for s in segments])
  return quality.mask_iou(superpixels, membership, masks, ids != VOID)


def fit(names, cases) -> ranking.RankingWeights:
  """Maximises the likelihood of the targets with AdamW."""
  sample = np.concatenate([case.cues[::7] for case in cases]).astype(np.float32)
  mean, scale = sample.mean(0), sample.std(0) + 1e-6
  key = jax.random.key(0)
  first, second = jax.random.split(key)
  count = len(names)
  parameters = dict(
    linear=jnp.zeros(count),
    hidden=jax.random.normal(first, (count, HIDDEN)) / np.sqrt(count),
    hidden_bias=jnp.zeros(HIDDEN),
    output=0.1 * jax.random.normal(second, (HIDDEN,)),
  )
  schedule = optax.cosine_decay_schedule(LEARNING_RATE, EPOCHS * len(cases))
  optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
  # One shape for all images: padding can neither win nor compete.
  longest = max(len(case.cues) for case in cases)
  total = np.mean([case.target.sum() for case in cases])

  def loss(parameters, cues, target):
    x = (cues - mean) / scale
    hidden = jnp.tanh(x @ parameters["hidden"] + parameters["hidden_bias"])
    scores = x @ parameters["linear"] + hidden @ parameters["output"]
    scores = jnp.where(target >= 0, scores, -jnp.inf)
    winning = jnp.where(target > 0, jax.nn.log_softmax(scores), 0)
    return -jnp.sum(jnp.maximum(target, 0) * winning) / total

  @jax.jit
  def step(parameters, state, cues, target):
    value, gradient = jax.value_and_grad(loss)(parameters, cues, target)
    updates, state = optimizer.update(gradient, state, parameters)
    return optax.apply_updates(parameters, updates), state, value

  state = optimizer.init(parameters)
  rng = np.random.default_rng(0)
  for epoch in range(EPOCHS):
    values = []
    for n in rng.permutation(len(cases)):
      extra = longest - len(cases[n].cues)
      cues = np.pad(cases[n].cues, ((0, extra), (0, 0))).astype(np.float32)
      target = np.pad(cases[n].target, (0, extra), constant_values=-1)
      parameters, state, value = step(parameters, state, cues, target)
      values.append(value)
    print(f"epoch {epoch}: loss {np.mean(jax.device_get(values)):.4f}")
  return ranking.RankingWeights(
    names=names, mean=mean, scale=scale, **jax.device_get(parameters)
  )


def report(results) -> None:
  """Prints the mean best IoU of held-out segments."""
  best = np.concatenate([best for best, _ in results])
  is_thing = np.concatenate([thing for _, thing in results])
  for kind, chosen in (("things", is_thing), ("stuff", ~is_thing)):
    means = best[chosen].mean(0)
    text = ", ".join(
      f"{mean:.3f} @{n}" for n, mean in zip(COUNTS, means, strict=True)
    )
    print(f"held out, {chosen.sum()} {kind}: J {text}", flush=True)


if __name__ == "__main__":
  main()
