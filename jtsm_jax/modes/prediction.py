"""Predicting the images of a user."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import ml_collections

from jtsm_jax.console import progress
from jtsm_jax.data.files import (
  AnyPath,
  PathOrUrl,
  check_names,
  is_file,
  read_bytes,
)
from jtsm_jax.data.image_files import (
  ImageFiles,
  digest,
  file_name,
  find_images,
)
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.predict import predict
from jtsm_jax.modes.proposals import fill_store_of, proposal_maker
from jtsm_jax.modes.trained import (
  load_trained,
  prediction_settings,
  result_settings,
  steps_of,
)
from jtsm_jax.proposals import store as stores
from jtsm_jax.proposals.fill_store import Maker
from jtsm_jax.reporting.predictions import (
  collect,
  is_done,
  output_folder,
  recorded_file,
  write_prediction,
)
from jtsm_jax.types import InputError, Record

Config = ml_collections.ConfigDict


def predict_images(
  config: Config, workdir: pathlib.Path, where: PathOrUrl
) -> None:
  """Predicts images, one after the other; those that are done are skipped.

  The JSON files also list the images of earlier calls that need not be
  predicted again.

  Args:
    config: see configs/base.py.
    workdir: folder of the run; the results lie in its folder "predictions".
    where: see `data.image_files.find_images`.

  Raises:
    InputError: there is no image, or one has the name of another that was
      predicted before and is still there.
  """
  folder, files = find_images(where)
  output = output_folder(workdir / "predictions", folder)
  file_names = {name: file_name(path, folder) for name, path in files.items()}
  name_of = {path: name for name, path in files.items()}
  for name in files:  # and those of earlier calls that are still there
    before = recorded_file(output, name)
    if before not in (None, file_names[name]) and is_file(folder / before):
      name_of[folder / before] = name
  check_names(name_of)
  maker = proposal_maker(config, files)
  trained = load_trained(config, workdir)
  categories = trained.categories
  settings = result_settings(config)
  key = trained.key
  if config.evaluation.calibrate:  # else it is neutral, always
    key = key | {"calibration": trained.calibration.digest()}

  def made_with(name: str, data: bytes) -> dict[str, Any]:
    image = {"file": file_names[name], "image": digest(data)}
    proposals = {"proposals": maker.key_of(name)}
    return key | image | {"settings": settings | proposals}

  def is_current(name: str, path: AnyPath) -> bool:
    with contextlib.suppress(OSError):  # is reported below
      return is_done(output, name, made_with=made_with(name, read_bytes(path)))
    return False

  bar = progress(files.items(), "look", unit="image")
  todo = {name: path for name, path in bar if not is_current(name, path)}
  print(f"predict: {len(files)} images, {len(files) - len(todo)} of them done")
  source = ImageFiles(todo, num_classes=len(categories))
  if len(source):
    path = output / "proposals" / maker.key
    fill_store_of(config, source, path, _by_name(maker, source))
    for prediction in predict(
      steps_of(config, trained.model, trained.variables),
      source,
      stores.ProposalStore(path),  # empty, where the only image has none
      calibration=trained.calibration,
      num_things=categories.num_things,
      settings=prediction_settings(config),
    ):
      n = prediction.index
      data, name = source[n].image, source.names[n]
      write_prediction(
        output,
        name,
        prediction,
        categories,
        image=decode_image(data),
        file_name=file_names[name],
        made_with=made_with(name, data),
      )
  whole = [name for name in files if name not in source.left_out]
  if not whole:
    raise InputError(f"{where}: no image can be decoded, see above")
  # What other calls found stays beside it, unless it would mix results of
  # different models, or show what is no longer there.
  records = (output / "records").glob("*.json")
  earlier = {path.stem for path in records} - {*files}
  for name in earlier:
    file_names[name] = recorded_file(output, name) or ""
  others = [n for n in sorted(earlier) if is_current(n, folder / file_names[n])]
  collect(output, [*whole, *others], categories)
  if source.left_out:
    print(f"left out   {len(source.left_out)} files, see above")
  if len(others) < len(earlier):
    print(
      f"not listed {len(earlier) - len(others)} images of earlier calls: they"
      " are gone, or have changed, or were predicted with other weights or"
      " settings; predict those that are there again"
    )
  print(
    f"panoptic   {output / 'panoptic.json'} and {output / 'panoptic'}\n"
    f"classes    {output / 'classes'}, named in {output / 'classes.json'}\n"
    f"instances  {output / 'instances.json'}\n"
    f"boxes      {output / 'detections.json'}\n"
    f"overlays   {output / 'overlays'}"
  )


def _by_name(maker: Maker, source: ImageFiles) -> Maker:
  """Proposals from elsewhere know an image by its name, without the digest."""
  name_of = dict(zip(source.image_ids, source.names, strict=True))

  def read(record: Record) -> Any:
    name = name_of[record.image_id]
    return maker.read(dataclasses.replace(record, image_id=name))

  return dataclasses.replace(maker, read=read)
