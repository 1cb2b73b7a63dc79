"""Reading a pickle without executing what it names.

Loading a pickle calls whatever functions it names, with arguments of its own
choice. Here it may name nothing but what is on a list, and the list holds
stand-ins that describe, never the functions themselves.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

from jtsm_jax.types import InputError


# The one that is written in Python: the one in C reserves memory for the
# largest memo slot that a file names, so nine bytes can fill the machine.
class Unpickler(pickle._Unpickler):
  """Builds what a pickle describes from the names on a list.

  Text of Python 2 is read as latin-1, which keeps every byte.
  """

  def __init__(self, file: BinaryIO, allowed: Mapping[str, Any]):
    """Opens a pickle.

    Args:
      file: where it begins.
      allowed: "module.name" -> what stands for it. Make its functions and
        classes anew for each file: a pickle can alter what it is given.
    """
    super().__init__(file, encoding="latin1")
    self._allowed = allowed

  def find_class(self, module: str, name: str) -> Any:
    """What stands for a name.

    Raises:
      InputError: the name is not on the list.
    """
    found = f"{module}.{name}"
    if found not in self._allowed:
      raise InputError(
        f"it names {found}, which is not on the list of what a file of weights "
        "may name; nothing was executed"
      )
    return self._allowed[found]
