"""Train, evaluate and use a panoptic segmenter that learns from image tags.

  python main.py --config=configs/shapes.py --workdir=runs/demo
  python main.py --config=configs/folder.py --config.data.root=DIR \\
      --workdir=runs/mine
  python main.py --config=... --workdir=... --mode=predict --input=FOLDER

Without --mode, everything that is missing is done: prepare, propose, train,
evaluate. A run that was stopped goes on where it was.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jtsm_jax.types import InputError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File of the experiment, see configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, results."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "all",
  ["all", "prepare", "propose", "train", "evaluate", "predict"],
  "What to do; 'all' does what is missing up to 'evaluate'.",
)
_INPUT = flags.DEFINE_string(
  "input", None, "Folder of images to predict, for --mode=predict."
)


def main(argv: list[str]) -> None:
  """Checks the flags and runs the mode."""
  if len(argv) > 1:
    raise InputError(
      f"unknown argument {argv[1]!r}; flags begin with --, see --help"
    )
  for flag in (_CONFIG, _WORKDIR):
    if flag.value is None:
      raise InputError(f"--{flag.name} is missing; see --help")
  if _MODE.value == "predict" and _INPUT.value is None:
    raise InputError("--mode=predict needs --input=FOLDER")
  # Late, so that --help and a wrong flag answer at once.
  from jtsm_jax import run

  run.run(
    _CONFIG.value,
    pathlib.Path(_WORKDIR.value),
    mode=_MODE.value,
    images=pathlib.Path(_INPUT.value) if _INPUT.value else None,
  )


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; a wrong one is the user's fault, not a crash."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
    raise InputError(f"{error}; see --help and configs/base.py") from error


def _guarded(function, argv):
  """Runs `function`; a fault of the input is one message and exit code 2."""
  try:
    return function(argv)
  except InputError as error:
    logging.flush()
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(
    lambda argv: _guarded(main, argv),
    flags_parser=lambda argv: _guarded(_parse_flags, argv),
  )
