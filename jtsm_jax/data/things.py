"""A data set without its stuff, for instance segmentation and detection."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jtsm_jax.data.run_lengths import encode_segments, mask_area
from jtsm_jax.data.source import LazyRecords, Source
from jtsm_jax.types import Categories, Instances, PanopticMap, Record


def things_only(source: Source) -> Source:
  """The same images; their tags and ground truth are those of things.

  Panoptic ground truth becomes instances where there are none. Images without a
  thing stay: that nothing is in them can be learned from, too.
  """
  count = source.categories.num_things
  if count == len(source.categories):
    return source

  def split(records: Sequence[Record]) -> LazyRecords:
    return LazyRecords(len(records), lambda i: _of_things(records[i], count))

  return dataclasses.replace(
    source,
    categories=Categories(source.categories.items[:count]),
    splits={name: split(s) for name, s in source.splits.items()},
  )


def _of_things(record: Record, count: int) -> Record:
  instances = record.instances
  if instances is None and record.target is not None:
    instances = instances_of(record.target)
  return dataclasses.replace(
    record,
    tags=tuple(tag for tag in record.tags if tag < count),
    target=None,
    instances=instances,
  )


def instances_of(panoptic: PanopticMap) -> Instances:
  """The things of a panoptic map as instances with masks and tight boxes."""
  things = [s for s in panoptic.segments if s.is_thing]
  boxes, rles = encode_segments(panoptic.ids, [s.id for s in things])
  return Instances(
    category=np.array([s.category for s in things], np.int32),
    boxes=boxes.astype(np.float64),
    area=np.array([mask_area(counts) for counts in rles], np.float64),
    is_crowd=np.array([s.is_crowd for s in things], bool),
    is_difficult=np.zeros(len(things), bool),
    rles=rles,
  )
