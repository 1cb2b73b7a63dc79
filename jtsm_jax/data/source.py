"""Data sets as they come from their own files, before they are prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jtsm_jax.types import Categories, Record


class LazyRecords(Sequence[Record]):
  """Records that are read when they are asked for, from any thread."""

  def __init__(self, count: int, read: Callable[[int], Record]):
    """Args: how many, and what reads the i-th."""
    self._count = count
    self._read = read

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: int) -> Record:
    if not 0 <= i < self._count:
      raise IndexError(f"record {i} of {self._count}")
    return self._read(i)


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set as it comes from its own files, to be prepared.

  Attributes:
    name: of the data set.
    categories: the classes.
    splits: "train", whose records have no ground truth, and splits for
      evaluation, "val" first, whose records may have it. `height` and `width`
      may be 0, since `prepare` takes them from the decoded image.
    citation: whom to cite, BibTeX; "" for one's own images.
    state: changes when the files do; "" where that is not found out.
    settings: what was asked for, by field: values as JSON has them.
  """

  name: str
  categories: Categories
  splits: Mapping[str, Sequence[Record]]
  citation: str = ""
  state: str = ""
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
