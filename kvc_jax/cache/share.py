"""Blocks with several holders: what a sequence holds is kept, given to others, and copied before it changes.

For caches with `CacheConfig(sharing=True)`. A `Held` owns a reference to each of its blocks, as a
slot's table does. Who appends to a shared block does no harm: it writes behind what others hold of it,
and `adopt` gives every other sequence a last block of its own. All else that writes (scores and evictions)
needs `unshare` first.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kvc_jax.cache.alloc import blocks_held, drop_references
from kvc_jax.cache.state import NULL_BLOCK, CacheState
from kvc_jax.errors import InputError
from kvc_jax.kernels.scatter import apart, put

_COPIED_TOGETHER = 256
"""Blocks of one piece of a copy: 2 MiB at 8 KiB each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
  """What a slot held at some moment. `drop` it in the end, or its blocks are lost.

  Attributes:
    tables: i32 [L, H, M] block ids, 0 behind each head's last.
    lengths: i32 [L, H] KVs held by each head.
    num_tokens: i32 [] tokens seen.
    queries: [L, H*G, D] the decode query that waits to be scored; None where the cache keeps none.
    log_sums: f32 [L, H*G] its log-sum-exp; +inf where none waits.
  """

  tables: jax.Array
  lengths: jax.Array
  num_tokens: jax.Array
  queries: jax.Array | None = None
  log_sums: jax.Array | None = None


def hold(state: CacheState, slot: Int[Array, ""]) -> tuple[CacheState, Held]:
  """Keeps what a slot holds, whatever becomes of the slot.

  Args:
    state: the cache.
    slot: i32 [], 0..S-1.

  Raises:
    InputError: the cache was made without `sharing`.
  """
  references = _references(state)
  held = Held(
      state.tables[:, slot], state.lengths[:, slot], state.num_tokens[slot],
      None if state.queries is None else state.queries[:, slot],
      None if state.log_sums is None else state.log_sums[:, slot])
  blocks = jnp.where(_is_live(held.tables, held.lengths, state.block_size), held.tables, state.num_blocks)
  return dataclasses.replace(state, extra_refs=references.at[blocks].add(1, mode="drop")), held


def adopt(state: CacheState, held: Held, slot: Int[Array, ""]) -> tuple[CacheState, Bool[Array, ""]]:
  """Gives an empty slot what `held` holds: the same blocks, but a copy of each head's last where it is partly filled.

  Args:
    state: the cache.
    held: of this cache; it goes on holding.
    slot: i32 [].

  Returns:
    The new cache, and ok bool []: False where the pool has too few free blocks for the
    copies, or there is no such slot or it is taken; the cache is as before.

  Raises:
    InputError: the cache was made without `sharing`.
  """
  references = _references(state)
  slots, p = state.num_slots, state.block_size
  column = jnp.arange(held.tables.shape[-1], dtype=jnp.int32)
  last = blocks_held(held.lengths, p)[..., None] - 1
  copied = (column == last) & (lax.rem(held.lengths, jnp.int32(p)) > 0)[..., None]  # [L, H, M]
  ok = (jnp.sum(copied) <= state.free_count) & (slot >= 0) & (slot < slots)
  ok &= state.num_tokens[jnp.clip(slot, 0, slots - 1)] == 0
  target = jnp.where(ok, slot, slots)  # one past the last slot: dropped
  shared = _is_live(held.tables, held.lengths, p) & ~copied & ok
  references = references.at[jnp.where(shared, held.tables, state.num_blocks)].add(1, mode="drop")
  most = held.lengths.size  # a block for each head
  state, tables = _copy_out(dataclasses.replace(state, extra_refs=references), held.tables, copied & ok, most)
  state = dataclasses.replace(
      state,
      tables=state.tables.at[:, target].set(tables, mode="drop"),
      lengths=state.lengths.at[:, target].set(held.lengths, mode="drop"),
      num_tokens=state.num_tokens.at[target].set(held.num_tokens, mode="drop"),
  )
  if state.queries is not None and state.log_sums is not None:
    state = dataclasses.replace(
        state,
        queries=state.queries.at[:, target].set(held.queries, mode="drop"),
        log_sums=state.log_sums.at[:, target].set(held.log_sums, mode="drop"),
    )
  return state, ok


def unshare(state: CacheState, slot: Int[Array, ""]) -> tuple[CacheState, Bool[Array, ""]]:
  """Copies every block of a slot that others hold too, so that its KVs and scores may change.

  One slot at a time: its blocks are distinct, so each copy takes exactly one reference.

  Args:
    state: the cache.
    slot: i32 [], 0..S-1.

  Returns:
    The new cache, and ok bool []: False where the pool has too few free blocks; the
    cache is as before.

  Raises:
    InputError: the cache was made without `sharing`.
  """
  references = _references(state)
  tables = state.tables[:, slot]
  shared = _is_live(tables, state.lengths[:, slot], state.block_size) & (references[tables] > 0)
  ok = jnp.sum(shared) <= state.free_count
  shared &= ok
  references = references.at[jnp.where(shared, tables, state.num_blocks)].add(-1, mode="drop")
  state, tables = _copy_out(dataclasses.replace(state, extra_refs=references), tables, shared, tables.size)
  return dataclasses.replace(state, tables=state.tables.at[:, slot].set(tables)), ok


def drop(state: CacheState, held: Held) -> CacheState:
  """Lets go of what `hold` kept; blocks that nobody else holds are free.

  Raises:
    InputError: the cache was made without `sharing`.
  """
  _references(state)
  counts = blocks_held(held.lengths, state.block_size).reshape(-1)
  return drop_references(state, held.tables.reshape(counts.size, -1), counts, distinct=True)


def _references(state: CacheState) -> jax.Array:
  if state.extra_refs is None:
    raise InputError("the cache shares no blocks; make it with CacheConfig(sharing=True)")
  return state.extra_refs


def _is_live(tables: Array, lengths: Array, block_size: int) -> Array:
  """Table entries [..., M] that name a block."""
  return jnp.arange(tables.shape[-1], dtype=jnp.int32) < blocks_held(lengths, block_size)[..., None]


def _copy_out(state: CacheState, tables: Array, copied: Array, most: int) -> tuple[CacheState, Array]:
  """Replaces the entries `copied` of tables by fresh blocks of the same content; at most `most`, and as many are free.

  Counts no references: a fresh block has the one of its entry.
  """
  flat = copied.reshape(-1)
  rank = jnp.cumsum(flat, dtype=jnp.int32) - 1
  fresh = state.free_ids[jnp.where(flat, state.free_count - 1 - rank, 0)]
  count = jnp.sum(flat, dtype=jnp.int32)
  piece = min(_COPIED_TOGETHER, most)
  size = -(-most // piece) * piece
  place = jnp.where(flat, rank, size)
  sources = jnp.full(size, NULL_BLOCK, jnp.int32).at[place].set(tables.reshape(-1), mode="drop")
  targets = jnp.zeros(size, jnp.int32).at[place].set(fresh, mode="drop")
  targets = apart(targets, jnp.arange(size, dtype=jnp.int32) < count, state.num_blocks)

  def copy(i: Array, pools: tuple[Array, ...]) -> tuple[Array, ...]:
    source = lax.dynamic_slice_in_dim(sources, i * piece, piece)
    target = lax.dynamic_slice_in_dim(targets, i * piece, piece)
    return tuple(put(pool.at[target], pool[source]) for pool in pools)

  pieces = lax.div(count + (piece - 1), jnp.int32(piece))
  kv, scores, positions = lax.fori_loop(0, pieces, copy, (state.kv, state.scores, state.positions))
  state = dataclasses.replace(
      state, kv=kv, scores=scores, positions=positions, free_count=state.free_count - count)
  return state, jnp.where(flat, fresh, tables.reshape(-1)).reshape(tables.shape)
