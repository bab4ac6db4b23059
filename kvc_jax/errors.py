"""The one exception class for faults in what a caller gave, and the checks that raise it."""

import math
import numbers
from typing import Any

LARGEST_COUNT = 2**30
"""Counts go to the device as 32-bit numbers."""


class InputError(ValueError):
  """Bad input: the message is one line that names the fault and the remedy.

  The command line prints it without a traceback and exits with 2; a library
  caller can catch it as the `ValueError` that it is.
  """


class QueueFull(Exception):
  """An engine has as many waiting requests as it was made for; try again later."""


def check_count(name: str, value: Any, *, at_least: int, at_most: int = LARGEST_COUNT, hint: str = "") -> None:
  """Raises InputError unless `value` is a whole number in the range."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not whole or not at_least <= value <= at_most:
    raise InputError(f"{name} is {value!r}; give a whole number from {at_least} to {at_most}{hint}")


def check_real(name: str, value: Any, *, at_least: float, hint: str) -> None:
  """Raises InputError unless `value` is a finite number of at least `at_least`."""
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not math.isfinite(value) or value < at_least:
    raise InputError(f"{name} is {value!r}; give {hint}")
