"""Decode: attention of one new token of each running sequence."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvc_jax.cache.quantize import scale_inputs, scale_output
from kvc_jax.cache.state import CacheState
from kvc_jax.cache.write import write
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.kernels.observed import Observed
from kvc_jax.kernels.paged_decode import paged_decode


def decode_attention(
    state: CacheState,
    layer: jax.Array,
    q: Float[Array, "seqs q_heads head_dim"],
    k: Float[Array, "seqs kv_heads head_dim"],
    v: Float[Array, "seqs kv_heads head_dim"],
    *,
    active: Bool[Array, " seqs"],
    scale: float,
    rule: ScoringRule | None = None,
) -> tuple[jax.Array, CacheState]:
  """One layer's attention for the newest token of the first R slots; writes its KV.

  `allocate` has made room for one token of each active slot before.

  Args:
    state: the cache.
    layer: i32 [].
    q: [R, H*G, D] after RoPE, a row for each of the first R slots; R may be S.
    k: [R, H, D] after RoPE.
    v: [R, H, D].
    active: [R], those that `allocate` gave room (its ok); other rows write nothing and yield zeros.
    scale: factor on q k^T.
    rule: if it observes queries, adds the attention of each sequence's last decode
      query to the scores, and leaves the new query for the next step. None leaves
      the scores alone and costs nothing. Give it at every step or at none.

  Returns:
    Output [R, H*G, D] and the new cache.

  Raises:
    ValueError: the rule observes queries, but the cache was made without num_heads.
  """
  slots = jnp.arange(q.shape[0], dtype=jnp.int32)
  q, k, v = scale_inputs(state, layer, q, k, v)
  state = write(state, layer, slots, state.num_tokens[slots] - 1, k, v, active)
  out, state = attend_newest(state, layer, q, active=active, scale=scale, rule=rule)
  return scale_output(state, layer, out), state


def attend_newest(
    state: CacheState, layer: jax.Array, q: jax.Array, *, active: jax.Array, scale: float, rule: ScoringRule | None
) -> tuple[jax.Array, CacheState]:
  """`decode_attention` behind `write`, with queries in the cache's own unit (`scale_inputs`)."""
  rows = q.shape[0]
  others = state.num_slots - rows  # at rest: a few bytes for each, where the model's products would be long
  lengths = jnp.where(jnp.pad(active, (0, others))[:, None], state.lengths, 0)
  observes = rule is not None and rule.observed != "none"
  out, observed = paged_decode(
      jnp.pad(q, ((0, others), (0, 0), (0, 0))), state.kv, state.tables, lengths, layer,
      _observed(state, state.num_tokens - 2) if observes else None,
      scale=scale, **({"power": rule.power, "buffer": rule.buffer, "every": rule.decode_every} if rule else {}))
  if observed is not None:
    state = dataclasses.replace(
        state, scores=observed.scores, queries=observed.queries, log_sums=observed.log_sums)
  return out[:rows], state


def _observed(state: CacheState, query_positions: jax.Array) -> Observed:
  if state.queries is None or state.log_sums is None:
    raise ValueError(
        "decode_attention: the rule observes queries, but this cache has no room for them; "
        "give CacheConfig num_heads, the model's number of query heads")
  return Observed(state.scores, state.positions, state.queries, state.log_sums, query_positions)
