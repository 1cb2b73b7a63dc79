"""What the choice among variants owes to the images it was made on.

    python benchmarks/halves.py --data=runs/a-0/data \
        runs/a-0,runs/a-1 runs/b-0,runs/b-1

Each argument is a variant: the finished workdirs of its seeds. Their
predictions are measured on each half of the validation images of --data, every
other one; a class that a half does not show has no say there. The variant with
the best mean PQ on one half is then measured on the other, which had no part in
the choice.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jtsm_jax.data.panoptic_files import read_panoptic
from jtsm_jax.data.prepared import PreparedData, open_prepared
from jtsm_jax.evaluation.panoptic_quality import PanopticQuality


def main() -> None:
  """Prints PQ of every variant on both halves, and of the two chosen."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("variants", nargs="+", metavar="WORKDIR[,WORKDIR...]")
  args = parser.parse_args()
  data = open_prepared(args.data)

  quality = {}
  print("first half, second half, all images: PQ, mean of the seeds")
  for variant in args.variants:
    runs = [
      measure(pathlib.Path(workdir), data) for workdir in variant.split(",")
    ]
    quality[variant] = [statistics.mean(run) for run in zip(*runs, strict=True)]
    print("{:.1f} {:.1f} {:.1f}".format(*quality[variant]), variant, flush=True)
  for this, other in ((0, 1), (1, 0)):
    best = max(quality, key=lambda variant: quality[variant][this])
    print(
      f"chosen on half {this + 1}, {quality[best][this]:.1f} there: {best}, "
      f"{quality[best][other]:.1f} on the other"
    )


def measure(
  workdir: pathlib.Path, data: PreparedData
) -> tuple[float, float, float]:
  """PQ of a run on the first half, on the second and on all images."""
  folder = workdir / "evaluation" / "predictions"
  predictions = read_panoptic(
    folder / "panoptic.json", folder / "panoptic", data.categories
  )
  images = data.splits["val"]
  parts = [PanopticQuality(data.categories) for _ in range(2)]
  for i, name in enumerate(images.image_ids):
    parts[i % 2].add(predictions[f"{name}.jpg"], images.target(i))
  first, second = (part.result()["all"]["pq"] for part in parts)
  return first, second, parts[0].merge(parts[1]).result()["all"]["pq"]


if __name__ == "__main__":
  main()
