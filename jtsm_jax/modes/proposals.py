"""Filling the store of proposals, and measuring them."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
from absl import logging

from jtsm_jax.beam import run_shards
from jtsm_jax.data import prepared
from jtsm_jax.data.files import AnyPath, data_path
from jtsm_jax.data.image_files import ImageFiles
from jtsm_jax.data.prepared import PreparedData, RecordSource
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.evaluate import has_truth, measured_task
from jtsm_jax.modes.data import SHARED_FOLDER, prepared_directory
from jtsm_jax.proposals import importers, quality
from jtsm_jax.proposals import store as stores
from jtsm_jax.proposals.fill_store import Maker, fill_store, generator
from jtsm_jax.proposals.generate import ProposalSettings, preset_settings
from jtsm_jax.reporting import proposal_quality, stages
from jtsm_jax.reporting.gallery import spread
from jtsm_jax.reporting.visualize import write_image
from jtsm_jax.types import InputError

Config = ml_collections.ConfigDict


def propose(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  *,
  splits: Sequence[str] | None = None,
) -> stores.ProposalStore:
  """Gives proposals to every image that has none, and opens the store.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    data: the images.
    splits: of `data`; all of them if None.
  """
  path = fill_proposals(config, workdir, data, splits=splits)
  return stores.open_store(path)


def fill_proposals(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
  *,
  splits: Sequence[str] | None = None,
  shard: int = 0,
  num_shards: int = 1,
  beam: str = "",
) -> AnyPath:
  """Gives proposals to images that have none.

  Args:
    config: see configs/base.py.
    workdir: folder of the run.
    data: the images.
    splits: of `data`; all of them if None.
    shard, num_shards: which part of the images of each split.
    beam: options of a pipeline that does all parts; "" for none.

  Returns:
    Where the store is.
  """
  maker = proposal_maker(config, _image_ids(data))
  path = _store_path(config, workdir, data, maker)
  splits = tuple(splits or data.splits)
  if not beam:
    shards = dict(shard=shard, num_shards=num_shards)
    for split in splits:
      fill_store_of(config, data.splits[split], path, maker, **shards)
    return path
  directory = prepared_directory(config, workdir)
  run_shards(
    functools.partial(
      _propose_shard, config, directory, path, splits, num_shards
    ),
    num_shards,
    beam,
  )
  if not stores.shard_paths(path):
    raise InputError(
      f"{path}: what the workers of the pipeline have written is not there;"
      f" {SHARED_FOLDER}"
    )
  return path


def open_proposals(
  config: Config, workdir: pathlib.Path, data: PreparedData
) -> stores.ProposalStore:
  """Opens a store that holds proposals of every image.

  Raises:
    InputError: it is not there, or some images are missing.
  """
  maker = proposal_maker(config, _image_ids(data))
  store = stores.open_store(_store_path(config, workdir, data, maker))
  for split, source in data.splits.items():
    missing = [name for name in source.image_ids if name not in store]
    if missing:
      raise InputError(
        f"{store.path} lacks the proposals of {len(missing)} of {len(source)} "
        f"images of {split!r}, such as {missing[0]!r}; make them with "
        "--mode=propose"
      )
  return store


def _store_path(
  config: Config, workdir: pathlib.Path, data: PreparedData, maker: Maker
) -> AnyPath:
  root = data_path(config.proposals.store or workdir / "proposals")
  # A store may serve several data sets, whose image ids may be the same.
  return root / data.fingerprint / maker.key


def _image_ids(data: PreparedData) -> list[str]:
  """Of all splits: one store is for them, whichever are filled at a time."""
  return [name for split in data.splits.values() for name in split.image_ids]


def _propose_shard(config, directory, path, splits, num_shards, shard) -> None:
  """Runs in a worker of a pipeline, which has many for each machine."""
  data = prepared.open_prepared(directory)
  maker = proposal_maker(config, _image_ids(data))
  for split in splits:
    fill_store_of(
      config,
      data.splits[split],
      path,
      maker,
      num_workers=0,
      shard=shard,
      num_shards=num_shards,
    )


def fill_store_of(
  config: Config,
  source: RecordSource | ImageFiles,
  path: AnyPath,
  maker: Maker,
  **options: Any,
) -> None:
  """Gives proposals to those images of a source that have none.

  Args:
    config: see configs/base.py.
    source: the images.
    path: of the store.
    maker: of the proposals.
    **options: of `fill_store`, in place of the configuration's.
  """
  num_workers = config.proposals.num_workers or None
  fill_store(
    source,
    path,
    maker,
    max_bad_fraction=config.data.max_bad_fraction,
    report=logging.warning,
    **{"num_workers": num_workers} | options,
  )


def proposal_maker(config: Config, image_ids: Iterable[str]) -> Maker:
  """Where the proposals of `config.proposals` come from.

  Args:
    config: see configs/base.py.
    image_ids: of the images that a store is for, as PATH of
      `config.proposals.source` knows them.
  """
  settings = proposal_settings(config)
  if config.proposals.source:
    return importers.importer(
      pathlib.Path(config.proposals.source),
      image_ids,
      max_proposals=settings.max_proposals,
      max_superpixels=settings.num_superpixels,
    )
  return generator(settings)


def report_proposals(
  config: Config,
  workdir: pathlib.Path,
  data: PreparedData,
) -> None:
  """Measures the proposals of the validation images: table, JSON, pictures.

  Those that are missing are made first.

  Raises:
    InputError: no validation image has ground truth, or boxes alone.
  """
  if not has_truth(data):
    raise InputError(
      f"the data set {data.name!r} has no validation images with ground truth;"
      " the quality of proposals cannot be measured"
    )
  if measured_task(data.splits["val"], "panoptic") == "detection":
    raise InputError(
      f"the validation images of the data set {data.name!r} have boxes alone;"
      " the quality of proposals is measured with masks (docs/data.md)"
    )
  store = propose(config, workdir, data, splits=["val"])
  source, results, most = data.splits["val"], [], 1
  output = workdir / "proposal_quality"
  shown = spread(len(source), config.evaluation.pictures)
  for n, image_id in enumerate(source.image_ids):
    if image_id not in store:
      continue
    proposals, truth = store.get(image_id), _true_segments(source, n)
    results.append(quality.best_iou(proposals, truth))
    most = max(most, len(proposals))
    if n in shown:
      image = decode_image(source[n].image)
      sheet = stages.proposal_sheet(image, proposals, truth, data.categories)
      write_image(output / "images" / f"{image_id}.jpg", sheet)
  summary = quality.summary(quality.concatenate(results), most=most)
  counts = quality.counts_up_to(most)
  print(proposal_quality.table(summary, counts))
  proposal_quality.plot(summary, counts, output / "quality.png")
  (output / "quality.json").write_text(
    json.dumps({"proposals": counts, "groups": summary}, indent=1)
  )
  left_out = len(source) - len(results)
  if left_out:
    print(f"left out: {left_out} images without proposals")
  print(f"plot       {output / 'quality.png'}")
  print(f"figures    {output / 'quality.json'}")
  if shown:
    print(f"pictures   {output / 'images'}")


def _true_segments(source: RecordSource, n: int) -> quality.TrueSegments:
  target = source.target(n)
  if target is not None:
    return quality.segments_of_map(target)
  size = tuple(source.sizes[n].tolist())
  return quality.segments_of_instances(source.instances(n), size)


def proposal_settings(config: Config) -> ProposalSettings:
  """`config.proposals` as plain settings."""
  preset = preset_settings(config.proposals.preset)
  return dataclasses.replace(
    preset,
    network=preset.network and config.proposals.network,
    num_superpixels=config.proposals.num_superpixels,
    max_proposals=config.proposals.max_proposals,
    max_side=config.proposals.max_side,
  )
