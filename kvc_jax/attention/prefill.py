"""Prefill: attention of one sequence's prompt, chunk by chunk, and its scores."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kvc_jax.attention.moments import Moments, add_queries, init_moments, moments_of
from kvc_jax.cache.quantize import scale_inputs, scale_output
from kvc_jax.cache.state import CacheState
from kvc_jax.cache.write import write
from kvc_jax.eviction.look import layer_kvs
from kvc_jax.eviction.score import MomentsRule, ScoringRule, pooling_of
from kvc_jax.kernels.column_scores import column_scores
from kvc_jax.kernels.paged_prefill import paged_prefill
from kvc_jax.kernels.scatter import apart


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
  """The last W queries of the prompt being prefilled, for rules that score with them.

  They are kept from chunk to chunk, so scores do not depend on where chunks end.

  Attributes:
    queries: [L, W, H*G, D] after RoPE; the newest is the last row.
    log_sums: f32 [L, W, H*G] log-sum-exp of each query over the keys it saw.
    moments: mean and covariance of all queries, for rules that score with those.
  """

  queries: jax.Array
  log_sums: jax.Array
  moments: Moments | None = None


def init_observation(
    rule: ScoringRule | None, num_layers: int, num_heads: int, head_dim: int, dtype: DTypeLike,
    frequencies: np.ndarray | jax.Array | None = None,
) -> Observation:
  """An observation of nothing yet; W = 0 where `rule` needs no queries kept.

  Args:
    rule: None for none.
    num_layers: L.
    num_heads: query heads, H*G.
    head_dim: D.
    dtype: of queries that are kept.
    frequencies: f32 [D/2] RoPE's angle per position of each pair of dimensions, zeros for a
      model without RoPE; for a rule with `observed` "moments".

  Raises:
    ValueError: the rule needs frequencies.
  """
  width = rule.queries if rule is not None and rule.observed == "last" else 0
  moments = None
  if rule is not None and rule.observed == "moments":
    if frequencies is None:
      raise ValueError(
          f"init_observation: {type(rule).__name__} turns queries back to before RoPE; give frequencies "
          "(kvc_jax.model.rope.inverse_frequencies)")
    moments = init_moments(num_layers, num_heads, head_dim, frequencies)
  return Observation(
      queries=jnp.zeros((num_layers, width, num_heads, head_dim), dtype),
      log_sums=jnp.zeros((num_layers, width, num_heads), jnp.float32), moments=moments)


def prefill_attention(
    state: CacheState,
    observation: Observation,
    layer: jax.Array,
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    *,
    slot: jax.Array,
    count: jax.Array,
    scale: float,
    rule: ScoringRule | None = None,
    most_prefix: int | None = None,
) -> tuple[jax.Array, CacheState, Observation]:
  """One layer's attention for a chunk of a prompt; writes its KVs and observes its queries.

  `allocate` has made room for `count` tokens of `slot` before; where it refused,
  pass a count of 0, or the sequence's newest KVs are written over.

  Args:
    state: the cache.
    observation: from the chunk before, or `init_observation`.
    layer: i32 [].
    q: [T, H*G, D] after RoPE; rows from `count` on are padding.
    k: [T, H, D] after RoPE.
    v: [T, H, D].
    slot: i32 [].
    count: i32 [] real tokens of the chunk, the sequence's newest.
    scale: factor on q k^T.
    rule: None where no eviction will follow: nothing is scored or kept.
    most_prefix: static bound of the KVs that each head holds before the chunk. None: the device says, and on a
      GPU the host waits for its answer in every layer.

  Returns:
    Output [T, H*G, D], and the new cache and observation.
  """
  valid, positions = rows_of_chunk(state, slot, q.shape[0], count)
  observation = observe_moments(observation, layer, q, positions, valid, rule)
  q, k, v = scale_inputs(state, layer, q, k, v)
  state = write(state, layer, jnp.broadcast_to(slot, valid.shape), positions, k, v, valid)
  out, state, observation = attend_chunk(
      state, observation, layer, q, k, v, slot=slot, count=count, scale=scale, rule=rule, most_prefix=most_prefix)
  return scale_output(state, layer, out), state, observation


def rows_of_chunk(state: CacheState, slot: jax.Array, tokens: int, count: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which rows of a chunk of so many are real, bool [T], and their positions, i32 [T]."""
  row = jnp.arange(tokens, dtype=jnp.int32)
  return row < count, state.num_tokens[slot] - count + row


def observe_moments(
    observation: Observation, layer: jax.Array, q: jax.Array, positions: jax.Array, valid: jax.Array,
    rule: ScoringRule | None,
) -> Observation:
  """Adds a chunk's queries to the moments, for a rule that wants those."""
  if not isinstance(rule, MomentsRule) or observation.moments is None:
    return observation
  return dataclasses.replace(observation, moments=add_queries(
      observation.moments, layer, q, positions, valid & (positions >= rule.sinks)))


def attend_chunk(
    state: CacheState, observation: Observation, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *,
    slot: jax.Array, count: jax.Array, scale: float, rule: ScoringRule | None, most_prefix: int | None,
) -> tuple[jax.Array, CacheState, Observation]:
  """`prefill_attention` behind `write`, with all in the cache's own unit (`scale_inputs`)."""
  prefix = state.lengths[layer, slot] - count
  out, log_sums = paged_prefill(
      q, k, v, state.kv, state.tables, prefix, layer, slot, count, scale=scale, most_prefix=most_prefix)
  if rule is not None and rule.observed == "all":
    valid, positions = rows_of_chunk(state, slot, q.shape[0], count)
    query_positions = jnp.where(valid, positions, -1 - rule.buffer)
    counted = jnp.where(valid[:, None], log_sums, jnp.inf)  # padding rows have no probabilities
    sums = column_scores(
        q, counted, query_positions, state.kv, state.positions, state.tables, state.lengths, layer, slot,
        scale=scale, power=rule.power, buffer=rule.buffer)
    # The next layer's write of KVs comes behind `out`: with the sums before it, nobody reads the pool any more by
    # then. XLA would copy the whole pool for a reader that may come late.
    out, sums = lax.optimization_barrier((out, sums))
    state = _put_scores(state, layer, slot, jnp.sum(sums, axis=1), add=True)
  if rule is not None and rule.observed == "last":
    observation = _observe(observation, layer, q, log_sums, count)
  return out, state, observation


def score_observed(
    state: CacheState, observation: Observation, slot: jax.Array, *, scale: float, rule: ScoringRule,
    in_order: bool | None = None,
) -> CacheState:
  """Scores the KVs of `slot` with the observed queries; call it after the last chunk.

  Per query head: probabilities to the power, summed over the queries, pooled
  along keys in the order of their positions; then summed over the G query heads
  (KV-Compress, KVC-w). With a rule that observes moments, what it expects of them.
  Scores from before are replaced, so that a prompt may be
  scored, compressed and carried on in turns. Any other rule
  leaves the state as it is. The slot shares no blocks (`unshare`).

  Args:
    state: the cache.
    observation: of the prompt so far.
    slot: i32 [].
    scale: factor on q k^T.
    rule: the observation's own.
    in_order: static: True where nothing of the prompt was evicted yet, so its KVs lie in the order of their
      positions, which saves a sort; False otherwise. None: the device says, and on a GPU the host waits
      for its answer.
  """
  if isinstance(rule, MomentsRule) and observation.moments is not None:
    return _score_by_moments(state, observation.moments, slot, scale, rule)
  if rule.observed != "last":
    return state
  width = observation.queries.shape[1]
  # Rows that a shorter prompt did not fill have positions below 0 and count for no key.
  query_positions = state.num_tokens[slot] - width + jnp.arange(width, dtype=jnp.int32)

  def scored(scores: jax.Array, in_order: bool) -> jax.Array:
    def body(layer, scores):
      sums = column_scores(
          observation.queries[layer], observation.log_sums[layer], query_positions,
          state.kv, state.positions, state.tables, state.lengths, layer, slot,
          scale=scale, power=rule.power, buffer=rule.buffer)
      pooled = _pool_neighbours(state, layer, slot, sums, query_positions[0], rule, in_order)
      before = dataclasses.replace(state, scores=scores)
      return _put_scores(before, layer, slot, jnp.sum(pooled, axis=1), add=False).scores

    return lax.fori_loop(0, state.num_layers, body, scores)

  if pooling_of(rule)[0] == 1:
    in_order = True  # no neighbours
  if in_order is not None:
    return dataclasses.replace(state, scores=scored(state.scores, in_order))
  never_evicted = jnp.all(state.lengths[:, slot] == state.num_tokens[slot])
  scores = lax.cond(
      never_evicted, functools.partial(scored, in_order=True), functools.partial(scored, in_order=False), state.scores)
  return dataclasses.replace(state, scores=scores)


def _score_by_moments(state: CacheState, moments: Moments, slot, scale: float, rule: MomentsRule) -> CacheState:
  def body(layer, state):
    kvs = layer_kvs(
        state, layer, slot, state.tables[layer, slot], state.lengths[layer, slot], state.num_tokens[slot],
        scale=scale)
    return _put_scores(state, layer, slot, rule.expect(kvs, moments_of(moments, layer), scale), add=False)

  return lax.fori_loop(0, state.num_layers, body, state)


def _observe(observation: Observation, layer, q, log_sums, count) -> Observation:
  """Appends `count` rows and keeps the last W."""

  def push(kept, rows):
    both = jnp.concatenate([kept[layer], rows.astype(kept.dtype)])
    return kept.at[layer].set(lax.dynamic_slice_in_dim(both, count, kept.shape[1]))

  return dataclasses.replace(
      observation, queries=push(observation.queries, q), log_sums=push(observation.log_sums, log_sums))


def _pool_neighbours(
    state: CacheState, layer, slot, sums: jax.Array, first_query: jax.Array, rule: ScoringRule, in_order: bool
) -> jax.Array:
  """Pools sums [H, G, M*P]; neighbours are those by position, wherever evictions have moved them.

  With `in_order` (static) the lists are known to be in the order of positions.
  """
  width, kind, pools_observed = pooling_of(rule)
  if width == 1:
    return sums
  pool = _max_pool if kind == "max" else _mean_pool

  def positions() -> jax.Array:
    found = state.positions[state.tables[layer, slot]]
    return found.reshape(found.shape[0], -1)

  def all_pooled(sums: jax.Array) -> jax.Array:
    if in_order:
      return pool(sums, width)
    index = jnp.arange(sums.shape[-1], dtype=jnp.int32)
    held = index < state.lengths[layer, slot][:, None]
    order = jnp.argsort(jnp.where(held, positions(), jnp.iinfo(jnp.int32).max), axis=-1)
    head = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None]
    rank = jnp.zeros_like(order).at[head, order].set(jnp.broadcast_to(index, order.shape), unique_indices=True)
    pooled = pool(jnp.take_along_axis(sums, order[:, None], axis=-1), width)
    return jnp.take_along_axis(pooled, rank[:, None], axis=-1)

  if pools_observed:
    return all_pooled(sums)
  is_before = (positions() < first_query)[:, None]
  return jnp.where(is_before, all_pooled(jnp.where(is_before, sums, 0.0)), sums)


def _max_pool(sums: jax.Array, width: int) -> jax.Array:
  """Maximum over `width` neighbours along the last axis; sums are not negative."""
  return _reduce(sums, width, 0.0, lax.max)


def _mean_pool(sums: jax.Array, width: int) -> jax.Array:
  """Sum over `width` neighbours along the last axis, zeros beyond the ends, divided by the width."""
  return _reduce(sums, width, 0.0, lax.add) / width


def _reduce(sums: jax.Array, width: int, start: float, combine: Any) -> jax.Array:
  window = (*(1 for _ in sums.shape[:-1]), width)
  return lax.reduce_window(sums, start, combine, window, (1,) * sums.ndim, "SAME")


def _put_scores(state: CacheState, layer, slot, gain: jax.Array, *, add: bool) -> CacheState:
  """Adds gain [H, M*P], in the order of each head's list, to the pool's scores, or puts it in their place."""
  heads, columns = state.tables.shape[2:]
  held = jnp.arange(gain.shape[-1], dtype=jnp.int32) < state.lengths[layer, slot][:, None]
  gain = jnp.where(held, gain, 0.0).reshape(heads, columns, state.block_size)
  blocks = apart(state.tables[layer, slot], held[:, :: state.block_size], state.num_blocks)
  places = state.scores.at[blocks]
  scores = (places.add if add else places.set)(gain, mode="drop", unique_indices=True)
  return dataclasses.replace(state, scores=scores)
