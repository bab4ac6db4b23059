"""The eviction step: value, select, compact, free, in one jittable function."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvc_jax.cache.alloc import blocks_held, ignore_outside, push_blocks
from kvc_jax.cache.state import NULL_BLOCK, CacheState
from kvc_jax.eviction.compact import compact
from kvc_jax.eviction.look import OutputWeights, look_at
from kvc_jax.eviction.names import ALLOCATIONS
from kvc_jax.eviction.score import HeldKVs, LookingRule, ScoringRule
from kvc_jax.eviction.select import excess_by_mass, keys_of, select
from kvc_jax.eviction.shares import Allocation, excess_blocks, is_allocation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eviction:
  """What an eviction did.

  Attributes:
    lengths: i32 [B, L, H] KVs that each head holds now.
    freed_blocks: i32 [B] blocks that went back to the free stack.
  """

  lengths: jax.Array
  freed_blocks: jax.Array


def evict(
    state: CacheState,
    slots: Int[Array, " seqs"],
    cache_tokens: Int[Array, " seqs"],
    window: Int[Array, " seqs"],
    sinks: Int[Array, " seqs"],
    first_query: Int[Array, " seqs"] | None = None,
    keep: Int[Array, "seqs ranges 2"] | None = None,
    *,
    rule: ScoringRule,
    allocation: Allocation = "all",
    max_tokens: int | None = None,
    scale: float | None = None,
    output: OutputWeights | None = None,
    least: Int[Array, " seqs"] | None = None,
    mass: Float[Array, " seqs"] | None = None,
) -> tuple[CacheState, Eviction]:
  """Shrinks sequences to their budgets; their freed blocks are free at once.

  A budget of C tokens lets ceil(C / P) blocks per head stay. `allocation` says
  over which heads that is added up: "all" layers and heads of the sequence
  (KV-Compress), the heads of each "layer" (as Ada-KV), or each "head" for
  itself (as SnapKV); with "pyramid" or a `HeadProfile` each head has a budget of its own, and
  these add up to the same. Sequences never compete with each other.

  Args:
    state: the cache; where blocks may be shared, these slots share none (`unshare`).
    slots: i32 [B] distinct slots; S = ignore.
    cache_tokens: i32 [B] budget C of each sequence, in tokens per head.
    window: i32 [B] newest tokens that cannot be evicted.
    sinks: i32 [B] first tokens that cannot be evicted.
    first_query: i32 [B] position of the first observed query, for rules that
      take a mean; 0 by default.
    keep: i32 [B, R, 2] first position and one past the last of ranges that cannot be
      evicted either; where they are equal the range is empty.
    rule: what a KV is worth (static).
    allocation: static.
    max_tokens: a bound of the lengths, where one below M * P is known (static);
      time and memory grow with it.
    scale: the softmax's factor on q k^T, for rules that look at the last decode query;
      D ** -0.5 by default (static).
    output: the output projections [L, H*G, D, E], or one [H*G, D, E] for each layer, for rules
      that weigh values by them (`needs_output`).
    least: i32 [B] tokens that every head keeps at least, at most the budget (Ada-KV's safeguard), in
      whole blocks; 0 by default.
    mass: f32 [B] share of the sum of scores held that stays in each group: blocks go, the cheapest first, as
      long as it does, even where the budget would let them stay; with 1 those go that have no score at
      all, above 1 none. None for no such bound.

  Returns:
    The new state and what was done. A budget that protected tokens do not fit in
    frees what it can; `lengths` tells.
  """
  if not is_allocation(allocation):
    raise ValueError(f"allocation is {allocation!r}; give one of {', '.join(ALLOCATIONS)}, or a HeadProfile")
  slots = ignore_outside(slots, state.num_slots)
  columns = state.max_blocks_per_head
  if max_tokens is not None:
    columns = min(columns, -(-max_tokens // state.block_size))
  tables = state.tables.at[:, slots, :, :columns].get(mode="fill", fill_value=NULL_BLOCK).swapaxes(0, 1)
  lengths = state.lengths.at[:, slots].get(mode="fill", fill_value=0).swapaxes(0, 1)  # [B, L, H]
  num_tokens = state.num_tokens.at[slots].get(mode="fill", fill_value=0)
  first_query = jnp.zeros_like(slots) if first_query is None else first_query
  evictable = _evictable(state, tables, lengths, num_tokens, window, sinks, keep)
  looked = None
  if isinstance(rule, LookingRule):
    looked = look_at(
        state, rule, slots, tables, lengths, num_tokens, output=output,
        scale=state.kv.shape[-1] ** -0.5 if scale is None else scale)
  kvs = _held_kvs(state, tables, lengths, num_tokens, first_query, evictable, cache_tokens, looked)
  keys = keys_of(rule.value(kvs), evictable).reshape(-1, evictable.shape[-1])
  excess = excess_blocks(
      lengths, num_tokens, cache_tokens, _protected(num_tokens, window, sinks, keep), state.block_size, allocation)

  rows, held = tables.reshape(-1, columns), lengths.reshape(-1)  # [R, M] and [R], R = B * L * H
  most = None
  if least is not None:
    stay = blocks_held(least, state.block_size)[:, None, None]
    most = jnp.maximum(blocks_held(lengths, state.block_size) - stay, 0).reshape(-1)
  if mass is not None:
    excess = jnp.maximum(excess, excess_by_mass(
        keys, kvs.scores.reshape(keys.shape), held, 1.0 - mass, excess.shape[0], state.block_size, most))
  freed, evictions, evicted = select(keys, state.positions, rows, held, excess, most)
  kept = held - evictions
  state = compact(state, evicted, rows, held, kept)
  state = push_blocks(state, rows, blocks_held(kept, state.block_size), blocks_held(held, state.block_size))
  return _shorten(state, slots, tables, kept.reshape(lengths.shape), freed.reshape(lengths.shape))


def _evictable(state, tables, lengths, num_tokens, window, sinks, keep):
  """Held and not protected, bool [B, L, H, M*P]."""
  shape = (*lengths.shape, tables.shape[-1] * state.block_size)
  positions = state.positions[tables].reshape(shape)
  evictable = jnp.arange(shape[-1], dtype=jnp.int32) < lengths[..., None]
  evictable &= positions < (num_tokens - window)[:, None, None, None]
  evictable &= positions >= sinks[:, None, None, None]
  for first, stop in () if keep is None else jnp.moveaxis(keep, 0, -1)[..., None, None, None]:
    evictable &= (positions < first) | (positions >= stop)
  return evictable


def _held_kvs(state, tables, lengths, num_tokens, first_query, evictable, cache_tokens, looked):
  shape = evictable.shape
  return HeldKVs(
      scores=state.scores[tables].reshape(shape), positions=state.positions[tables].reshape(shape),
      num_tokens=num_tokens, first_query=first_query,
      held=jnp.arange(shape[-1], dtype=jnp.int32) < lengths[..., None], evictable=evictable,
      cache_tokens=cache_tokens, looked=looked)


def _protected(num_tokens, window, sinks, keep):
  """Tokens of each head that cannot be evicted, i32 [B]: the union of ranges, as far as there are tokens."""
  own = jnp.stack([jnp.stack([jnp.zeros_like(sinks), sinks], 1), jnp.stack([num_tokens - window, num_tokens], 1)], 1)
  ranges = own if keep is None else jnp.concatenate([own, keep], axis=1)
  ranges = jnp.clip(ranges, 0, num_tokens[:, None, None])
  order = jnp.argsort(ranges[..., 0], axis=1)
  starts, stops = jnp.moveaxis(jnp.take_along_axis(ranges, order[..., None], axis=1), -1, 0)
  before = jnp.pad(lax.cummax(stops, axis=1), ((0, 0), (1, 0)))[:, :-1]
  return jnp.sum(jnp.maximum(stops - jnp.maximum(starts, before), 0), axis=1)


def _shorten(state, slots, tables, lengths, freed):
  """Sets the lengths [B, L, H], and the tables [B, L, H, M] to zero behind them."""
  columns = tables.shape[-1]
  stays = jnp.arange(columns, dtype=jnp.int32) < blocks_held(lengths, state.block_size)[..., None]
  tables = jnp.where(stays, tables, NULL_BLOCK).swapaxes(0, 1)
  state = dataclasses.replace(
      state,
      tables=state.tables.at[:, slots, :, :columns].set(tables, mode="drop"),
      lengths=state.lengths.at[:, slots].set(lengths.swapaxes(0, 1), mode="drop"),
  )
  return state, Eviction(lengths=lengths, freed_blocks=jnp.sum(freed, axis=(1, 2)))
