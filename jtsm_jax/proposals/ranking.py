"""Order of the candidates.

A score is the logarithm of the chance, up to a constant of the image, that the
candidate is the best one for some segment. Two kinds of rankers give it:

- "unfitted": linear in a few cues, with weights set by hand in tenths. Their
  signs are arguments; no mask of a photograph was used.
- fitted ones, a linear term and a small network of one hidden layer, whose
  weights `benchmarks/fit_ranking.py` found on 100 masked photographs of COCO
  (see docs/proposals.md).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources

import numpy as np

from jtsm_jax.proposals.candidates import NO_NODE, Candidates

FITTED = ("quality", "fast")  # files ranking_NAME.npz beside this one
UNFITTED = "unfitted"

HAND_SET = dict(
  rank=-1.0,  # like 1 / rank, the chance that one region of `rank` is meant
  outer_strength=1.0,
  inner_strength=0.3,  # objects have parts, and a piece of one has less
  roughness=-0.7,  # objects have short outlines
  area=0.2,
  consensus=0.3,
  is_pair=-0.3,  # there are ten times as many pairs as nodes
  sides_beyond_two=-0.3,
)
"""Weights of the ranker "unfitted" for cues of `ranking_cues`."""


def ranking_cues(
  candidates: Candidates, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
  """What rankers look at: [N] float64 by name, mostly logarithms.

  Args:
    candidates: of one image.
    shape: (H, W) of that image.
  """
  c = candidates
  height, width = shape
  y0, x0, y1, x1 = c.boxes.T.astype(np.float64)
  is_pair = c.second != NO_NODE
  sides = (y0 == 0) * 1.0 + (x0 == 0) + (y1 == height) + (x1 == width)
  cues = dict(
    area=np.log(c.area / (height * width)),
    rank=np.log(c.rank),
    rank_of_coarser=np.log(c.rank_of_coarser),
    is_pair=is_pair,
    consensus=np.log(c.consensus),
    node_consensus=np.log1p(c.node_consensus),
    # One pixel edge is added so that the whole image, which has no perimeter,
    # is not infinitely smooth.
    roughness=np.log((c.perimeter + 1) / np.sqrt(c.area)),
    density=np.log(c.inner_length / c.area + 0.01),
    fill=np.log(c.area / ((y1 - y0) * (x1 - x0))),
    elongation=np.abs(np.log((y1 - y0) / (x1 - x0))),
    height=np.log((y1 - y0) / height),
    width=np.log((x1 - x0) / width),
    y_centre=(y0 + y1) / (2 * height) - 0.5,
    x_off_centre=np.abs((x0 + x1) / (2 * width) - 0.5),
    touches_top=y0 == 0,
    touches_bottom=y1 == height,
    sides=sides,
    sides_beyond_two=np.maximum(sides - 2, 0),
    joint_strength=is_pair * np.log(c.joint_strength + 0.05),
    joint_length=is_pair * np.log(c.joint_length / np.sqrt(c.area) + 0.05),
    balance=c.balance,
  )
  for k, name in enumerate(("strength", "fine", "object", "scene")):
    if k < c.outer.shape[1]:
      cues[f"outer_{name}"] = np.log(c.outer[:, k] + 0.05)
      cues[f"inner_{name}"] = np.log(c.inner[:, k] + 0.05)
  names = ("colour", "object", "scene")
  for name, moments in zip(names, [c.colour, *c.deep], strict=False):
    cues[f"{name}_norm"] = np.log(np.linalg.norm(moments.mean, axis=1) + 0.05)
    cues[f"{name}_spread"] = np.log(moments.spread + 0.05)
    cues[f"{name}_contrast"] = np.log(moments.contrast + 0.05)
  if c.activity is not None:
    cues["activity"] = np.log(c.activity + 0.05)
  return {name: np.asarray(v, np.float64) for name, v in cues.items()}


def score(
  candidates: Candidates, shape: tuple[int, int], *, ranker: str
) -> np.ndarray:
  """Scores [N] float64 of the candidates of an image; higher is better.

  Args:
    candidates: of one image.
    shape: (H, W) of that image.
    ranker: "unfitted", or one of `FITTED`.
  """
  cues = ranking_cues(candidates, shape)
  if ranker == UNFITTED:
    return sum(weight * cues[name] for name, weight in HAND_SET.items())
  return fitted_weights(ranker).score(cues)


@dataclasses.dataclass(frozen=True)
class RankingWeights:
  """A fitted ranker of F cues and D hidden units.

  Attributes:
    names: F names of `ranking_cues`.
    mean, scale: [F], by which cues are standardised.
    linear: [F].
    hidden: [F, D], hidden_bias: [D], output: [D].
  """

  names: tuple[str, ...]
  mean: np.ndarray
  scale: np.ndarray
  linear: np.ndarray
  hidden: np.ndarray
  hidden_bias: np.ndarray
  output: np.ndarray

  def score(self, cues: dict[str, np.ndarray]) -> np.ndarray:
    """Scores [N] float64 of candidates with these cues."""
    x = np.stack([cues[name] for name in self.names], 1)
    x = (x - self.mean) / self.scale
    hidden = np.tanh(x @ self.hidden + self.hidden_bias)
    return x @ self.linear + hidden @ self.output


@functools.cache
def fitted_weights(name: str) -> RankingWeights:
  """Reads the weights of the fitted ranker `name`."""
  file = importlib.resources.files(__package__) / f"ranking_{name}.npz"
  with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
    values = {k: arrays[k] for k in arrays.files}
  names = tuple(values.pop("names").tolist())
  return RankingWeights(
    names=names, **{k: v.astype(np.float64) for k, v in values.items()}
  )
