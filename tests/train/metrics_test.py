"""metrics.jsonl read back with json, event files with tensorboardX's protos."""

import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from jtsm_jax.train.metrics import MetricWriter
from jtsm_jax.types import InputError


def read_lines(directory):
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def read_events(directory):
  """TFRecord: length (8 bytes), checksum (4), data, checksum (4)."""
  events = []
  for path in sorted(directory.glob("events.*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def scalars(directory):
  return [
    (event.step, value.tag, value.simple_value)
    for event in read_events(directory)
    for value in event.summary.value
    if value.WhichOneof("value") == "simple_value"
  ]


def test_written_values_are_on_disk_at_once_and_in_tensorboard(tmp_path):
  writer = MetricWriter(tmp_path / "new" / "run")
  writer.write(3, {"loss/mil": np.float32(0.5), "rate": 1e-3})
  [line] = read_lines(tmp_path / "new" / "run")
  assert line["step"] == 3
  assert line["loss/mil"] == 0.5
  assert line["time"] > 1.6e9
  writer.close()
  assert scalars(tmp_path / "new" / "run") == [
    (3, "loss/mil", 0.5),
    (3, "rate", pytest.approx(1e-3)),
  ]


def test_pictures_and_settings_are_in_tensorboard(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.describe({"seed": 3, "data.sizes": (4, 8)}, measures=["val/pq"])
  picture = np.zeros((5, 7, 3), np.uint8)
  picture[1, 2] = 9, 200, 30
  writer.write_images(6, {"mining/0": picture})
  writer.close()
  values = {
    value.tag: (event.step, value)
    for event in read_events(tmp_path)
    for value in event.summary.value
  }
  step, image = values["mining/0"]
  assert step == 6
  with Image.open(io.BytesIO(image.image.encoded_image_string)) as found:
    np.testing.assert_array_equal(np.asarray(found), picture)
  text = values["config/text_summary"][1].tensor.string_val[0].decode()
  assert "| seed | `3` |" in text
  assert "| data.sizes | `(4, 8)` |" in text
  data = values["_hparams_/session_start_info"][1]
  content = data.metadata.plugin_data.content
  assert b"data.sizes" in content
  assert b"(4, 8)" in content
  experiment = values["_hparams_/experiment"][1].metadata.plugin_data.content
  assert b"val/pq" in experiment
  assert not (tmp_path / "metrics.jsonl").read_text()


def test_not_finite_is_null_because_json_has_no_nan(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 2})
  writer.close()
  [line] = read_lines(tmp_path)
  assert (line["a"], line["b"], line["c"]) == (None, None, 2)


def test_resume_has_no_step_twice(tmp_path):
  writer = MetricWriter(tmp_path)
  for step in (10, 20, 30):
    writer.write(step, {"loss": step})
  writer.close()

  resumed = MetricWriter(tmp_path)
  resumed.truncate_after(20)
  for step in (30, 40):
    resumed.write(step, {"loss": -step})
  resumed.close()
  losses = [(x["step"], x["loss"]) for x in read_lines(tmp_path)]
  assert losses == [(10, 10), (20, 20), (30, -30), (40, -40)]
  # TensorBoard is told to forget the steps from 21 on.
  starts = [e.step for e in read_events(tmp_path) if e.HasField("session_log")]
  assert starts == [21]
  assert not (tmp_path / "metrics.tmp").exists()


def test_truncate_in_the_middle_of_a_run(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.write(1, {"a": 1})
  writer.write(2, {"a": 2})
  writer.truncate_after(1)
  writer.write(2, {"a": 3})
  writer.close()
  assert [x["a"] for x in read_lines(tmp_path)] == [1, 3]


def test_line_torn_by_a_kill_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
  writer = MetricWriter(tmp_path)
  writer.write(2, {"a": 5})
  writer.close()
  assert [x["step"] for x in read_lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}'])
def test_foreign_line_is_an_error_that_names_it(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{line}\n')
  with pytest.raises(InputError, match=r"metrics\.jsonl line 2"):
    MetricWriter(tmp_path).truncate_after(1)
  assert path.read_text().count("\n") == 2  # nothing was lost


def test_inactive_writer_touches_nothing(tmp_path):
  writer = MetricWriter(tmp_path / "none", active=False)
  writer.write(1, {"a": 1})
  writer.truncate_after(0)
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_faults_are_named(tmp_path):
  writer = MetricWriter(tmp_path)
  with pytest.raises(ValueError, match="step"):
    writer.write(1, {"step": 1})
  with pytest.raises(ValueError, match=r"'a'.*\(2,\)"):
    writer.write(1, {"a": np.zeros(2)})
  writer.close()
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="workdir"):
    MetricWriter(tmp_path / "file")


FULL = """
import resource, sys
from jtsm_jax.train.metrics import MetricWriter
from jtsm_jax.types import InputError

with MetricWriter(sys.argv[1]) as writer:
  writer.write(1, {"loss": 1})
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file grows on
  try:
    for step in range(2, 1000):
      writer.write(step, {"loss": step})
  except InputError as error:
    print(error)
"""


def test_a_full_disk_is_told(tmp_path):
  ended = subprocess.run(
    [sys.executable, "-c", FULL, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert ended.stderr == ""
  assert f"{tmp_path / 'metrics.jsonl'}: metrics cannot be" in ended.stdout
  assert "(File too large). Free some space" in ended.stdout
  # The line that was torn is dropped by the next run.
  with MetricWriter(tmp_path) as writer:
    writer.write(1000, {"loss": 0})
  steps = [x["step"] for x in read_lines(tmp_path)]
  assert steps == [*range(1, len(steps)), 1000]
  assert len(steps) > 10
