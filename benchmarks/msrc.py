"""Makes a folder that configs/folder.py reads of MSRC v2's photographs.

    python benchmarks/msrc.py --source=DATABASE --output=DIR

DATABASE is Microsoft Research Cambridge's `MSRC_ObjCategImageDatabase_v2`,
unpacked: 591 photographs of about 320 x 213 pixels in twenty groups,
`Images/g_n_s.bmp`, and their regions by colour, `GroundTruth/g_n_s_GT.bmp`.
Photograph n of group g is trained with where n mod 6 is 0, 1 or 3, with its
tags alone, and evaluated where it is 4; in groups 11 and 12 where it is 1, 4 or
5, and 2. Tags are the classes of the regions; horse and mountain are left out,
as is usual, and what the database does not label belongs to no class.
Photographs without any class are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib

import numpy as np
from PIL import Image

# Colour of the regions, class; ids are places in this table, from 1 on.
COLOURS = {
  (128, 0, 0): "building",
  (0, 128, 0): "grass",
  (128, 128, 0): "tree",
  (0, 0, 128): "cow",
  (128, 0, 128): "horse",
  (0, 128, 128): "sheep",
  (128, 128, 128): "sky",
  (64, 0, 0): "mountain",
  (192, 0, 0): "aeroplane",
  (64, 128, 0): "water",
  (192, 128, 0): "face",
  (64, 0, 128): "car",
  (192, 0, 128): "bicycle",
  (64, 128, 128): "flower",
  (192, 128, 128): "sign",
  (0, 64, 0): "bird",
  (128, 64, 0): "book",
  (0, 192, 0): "chair",
  (128, 64, 128): "road",
  (0, 192, 128): "cat",
  (128, 192, 128): "dog",
  (64, 64, 0): "body",
  (192, 64, 0): "boat",
}
STUFF = ("building", "grass", "tree", "sky", "water", "road")
LEFT_OUT = ("horse", "mountain")  # too few pixels
SPLITS = {"train": (0, 1, 3), "val": (4,)}  # n mod 6
SHIFTED = {"train": (1, 4, 5), "val": (2,)}
SHIFTED_GROUPS = (11, 12)


def main() -> None:
  """Writes classes, images, tags and the class ids of validation images."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  args = parser.parse_args()
  if not (args.source / "GroundTruth").is_dir():
    parser.error(f"{args.source}: has no GroundTruth/; unpack the database")
  names = {i: name for i, name in enumerate(COLOURS.values(), 1)}
  classes = [
    {"id": i, "name": name, "isthing": int(name not in STUFF)}
    for i, name in names.items()
    if name not in LEFT_OUT
  ]
  for folder in ("images", "labels_val"):
    (args.output / folder).mkdir(parents=True, exist_ok=True)
  (args.output / "classes.json").write_text(json.dumps(classes, indent=1))
  for split in SPLITS:
    rows = []
    for group, number in photographs(args.source, split):
      name = f"{group}_{number}_s"
      labels = read_labels(args.source / "GroundTruth" / f"{name}_GT.bmp")
      tags = [names[i] for i in np.unique(labels) if i]
      if not tags:
        continue
      with Image.open(args.source / "Images" / f"{name}.bmp") as image:
        image.convert("RGB").save(
          args.output / "images" / f"{name}.jpg", quality=95
        )
      if split == "val":
        Image.fromarray(labels).save(args.output / "labels_val" / f"{name}.png")
      rows.append((f"{name}.jpg", ";".join(tags)))
    with (args.output / f"{split}_tags.csv").open("w", newline="") as file:
      csv.writer(file).writerows([("image", "tags"), *rows])
    print(f"{split}: {len(rows)} photographs")


def photographs(source: pathlib.Path, split: str) -> list[tuple[int, int]]:
  """(group, number) of a split's photographs, in order."""
  found = []
  for path in (source / "GroundTruth").glob("*_s_GT.bmp"):
    group, number = map(int, path.name.split("_")[:2])
    rests = SHIFTED if group in SHIFTED_GROUPS else SPLITS
    if number % 6 in rests[split]:
      found.append((group, number))
  return sorted(found)


def read_labels(path: pathlib.Path) -> np.ndarray:
  """Class ids, [H, W] uint8, 0 for none."""
  with Image.open(path) as image:
    colours = np.asarray(image.convert("RGB"))
  labels = np.zeros(colours.shape[:2], np.uint8)
  for i, (colour, name) in enumerate(COLOURS.items(), 1):
    if name not in LEFT_OUT:
      labels[(colours == colour).all(-1)] = i
  return labels


if __name__ == "__main__":
  main()
