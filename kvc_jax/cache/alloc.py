"""Block allocation and release: transitions `state -> state` with traced counts.

Slots are named by an i32 [B] array of distinct slots; the value S (one past the
last slot) marks an entry to be ignored, so B is static while the number of
sequences is not. Any other number outside 0..S-1 is ignored as well.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kvc_jax.cache.state import NULL_BLOCK, CacheState


def ignore_outside(slots: Array, num_slots: int) -> Array:
  """Slots with S in place of negative ones, which an index would count from the end."""
  return jnp.where(slots < 0, num_slots, slots)


def blocks_held(lengths: Array, block_size: int) -> Array:
  """ceil(length / P), elementwise."""
  return lax.div(lengths + (block_size - 1), jnp.int32(block_size))


def allocate(
    state: CacheState,
    slots: Int[Array, " seqs"],
    counts: Int[Array, " seqs"],
    *,
    max_count: int,
) -> tuple[CacheState, Bool[Array, " seqs"]]:
  """Appends room for `counts` tokens to every head of the named sequences.

  A sequence gets all of its blocks or none. Where ok, lengths and num_tokens
  have grown, and the new KVs have their positions and a score of 0; keys and
  values are for `write` to fill before anything attends.

  Args:
    state: the cache.
    slots: i32 [B] distinct slots; S = ignore.
    counts: i32 [B] tokens to append, each 0..max_count.
    max_count: static bound of `counts`. Above 1 the tokens are a prompt's: a decode
      query that still waits to be scored is dropped.

  Returns:
    The new state, and ok [B]: False where the sequence did not get its blocks
    (the pool is too empty, or a head would pass M blocks) and is unchanged.
    Blocks go in the order of `slots`: behind one that does not fit, only
    sequences that need no block are served.
  """
  slots = ignore_outside(slots, state.num_slots)
  old = state.lengths[:, jnp.minimum(slots, state.num_slots - 1)]  # [L, B, H]
  p = state.block_size
  named = slots < state.num_slots
  fits = jnp.all(old + counts[:, None] <= state.max_blocks_per_head * p, axis=(0, 2)) & named
  need = jnp.where(fits[:, None], blocks_held(old + counts[:, None], p) - blocks_held(old, p), 0)
  per_sequence = jnp.sum(need, axis=(0, 2))
  ok = fits & ((jnp.cumsum(per_sequence) <= state.free_count) | (per_sequence == 0))
  counts = jnp.where(ok, counts, 0)
  state = pop_blocks(state, slots, old, jnp.where(ok[:, None], need, 0), -(-max_count // p))
  first_position = state.num_tokens[jnp.minimum(slots, state.num_slots - 1)]
  state = dataclasses.replace(
      state,
      lengths=state.lengths.at[:, slots].add(counts[None, :, None], mode="drop"),
      num_tokens=state.num_tokens.at[slots].add(counts, mode="drop"),
  )
  state = state if max_count == 1 else _forget_queries(state, slots)
  return _mark_new_kvs(state, slots, old, counts, first_position, max_count), ok


def _forget_queries(state: CacheState, slots: Array) -> CacheState:
  """Drops the named sequences' last queries: those wait for the very next token only."""
  if state.queries is None or state.log_sums is None:
    return state
  return dataclasses.replace(
      state,
      queries=state.queries.at[:, slots].set(0, mode="drop"),  # a NaN would outlive an infinite log_sum
      log_sums=state.log_sums.at[:, slots].set(jnp.inf, mode="drop"),
  )


def pop_blocks(state: CacheState, slots: Array, old: Array, need: Array, max_need: int) -> CacheState:
  """Moves `need` [L, B, H] blocks from the free stack behind each head's last block."""
  layers, _, heads = old.shape
  rank = jnp.cumsum(need.reshape(-1)).reshape(need.shape) - need
  step = jnp.arange(max_need, dtype=jnp.int32)
  taken = step < need[..., None]  # [L, B, H, J]
  ids = state.free_ids[jnp.where(taken, state.free_count - 1 - (rank[..., None] + step), 0)]
  column = jnp.where(taken, blocks_held(old, state.block_size)[..., None] + step, state.max_blocks_per_head)
  layer = jnp.arange(layers)[:, None, None, None]
  head = jnp.arange(heads)[None, None, :, None]
  tables = state.tables.at[layer, slots[None, :, None, None], head, column].set(ids, mode="drop")
  return dataclasses.replace(state, tables=tables, free_count=state.free_count - jnp.sum(need))


def _mark_new_kvs(
    state: CacheState, slots: Array, old: Array, counts: Array, first_position: Array, max_count: int
) -> CacheState:
  """Gives the new KVs their positions and a score of 0."""
  layers, _, heads = old.shape
  p = state.block_size
  step = jnp.arange(max_count, dtype=jnp.int32)
  new = step < counts[:, None]  # [B, C]
  index = old[..., None] + step  # [L, B, H, C]
  layer = jnp.arange(layers)[:, None, None, None]
  head = jnp.arange(heads)[None, None, :, None]
  slot = jnp.minimum(slots, state.num_slots - 1)[None, :, None, None]
  column = jnp.minimum(lax.div(index, jnp.int32(p)), state.max_blocks_per_head - 1)
  blocks = jnp.where(new[None, :, None], state.tables[layer, slot, head, column], NULL_BLOCK)
  offsets = lax.rem(index, jnp.int32(p))
  position = jnp.broadcast_to((first_position[:, None] + step)[None, :, None], blocks.shape)
  return dataclasses.replace(
      state,
      positions=state.positions.at[blocks, offsets].set(position),
      scores=state.scores.at[blocks, offsets].set(0.0),
  )


def push_blocks(
    state: CacheState,
    tables: Int[Array, "heads max_blocks"],
    first: Int[Array, " heads"],
    stop: Int[Array, " heads"],
) -> CacheState:
  """Puts the blocks in columns first <= m < stop of each row of tables on the free stack."""
  column = jnp.arange(tables.shape[1], dtype=jnp.int32)
  counts = stop - first
  start = state.free_count + jnp.cumsum(counts, dtype=jnp.int32) - counts - first
  freed = (column >= first[:, None]) & (column < stop[:, None])
  place = jnp.where(freed, start[:, None] + column, state.num_blocks)
  return dataclasses.replace(
      state,
      free_ids=state.free_ids.at[place].set(tables, mode="drop"),
      free_count=state.free_count + jnp.sum(counts, dtype=jnp.int32),
  )


def drop_references(
    state: CacheState,
    tables: Int[Array, "heads max_blocks"],
    counts: Int[Array, " heads"],
    *,
    distinct: bool,
) -> CacheState:
  """Lets go of the first `counts` blocks of each row of tables; those that nobody else holds are free.

  Args:
    state: the cache.
    tables: i32 [R, M].
    counts: i32 [R].
    distinct: no block is named twice (static).
  """
  if state.extra_refs is None:
    return push_blocks(state, tables, jnp.zeros_like(counts), counts)
  blocks = tables.reshape(-1)
  named = (jnp.arange(tables.shape[1], dtype=jnp.int32) < counts[:, None]).reshape(-1)
  place = jnp.where(named, blocks, state.num_blocks)
  left = state.extra_refs.at[place].add(-1, mode="drop")  # -1 where the last reference went
  freed = named & (left[blocks] < 0)
  if not distinct:  # the last entry that names a block frees it
    entry = jnp.arange(blocks.size, dtype=jnp.int32)
    freed &= jnp.full(state.num_blocks, -1, jnp.int32).at[place].max(entry, mode="drop")[blocks] == entry
  stack = state.free_count + jnp.cumsum(freed, dtype=jnp.int32) - 1
  return dataclasses.replace(
      state,
      extra_refs=jnp.maximum(left, 0),
      free_ids=state.free_ids.at[jnp.where(freed, stack, state.num_blocks)].set(blocks, mode="drop"),
      free_count=state.free_count + jnp.sum(freed, dtype=jnp.int32),
  )


def release(state: CacheState, slots: Int[Array, " seqs"]) -> CacheState:
  """Ends the sequences in `slots` (i32 [B], distinct; S = ignore); blocks that nobody else holds are free."""
  slots = ignore_outside(slots, state.num_slots)
  tables = state.tables.at[:, slots].get(mode="fill", fill_value=NULL_BLOCK)  # [L, B, H, M]
  blocks = blocks_held(state.lengths.at[:, slots].get(mode="fill", fill_value=0), state.block_size).reshape(-1)
  state = drop_references(state, tables.reshape(blocks.size, -1), blocks, distinct=slots.size == 1)
  state = _forget_queries(state, slots)
  return dataclasses.replace(
      state,
      tables=state.tables.at[:, slots].set(NULL_BLOCK, mode="drop"),
      lengths=state.lengths.at[:, slots].set(0, mode="drop"),
      num_tokens=state.num_tokens.at[slots].set(0, mode="drop"),
  )
