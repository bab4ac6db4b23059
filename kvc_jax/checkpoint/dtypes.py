"""Which number formats a checkpoint may hold, and in which one a model is loaded."""

import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16", which safetensors relies on)
import numpy as np
from jax.typing import DTypeLike

from kvc_jax.errors import InputError

NAMES = ("bfloat16", "float16", "float32")


def parse_dtype(dtype: DTypeLike) -> np.dtype:
  """The NumPy dtype of a name or dtype that a caller gave.

  Raises:
    InputError: it is none of `NAMES`.
  """
  try:
    parsed = np.dtype(dtype)
  except TypeError:
    parsed = None
  if parsed is None or parsed.name not in NAMES:
    raise InputError(f"dtype {dtype!r} is not supported; use one of {', '.join(NAMES)}")
  return parsed


def compute_dtype(stored: np.dtype) -> np.dtype:
  """The dtype in which a checkpoint runs unless asked otherwise: its own, but bfloat16 for float16.

  Activations of Llama models overflow float16 (largest value 65504); they do not overflow bfloat16.
  """
  return np.dtype("bfloat16") if stored == np.float16 else stored


def cast_into(target: np.ndarray, source: np.ndarray, name: str) -> None:
  """Copies `source` into `target` of the same shape, rounding to nearest.

  Raises:
    InputError: a value of `source` is too large for float16.
  """
  if target.dtype != np.float16 or source.dtype == np.float16:
    target[...] = source
    return
  with np.errstate(over="ignore"):
    target[...] = source
  check_float16_range(target, name)


def check_float16_range(array: np.ndarray, name: str) -> None:
  """Refuses weights that became infinite on the way to float16."""
  if not np.isfinite(array).all():
    raise InputError(f"parameter {name} does not fit float16; use bfloat16 or float32")
