"""Closing the holes that eviction left in the heads' lists."""

import dataclasses

from jaxtyping import Array, Bool, Int

from kvc_jax.cache.state import CacheState
from kvc_jax.kernels.compact_kv import compact_kv


def compact(
    state: CacheState,
    evicted: Bool[Array, "heads kvs"],
    tables: Int[Array, "heads max_blocks"],
    lengths: Int[Array, " heads"],
    kept: Int[Array, " heads"],
) -> CacheState:
  """Moves survivors into holes, so that a head's first `kept` entries are those that stay.

  Tables and lengths of the state stay as they were; for the arguments see the op.
  """
  kv, scores, positions = compact_kv(state.kv, state.scores, state.positions, evicted, tables, lengths, kept)
  return dataclasses.replace(state, kv=kv, scores=scores, positions=positions)
