"""Train, evaluate and use a panoptic segmenter that learns from image tags.

  python main.py --config=configs/shapes.py --workdir=runs/demo
  python main.py --config=configs/folder.py --config.data.root=DIR \\
      --workdir=runs/mine
  python main.py --config=... --workdir=... --mode=predict --input=FOLDER

Without --mode, everything that is missing is done: prepare, propose, train,
evaluate. A run that was stopped goes on where it was.
"""

import contextlib
import errno
import multiprocessing
import operator
import os
import pathlib
import re
import signal
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File of the experiment, see configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, results."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "all",
  [
    "all",
    "prepare",
    "audit",
    "verify",
    "propose",
    "proposal_quality",
    "train",
    "evaluate",
    "predict",
    "export",
    "report",
  ],
  "What to do; 'all' does what is missing up to 'evaluate'.",
)
_INPUT = flags.DEFINE_string(
  "input",
  None,
  "For --mode=predict: a folder of images, one image, or a pattern in quotes"
  " such as 'photos/**/*'; or its URL.",
)
_SHARD = flags.DEFINE_integer(
  "shard",
  0,
  "For --mode=prepare and propose: which part of the images, from 0.",
)
_NUM_SHARDS = flags.DEFINE_integer(
  "num_shards",
  1,
  "For --mode=prepare and propose: into how many parts they are divided.",
)
_BEAM = flags.DEFINE_string(
  "beam",
  None,
  "For --mode=prepare and propose: options of an Apache Beam pipeline that does"
  " all --num_shards parts, such as '--runner=DirectRunner'.",
)
_INIT_FROM = flags.DEFINE_string(
  "init_from",
  None,
  "For training: start with the weights of another run, by its workdir or one"
  " of its checkpoints. Short for --config.train.init_from.",
)
_PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "For training: keep a trace of the steps FIRST:LAST in WORKDIR/profile.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "For --mode=train: this is one of several processes, on as many hosts. Finds"
  " the others by itself on TPU pods and under Slurm and Open MPI up to 4;"
  " elsewhere the next three flags tell (docs/pods.md).",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of the first process, for --distributed."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes in all, for --distributed."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0, for --distributed."
)

_DISK_FAULTS = (  # other errors of the system are bugs
  errno.EACCES,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
  errno.ENOSPC,
  errno.EPERM,
  errno.EROFS,
)
_AGAIN = 3  # seconds after which a signal that was not heeded is raised again


def main(argv: list[str]) -> None:
  """Checks the flags and runs the mode."""
  if len(argv) > 1:
    _fail(f"unknown argument {argv[1]!r}; flags begin with --, see --help")
  for flag in (_CONFIG, _WORKDIR):
    if not flag.value:
      _fail(f"--{flag.name} is missing; see --help")
  if _MODE.value == "predict" and not _INPUT.value:
    _fail("--mode=predict needs --input=FOLDER, an image or a pattern")
  if _NUM_SHARDS.value != 1 and _MODE.value not in ("prepare", "propose"):
    _fail("--num_shards is for --mode=prepare and --mode=propose")
  if not 0 <= _SHARD.value < _NUM_SHARDS.value:
    _fail(
      f"--shard={_SHARD.value}: wanted 0 .. {_NUM_SHARDS.value - 1}, below"
      " --num_shards"
    )
  if _BEAM.value and _MODE.value not in ("prepare", "propose"):
    _fail("--beam is for --mode=prepare and --mode=propose")
  if _BEAM.value and (_NUM_SHARDS.value == 1 or flags.FLAGS["shard"].present):
    _fail("--beam does all shards: give --num_shards=N, and no --shard")
  if "://" in _WORKDIR.value:
    _fail(
      f"--workdir={_WORKDIR.value}: must be a folder of this machine; URLs may"
      " be data.root, data.sbd, data.prepared, proposals.store and --input"
    )
  if _DISTRIBUTED.value and _MODE.value != "train":
    _fail("--distributed is for --mode=train; the other modes run on one host")
  by_hand = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  given = [value is not None for value in by_hand]
  if any(given) and not (_DISTRIBUTED.value and all(given)):
    _fail(
      "--coordinator, --num_processes and --process_id go together, with"
      " --distributed"
    )
  if _INIT_FROM.value:
    with _CONFIG.value.unlocked():
      _CONFIG.value.train.init_from = _INIT_FROM.value
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell too much
  sys.stdout.reconfigure(line_buffering=True)  # in order, in a log file too
  received = []
  if not _DISTRIBUTED.value:  # jax.distributed listens itself
    numbers = (signal.SIGINT, signal.SIGTERM)
    received = _interrupt_at(*(numbers if _stops_well() else numbers[:1]))
  try:  # late, so that --help and a wrong flag answer at once
    from jtsm_jax import distributed, run
    from jtsm_jax.train.stopping import Stopped
    from jtsm_jax.types import InputError
  except KeyboardInterrupt:
    _stop_at_once(received)
  except ImportError as error:
    _fail(f"{error}; `make install` brings what is needed")
  try:
    if _DISTRIBUTED.value:
      distributed.start(*by_hand)
    run.run(
      _CONFIG.value,
      pathlib.Path(_WORKDIR.value).expanduser(),
      mode=_MODE.value,
      images=_INPUT.value,
      shard=_SHARD.value,
      num_shards=_NUM_SHARDS.value,
      beam=_BEAM.value or "",
      profile=_profiled_steps(),
    )
    if _stops_well():  # all is done, also if one comes while Python ends
      signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(0)
  except KeyboardInterrupt:
    _stop_at_once(received)
  except InputError as error:
    _tell(str(error))
    _exit_at_once(2)
  except OSError as error:
    if error.errno not in _DISK_FAULTS:
      raise
    place = error.filename or f"--workdir={_WORKDIR.value}"
    _tell(
      f"{place}: {error.strerror}; free some space, see to the rights, or give"
      " another folder. The same command goes on from what is there"
    )
    _exit_at_once(2)
  except FloatingPointError as error:
    _tell(str(error))
    _exit_at_once(1)
  except Stopped as stopped:
    print("\nstopped and saved; the same command goes on from here")
    _exit_at_once(130 if stopped.signal == signal.SIGINT else 0)


def _stop_at_once(received: list[int]) -> NoReturn:
  print(
    "\nstopped; the same command goes on from what is on disk",
    file=sys.stderr,
  )
  # Threads that still save would only complain. What is on disk is whole at any
  # time.
  _exit_at_once(0 if received == [signal.SIGTERM] else 130)


def _exit_at_once(code: int) -> NoReturn:
  """Ends the process and its workers, and waits for no thread.

  A thread that was just being started when a signal came is known to nobody who
  could end it, and one of a failed save waits for the others: the interpreter
  would wait for them.
  """
  if _DISTRIBUTED.value:
    sys.exit(code)  # tells the other processes
  with contextlib.suppress(OSError):  # a log file on a full disk
    sys.stdout.flush()
    sys.stderr.flush()
  for worker in multiprocessing.active_children():
    worker.terminate()
  os._exit(code)


def _stops_well() -> bool:
  """Whether a SIGTERM is no failure: the same command goes on."""
  # jax.distributed listens itself.
  return _MODE.value in ("all", "train") and not _DISTRIBUTED.value


def _interrupt_at(*numbers: int) -> list[int]:
  """Makes signals raise KeyboardInterrupt; the list tells the first of them."""
  received = []

  def interrupt(number: int, frame: object) -> NoReturn:
    del frame
    if not received:
      received.append(number)
    # Where it comes within a callback, of the garbage collector for example,
    # Python drops what is raised: so it is raised again.
    signal.alarm(_AGAIN)
    raise KeyboardInterrupt

  def tell_unraisable(unraisable: object) -> None:
    if unraisable.exc_type is not KeyboardInterrupt:
      sys.__unraisablehook__(unraisable)

  for number in (*numbers, signal.SIGALRM):
    signal.signal(number, interrupt)
  sys.unraisablehook = tell_unraisable
  return received


def _profiled_steps() -> tuple[int, int] | None:
  if not _PROFILE.value:
    return None
  found = re.fullmatch(r"(\d+):(\d+)", _PROFILE.value)
  first, last = map(int, found.groups()) if found else (1, 0)
  if first >= last:
    _fail(f"--profile={_PROFILE.value}: wanted FIRST:LAST, such as 100:105")
  return first, last


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; a wrong one is the user's fault, not a crash."""
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.lock()  # raises what went wrong when the file was loaded
      _check_repeated(argv)
    return rest
  except OSError as error:
    reason = str(error).splitlines()[-1].strip()
    _fail(f"the file of --config cannot be read: {reason}; see configs/")
  except (AttributeError, KeyError) as error:
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    reason = " ".join(str(error.args[0]).split())
    what = "no such field: " if isinstance(error, KeyError) else ""
    _fail(f"--config: {what}{reason}; see configs/base.py")
  except (ImportError, SyntaxError) as error:
    _fail(f"the file of --config cannot be loaded: {error}")
  except (flags.Error, TypeError) as error:
    reason = str(error)
    if "Traceback" in reason:  # of a file of --config
      reason = f"--config: {reason.strip().splitlines()[-1]}"
    _fail(f"{reason}; see --help and configs/base.py")


def _check_repeated(argv: list[str]) -> None:
  """Of a field that is a tuple, two flags would be put together."""
  names = [a.split("=")[0].lstrip("-") for a in argv if a.startswith("--")]
  for name in names:
    field = name.removeprefix("config.")
    if field == name or names.count(name) == 1:
      continue
    if isinstance(operator.attrgetter(field)(_CONFIG.value), tuple):
      _fail(f"--{name} is given {names.count(name)} times; give it once")


def _fail(message: str) -> NoReturn:
  """A fault of the input: one message and exit code 2."""
  _tell(message)
  sys.exit(2)


def _tell(message: str) -> None:
  logging.flush()
  print(f"\nerror: {message}", file=sys.stderr)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
