"""Parts of a long work as a pipeline of Apache Beam.

Beam brings the machines: Dataflow, Flink and Spark run a pipeline as the local
`--runner=DirectRunner` does. What the parts write they write themselves, so
nothing but the number of a part goes through the pipeline.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from jtsm_jax.types import InputError


def run_shards(
  function: Callable[[int], None], num_shards: int, options: str
) -> None:
  """Calls `function` with each of 0 .. num_shards - 1, on some machine.

  A runner may call it twice with one number, and at the same time.

  Args:
    function: pickles, and finds its module where it runs.
    num_shards: number of calls.
    options: of the pipeline, as on a command line, with a `--runner`.

  Raises:
    InputError: Beam is not installed, the options name no runner that it knows,
      or a call raised one (where the runner hands it on; others raise a
      RuntimeError that quotes it).
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options as beam_options
  except ImportError as error:
    raise InputError(
      f"--beam needs Apache Beam ({error}): pip install 'jtsm_jax[beam]'"
    ) from error
  try:
    parsed = beam_options.PipelineOptions(shlex.split(options))
    if not parsed.view_as(beam_options.StandardOptions).runner:
      raise ValueError("there is no --runner, such as --runner=DirectRunner")
    pipeline = beam.Pipeline(options=parsed)
  except ValueError as error:
    raise InputError(f"--beam={options!r}: {error}") from error
  with pipeline:
    (
      pipeline
      | beam.Create(range(num_shards))
      | beam.Reshuffle()  # else they all go to one worker
      | beam.Map(function)
    )
