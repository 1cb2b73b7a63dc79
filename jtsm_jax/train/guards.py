"""What stops a run before it spoils what it has learnt."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import numpy as np

from jtsm_jax.data.prepared import RecordSource
from jtsm_jax.types import Batch


def check_finite(
  metrics: dict[str, jax.Array],
  *,
  step: int,
  batches: dict[str, Batch],
  source: RecordSource,
  workdir: pathlib.Path,
) -> None:
  """Stops a run whose losses, gradients or parameters are no numbers any more.

  The batches of the step are written down for a closer look.

  Args:
    metrics: of the step; "loss/..." and ".../norm" must be finite.
    step: that they belong to.
    batches: host batches that the step has learnt from, by what it learnt.
    source: the split, for the images' ids.
    workdir: gets `nonfinite_step_N.npz` and `nonfinite_step_N.json`; of several
      processes each adds "_process_K" to the names, for its own images.

  Raises:
    FloatingPointError: names the step, the values, the images and the files.
  """
  values = {name: float(value) for name, value in metrics.items()}
  watched = {
    name: value
    for name, value in values.items()
    if name.startswith("loss/") or name.endswith("/norm")
  }
  bad = [name for name, value in watched.items() if not math.isfinite(value)]
  if not bad:
    return
  ids = {
    name: [source.image_ids[i] for i in batch.image_index if i >= 0]
    for name, batch in batches.items()
  }
  suffix, whose = "", ""
  if jax.process_count() > 1:  # in one folder, each with other rows
    suffix = f"_process_{jax.process_index()}"
    whose = f" of process {jax.process_index()}"
  path = workdir / f"nonfinite_step_{step}{suffix}.npz"
  arrays = {
    f"{name}/{field}": np.asarray(value)
    for name, batch in batches.items()
    for field, value in vars(batch).items()
    if value is not None
  }
  np.savez_compressed(path, **arrays)
  report = {
    "step": step,
    "images": ids,
    # JSON has no NaN.
    "metrics": {
      k: v if math.isfinite(v) else str(v) for k, v in values.items()
    },
  }
  path.with_suffix(".json").write_text(json.dumps(report, indent=1))
  raise FloatingPointError(
    f"step {step} gave no finite {', '.join(bad)}: {watched}; its images"
    f"{whose} were {ids}. Its update was left out, and the checkpoint before "
    f"it is whole. The batch is in {path}. The same command tries again from "
    "that checkpoint; a lower --config.train.learning_rate, or a "
    f"--config.train.rise, needs another --workdir, with --init_from={workdir} "
    "to keep what was learnt"
  )
