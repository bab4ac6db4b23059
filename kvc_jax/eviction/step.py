"""The eviction step: value, select, compact, free, in one jittable function."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kvc_jax.cache.alloc import blocks_held, ignore_outside, push_blocks
from kvc_jax.cache.state import NULL_BLOCK, CacheState
from kvc_jax.eviction.compact import plan_moves
from kvc_jax.eviction.score import HeldKVs, ScoringRule
from kvc_jax.eviction.select import select
from kvc_jax.kernels.compact_kv import compact_kv

Allocation = Literal["all", "layer", "head"]


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
    *,
    rule: ScoringRule,
    allocation: Allocation = "all",
) -> tuple[CacheState, Eviction]:
  """Shrinks sequences to their budgets; their freed blocks are free at once.

  A budget of C tokens lets ceil(C / P) blocks per head stay. `allocation` says
  over which heads that is added up: "all" layers and heads of the sequence
  (KV-Compress), the heads of each "layer" (as Ada-KV), or each "head" for
  itself (as SnapKV). Sequences never compete with each other.

  Args:
    state: the cache.
    slots: i32 [B] distinct slots; S = ignore.
    cache_tokens: i32 [B] budget C of each sequence, in tokens per head.
    window: i32 [B] newest tokens that cannot be evicted.
    sinks: i32 [B] first tokens that cannot be evicted.
    first_query: i32 [B] position of the first observed query, for rules that
      take a mean; 0 by default.
    rule: what a KV is worth (static).
    allocation: static.

  Returns:
    The new state and what was done. A budget that protected tokens do not fit in
    frees what it can; `lengths` tells.
  """
  if allocation not in ("all", "layer", "head"):
    raise ValueError(f"allocation is {allocation!r}; give 'all', 'layer' or 'head'")
  slots = ignore_outside(slots, state.num_slots)
  tables = state.tables.at[:, slots].get(mode="fill", fill_value=NULL_BLOCK).swapaxes(0, 1)  # [B, L, H, M]
  lengths = state.lengths.at[:, slots].get(mode="fill", fill_value=0).swapaxes(0, 1)
  num_tokens = state.num_tokens.at[slots].get(mode="fill", fill_value=0)
  first_query = jnp.zeros_like(slots) if first_query is None else first_query
  values, positions = _values(state, tables, lengths, num_tokens, window, sinks, first_query, rule)
  freed, evicted = _choose(values, positions, lengths, cache_tokens, state.block_size, allocation)

  sources, targets, count = plan_moves(evicted, lengths, tables, state.block_size)
  kv, scores, positions = compact_kv(state.kv, state.scores, state.positions, sources, targets, count)
  state = dataclasses.replace(state, kv=kv, scores=scores, positions=positions)
  return _shorten(state, slots, tables, lengths - jnp.sum(evicted, axis=-1, dtype=jnp.int32), freed)


def _values(state, tables, lengths, num_tokens, window, sinks, first_query, rule):
  """Worth of each entry [B, L, H, M*P], +inf for what must stay, and positions."""
  shape = (*lengths.shape, tables.shape[-1] * state.block_size)
  scores, positions = state.scores[tables].reshape(shape), state.positions[tables].reshape(shape)
  held = jnp.arange(shape[-1], dtype=jnp.int32) < lengths[..., None]
  evictable = held & (positions < (num_tokens - window)[:, None, None, None])
  evictable &= positions >= sinks[:, None, None, None]
  values = rule.value(HeldKVs(scores, positions, num_tokens, first_query))
  return jnp.where(evictable, values, jnp.inf), positions


def _choose(values, positions, lengths, cache_tokens, block_size, allocation):
  """Runs `select` over groups of heads; returns freed [B, L, H] and evicted [B, L, H, M*P]."""
  seqs, layers, heads, kvs = values.shape
  groups, group_heads = {
      "all": (seqs, layers * heads), "layer": (seqs * layers, heads), "head": (seqs * layers * heads, 1),
  }[allocation]
  held = blocks_held(lengths, block_size)
  allowed = blocks_held(cache_tokens, block_size)[:, None, None]
  # Summed per group before the clip: what one head holds less, another may hold more.
  excess = jnp.sum((held - allowed).reshape(groups, group_heads), axis=1)
  last_block = jnp.where(lengths > 0, lax.rem(lengths - 1, jnp.int32(block_size)) + 1, 0)
  freed, evicted = select(
      values.reshape(groups, group_heads, kvs), positions.reshape(groups, group_heads, kvs),
      last_block.reshape(groups, group_heads), jnp.maximum(excess, 0), block_size)
  return freed.reshape(lengths.shape), evicted.reshape(values.shape)


def _shorten(state, slots, tables, lengths, freed):
  """Cuts `freed` blocks off each head and puts them on the free stack."""
  column = jnp.arange(tables.shape[-1], dtype=jnp.int32)
  stays = column < blocks_held(lengths, state.block_size)[..., None]
  state = push_blocks(state, tables, ~stays & (tables != NULL_BLOCK))
  tables = jnp.where(stays, tables, NULL_BLOCK)
  state = dataclasses.replace(
      state,
      tables=state.tables.at[:, slots].set(tables.swapaxes(0, 1), mode="drop"),
      lengths=state.lengths.at[:, slots].set(lengths.swapaxes(0, 1), mode="drop"),
  )
  return state, Eviction(lengths=lengths, freed_blocks=jnp.sum(freed, axis=(1, 2)))
