"""XLA version of `compact_kv`: lists of moves, then a loop of gathers and scatters of fixed size."""

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.kernels.scatter import apart, put

MOVES_PER_STEP = 2048


def compact_kv(
    kv: jax.Array,
    scores: jax.Array,
    positions: jax.Array,
    evicted: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    kept: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `compact_kv.compact_kv`."""
  block_size = kv.shape[2]
  sources, targets, count = _plan(evicted, tables, lengths, kept, block_size)
  spare = -sources.shape[0] % MOVES_PER_STEP
  sources, targets = jnp.pad(sources, (0, spare)), jnp.pad(targets, (0, spare))
  targets = apart(targets, jnp.arange(targets.size, dtype=jnp.int32) < count, scores.size)

  def body(step, pools):
    kv, scores, positions = pools
    source = lax.dynamic_slice_in_dim(sources, step * MOVES_PER_STEP, MOVES_PER_STEP)
    target = lax.dynamic_slice_in_dim(targets, step * MOVES_PER_STEP, MOVES_PER_STEP)
    from_block, from_offset = source // block_size, source % block_size
    to_block, to_offset = target // block_size, target % block_size
    return (
        put(kv.at[to_block, :, to_offset], kv[from_block, :, from_offset]),
        put(scores.at[to_block, to_offset], scores[from_block, from_offset]),
        put(positions.at[to_block, to_offset], positions[from_block, from_offset]),
    )

  steps = lax.div(count + (MOVES_PER_STEP - 1), jnp.int32(MOVES_PER_STEP))
  return lax.fori_loop(0, steps, body, (kv, scores, positions))


def _plan(evicted, tables, lengths, kept, block_size):
  """Sources and targets of the moves, i32 KV slots block * P + offset, 0 from `count` on; and count."""
  index = jnp.arange(evicted.shape[-1], dtype=jnp.int32)
  hole = evicted & (index < kept[:, None])
  mover = ~evicted & (index >= kept[:, None]) & (index < lengths[:, None])
  slots = (tables[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)).reshape(evicted.shape)
  size = evicted.size // 2 + 1
  return _listed(slots, mover, size), _listed(slots, hole, size), jnp.sum(hole, dtype=jnp.int32)


def _listed(slots, chosen, size):
  """The chosen slots in order, 0 behind them. Heads come in one order for both lists."""
  flat = chosen.reshape(-1)
  place = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, size)
  return jnp.zeros((size,), jnp.int32).at[place].set(slots.reshape(-1), mode="drop")
