"""The op that counts the keys of each row up to several thresholds: one step of a search."""

import jax
from jaxtyping import Array, Int, UInt32

from kvc_jax.kernels import backends, count_at_most_triton, count_at_most_xla


def count_at_most(
    keys: UInt32[Array, "rows kvs"],
    thresholds: UInt32[Array, "groups thresholds"],
    lengths: Int[Array, " rows"],
) -> jax.Array:
  """Keys of each row, among its first `lengths`, that are at most each threshold.

  All thresholds are counted in one read of the keys, so a search that compares
  with 15 thresholds at a time reads them 8 times instead of a bisection's 32.

  Args:
    keys: u32 [R, K].
    thresholds: u32 [E, T], for R / E neighbouring rows each.
    lengths: i32 [R], each at most K.

  Returns:
    i32 [R, T].
  """
  rows, _ = keys.shape
  if rows % thresholds.shape[0] or lengths.shape != (rows,):
    raise ValueError(f"count_at_most: keys {keys.shape}, thresholds {thresholds.shape}, lengths {lengths.shape}")
  run = {"triton": count_at_most_triton.count_at_most}.get(_backend(), count_at_most_xla.count_at_most)
  return run(keys, thresholds, lengths)


def bits_per_step() -> int:
  """Bits of the answer that one step of a search should find: 2**bits - 1 thresholds."""
  return 4 if _backend() == "triton" else 1


def _backend() -> str:
  return backends.choose("count_at_most", backends.KEYS)
