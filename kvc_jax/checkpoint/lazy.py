"""A parameter that is read only when its turn comes."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyArray:
  """Shape and dtype of an array, and the function that reads it.

  Models are converted and loaded as a sequence of these, so that the host holds
  one parameter at a time and never the whole model. Orbax takes it for a leaf of a tree.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Number of values."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Size in bytes once loaded."""
    return self.size * self.dtype.itemsize
