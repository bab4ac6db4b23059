"""Rows to places that never meet.

XLA writes rows of 16 bits that may meet in one place with an atomic operation each, and a GPU does those
of one place in turn. Where some rows go nowhere, all of these would meet.
"""

from typing import Any

import jax
import jax.numpy as jnp


def apart(index: jax.Array, valid: jax.Array, size: int) -> jax.Array:
  """`index` (i32, of any shape) where `valid`; elsewhere a place of its own for each entry, from `size` on.

  Args:
    index: distinct where `valid`, and below `size`.
    valid: bool, broadcast to the shape of `index`.
    size: places that there are.
  """
  entry = jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
  return jnp.where(valid, index, size + entry)


def put(places: Any, rows: jax.Array) -> jax.Array:
  """`places.set(rows)` for the `array.at[index]` of distinct indices; those out of range are dropped."""
  return places.set(rows, mode="drop", unique_indices=True)
