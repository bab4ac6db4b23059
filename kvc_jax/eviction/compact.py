"""Closing the holes: survivors behind a head's new end move into holes before it.

After evicting e of a head's n KVs it has n' = n - e. The survivors at index >= n'
are as many as the holes at index < n', and the two sets are disjoint, so the
moves can go in any order (KV-Compress, arXiv 2410.00161).

    index     0 1 2 3 4 5 6 7        n = 8, evicted: 1 3 6, n' = 5
    kept      x . x . x x . x        holes below 5: 1 3; survivors from 5: 5 7
    after     0 5 2 7 4              moves 5 -> 1, 7 -> 3
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def plan_moves(
    evicted: Bool[Array, "*heads kvs"],
    lengths: Int[Array, "*heads"],
    tables: Int[Array, "*heads max_blocks"],
    block_size: int,
) -> tuple[Int[Array, " moves"], Int[Array, " moves"], Int[Array, ""]]:
  """Lists the moves of all heads.

  Args:
    evicted: True for each KV that goes, in the order of the head's list.
    lengths: i32 KVs of each head before.
    tables: i32 block ids of each head.
    block_size: P.

  Returns:
    sources and targets, i32 KV slots numbered block * P + offset, 0 from `count`
    on; and count, i32 [].
  """
  index = jnp.arange(evicted.shape[-1], dtype=jnp.int32)
  kept = (lengths - jnp.sum(evicted, axis=-1, dtype=jnp.int32))[..., None]
  hole = evicted & (index < kept)
  mover = ~evicted & (index >= kept) & (index < lengths[..., None])
  slots = (tables[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)).reshape(evicted.shape)
  size = evicted.size // 2 + 1
  return _listed(slots, mover, size), _listed(slots, hole, size), jnp.sum(hole, dtype=jnp.int32)


def _listed(slots: Array, chosen: Array, size: int) -> Array:
  """The chosen slots in order, 0 behind them. Heads come in one order for both lists."""
  flat = chosen.reshape(-1)
  place = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, size)
  return jnp.zeros((size,), jnp.int32).at[place].set(slots.reshape(-1), mode="drop")
