"""Predicting the images of a user."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import ml_collections

from jtsm_jax.console import progress
from jtsm_jax.data import prepared
from jtsm_jax.data.files import (
  PathOrUrl,
  data_path,
  folder_name,
  is_folder,
  read_bytes,
)
from jtsm_jax.data.image_files import ImageFiles, digest, find_images
from jtsm_jax.data.transforms import decode_image
from jtsm_jax.evaluation.predict import predict
from jtsm_jax.modes.data import prepared_directory
from jtsm_jax.modes.proposals import fill_store_of, proposal_maker
from jtsm_jax.modes.trained import (
  load_trained,
  prediction_settings,
  result_settings,
  steps_of,
)
from jtsm_jax.proposals import store as stores
from jtsm_jax.reporting.predictions import collect, is_done, write_prediction
from jtsm_jax.types import InputError

Config = ml_collections.ConfigDict


def predict_images(
  config: Config, workdir: pathlib.Path, where: PathOrUrl
) -> None:
  """Predicts images, one after the other; those that are done are skipped.

  Args:
    config: see configs/base.py.
    workdir: folder of the run; the results lie in its folder "predictions".
    where: see `data.image_files.find_images`.
  """
  directory = prepared_directory(config, workdir)
  categories = prepared.open_prepared(directory).categories
  files = find_images(where)
  place = data_path(where)
  is_whole = is_folder(place)
  if not is_whole:
    place = next(iter(files.values())).parent
  output = workdir / "predictions" / folder_name(place)
  maker = proposal_maker(config)
  trained = load_trained(config, workdir, categories)
  settings = result_settings(config) | {"proposals": maker.key}

  def made_with(data: bytes) -> dict[str, Any]:
    return trained.key | {"image": digest(data), "settings": settings}

  todo = {}
  for name, path in progress(files.items(), "look", unit="image"):
    with contextlib.suppress(OSError):  # is reported below
      if is_done(output, name, made_with=made_with(read_bytes(path))):
        continue
    todo[name] = path
  print(f"predict: {len(files)} images, {len(files) - len(todo)} of them done")
  source = ImageFiles(todo, num_classes=len(categories))
  if len(source):
    path = output / "proposals" / maker.key
    fill_store_of(config, source, path, maker)
    for prediction in predict(
      steps_of(config, trained.model, trained.variables),
      source,
      stores.open_store(path),
      calibration=trained.calibration,
      num_things=categories.num_things,
      settings=prediction_settings(config),
    ):
      n = prediction.index
      data = source[n].image
      write_prediction(
        output,
        source.names[n],
        prediction,
        categories,
        image=decode_image(data),
        file_name=source.paths[n].name,
        made_with=made_with(data),
      )
  whole = [name for name in files if name not in source.left_out]
  if not whole:
    raise InputError(f"{where}: no image can be decoded, see above")
  others = set()
  if not is_whole:  # what other patterns found stays beside it
    others = {p.stem for p in (output / "records").glob("*.json")}
  collect(output, [*whole, *sorted(others - {*whole})], categories)
  if source.left_out:
    print(f"left out   {len(source.left_out)} files, see above")
  print(
    f"panoptic   {output / 'panoptic.json'} and {output / 'panoptic'}\n"
    f"classes    {output / 'classes'}, named in {output / 'classes.json'}\n"
    f"instances  {output / 'instances.json'}\n"
    f"boxes      {output / 'detections.json'}\n"
    f"overlays   {output / 'overlays'}"
  )
