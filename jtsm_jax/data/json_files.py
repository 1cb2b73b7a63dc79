"""JSON files from strangers: what is missing or of the wrong type is named."""

from __future__ import annotations

import json
from typing import Any

from jtsm_jax.data.files import AnyPath, read_bytes
from jtsm_jax.types import InputError


def read_json(path: AnyPath, *, unique_keys: bool = False) -> Any:
  """Reads a JSON file.

  Args:
    path: of the file; UTF-8, with or without a byte-order mark.
    unique_keys: refuse an object that has a key twice, instead of taking the
      last.

  Raises:
    InputError: the file is missing or damaged, or a key occurs twice.
  """

  def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for key, value in pairs:
      if key in content:
        raise InputError(f"{path}: the key {key!r} occurs twice; keep one")
      content[key] = value
    return content

  try:
    return json.loads(
      read_bytes(path).decode("utf-8-sig"),
      object_pairs_hook=no_twins if unique_keys else None,
    )
  except FileNotFoundError:
    raise InputError(f"{path}: no such file; it is needed here") from None
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: is no readable JSON ({error})") from error


def json_field(
  entry: Any, name: str, path: AnyPath, what: str, *, kind: type = object
) -> Any:
  """`entry[name]` of a JSON file.

  Args:
    entry: a part of the file, an object.
    name: of the field.
    path: of the file, for the message.
    what: the part is, for the message.
    kind: of the value.

  Raises:
    InputError: there is no such field, or its value is of another kind.
  """
  if not isinstance(entry, dict) or name not in entry:
    found = sorted(entry) if isinstance(entry, dict) else repr(entry)
    raise InputError(f"{path}: {what} has no {name!r}; found {found}")
  value = entry[name]
  if not isinstance(value, kind):
    raise InputError(
      f"{path}: {name!r} of {what} is {short(value)}; it must be of the type"
      f" {kind.__name__}"
    )
  return value


def json_key(value: Any) -> int | float | str | None:
  """An id of a JSON file that can be looked up; None if it is no such thing."""
  return value if isinstance(value, int | float | str) else None


def short(value: Any) -> str:
  """A value for a message, however long it is."""
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
