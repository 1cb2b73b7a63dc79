"""The folder that is made of MSRC's database, read as any other."""

import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

from jtsm_jax.data.folder import folder_source

ROOT = pathlib.Path(__file__).parents[1]
GRASS, COW, HORSE, FLOWER = (
  (0, 128, 0),
  (0, 0, 128),
  (128, 0, 128),
  (64, 128, 128),
)


def test_splits_tags_and_masks(tmp_path):
  database = tmp_path / "MSRC_ObjCategImageDatabase_v2"

  def add(name, *colours):
    """An image of upright stripes."""
    regions = np.repeat(np.array(colours, np.uint8)[None], 8, axis=1)
    regions = np.repeat(regions, 24, axis=0)
    for folder, end in (("Images", ""), ("GroundTruth", "_GT")):
      (database / folder).mkdir(parents=True, exist_ok=True)
      Image.fromarray(regions).save(database / folder / f"{name}{end}.bmp")

  add("1_1_s", GRASS, COW)
  add("1_3_s", HORSE, (0, 0, 0))  # nothing that counts
  add("1_4_s", COW, GRASS, COW, HORSE)
  add("1_5_s", GRASS)  # belongs to no split
  add("11_2_s", FLOWER, GRASS)
  add("11_4_s", GRASS)
  subprocess.run(
    [
      *(sys.executable, "benchmarks/msrc.py", f"--source={database}"),
      f"--output={tmp_path / 'folder'}",
    ],
    cwd=ROOT,
    check=True,
  )
  source = folder_source(str(tmp_path / "folder"))
  names = [c.name for c in source.categories.items]
  assert len(names) == 21
  assert sum(c.is_thing for c in source.categories.items) == 15

  found = {
    split: [
      (record.image_id, [names[c] for c in record.tags])
      for record in source.splits[split]
    ]
    for split in ("train", "val")
  }
  assert found["train"] == [("1_1_s", ["cow", "grass"]), ("11_4_s", ["grass"])]
  assert found["val"] == [
    ("1_4_s", ["cow", "grass"]),
    ("11_2_s", ["flower", "grass"]),
  ]
  target = source.splits["val"][0].target
  segments = [(names[s.category], s.area) for s in target.segments]
  assert segments == [("cow", 192), ("cow", 192), ("grass", 192)]
  assert (target.ids[:, 24:] == 0).all()
