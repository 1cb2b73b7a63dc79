"""The rows of Tables 1, 2 and 3: one choice of the paper changed at a time.

    python main.py --config=configs/ablations.py:roi_pool --workdir=runs/roi \
        --config.data.root=VOCdevkit --config.data.sbd=SBD \
        --config.backbone.pretrained=resnet18_ws_model_120.pkl

The rows are the keys of `ROWS`; what is needed: as configs/voc2012_panoptic.py.
`benchmarks/tables.py` runs the same rows in small.

Hardware: 4 GPUs in the paper. PQ of the paper stands beside each row; not
measured here on VOC.
"""

from typing import Any, NamedTuple

import ml_collections

from configs import voc2012_panoptic


class Row(NamedTuple):
  """One row of a table.

  Attributes:
    label: in the paper's words.
    pq: the paper's, of all classes.
    fields: what differs from the configuration, by flattened names.
  """

  label: str
  pq: float
  fields: dict[str, Any]


_NO_BRANCH = {"instance.enabled": False, "semantic.enabled": False}
_AS_MINED = {"reestimation.init": "none"}

ROWS = {
  "roi_pool": Row("RoIPool", 36.5, {"pooling.kind": "roi"}),
  "roi_align": Row("RoIAlign", 36.2, {"pooling.kind": "roi_align"}),
  "shape_interpolation": Row(
    "MoIPool, shape-interpolation", 37.2, {"pooling.kind": "tps"}
  ),
  "shape_invariant": Row("MoIPool, shape-invariant", 39.0, {}),
  "mining": Row("mining alone", 30.7, _NO_BRANCH),
  "instance": Row("and L_IS", 34.9, {"semantic.enabled": False, **_AS_MINED}),
  "semantic": Row("and L_SS", 33.9, {"instance.enabled": False, **_AS_MINED}),
  "both": Row("and both", 36.5, _AS_MINED),
  "reestimated": Row("and both, masks re-estimated", 39.0, {}),
  **{
    f"refinements_{n}": Row(f"n^r = {n}", pq, {"heads.num_refinements": n})
    for n, pq in enumerate((30.3, 35.0, 36.5, 38.1, 39.0, 38.6))
  },
}

TABLES = {
  "1": ("roi_pool", "roi_align", "shape_interpolation", "shape_invariant"),
  "2": ("mining", "instance", "semantic", "both", "reestimated"),
  "3": tuple(f"refinements_{n}" for n in range(6)),
}


def get_config(row: str = "") -> ml_collections.ConfigDict:
  """configs/voc2012_panoptic.py with the fields of a row.

  Raises:
    ValueError: there is no such row.
  """
  if row not in ROWS:
    raise ValueError(f"row {row!r}: wanted one of {', '.join(ROWS)}")
  c = voc2012_panoptic.get_config()
  c.update_from_flattened_dict(ROWS[row].fields)
  return c
