"""Attention of a prompt's chunk and of a decode step beside it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvc_jax.attention.decode import attend_newest
from kvc_jax.attention.prefill import Observation, attend_chunk, observe_moments, rows_of_chunk
from kvc_jax.cache.quantize import scale_inputs, scale_output
from kvc_jax.cache.state import CacheState
from kvc_jax.cache.write import write
from kvc_jax.eviction.score import ScoringRule


def mixed_attention(
    state: CacheState,
    observation: Observation,
    layer: jax.Array,
    q: Float[Array, "rows q_heads head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    *,
    slot: jax.Array,
    count: jax.Array,
    active: Bool[Array, " seqs"],
    scale: float,
    rule: ScoringRule | None = None,
    decode_rule: ScoringRule | None = None,
    most_prefix: int | None = None,
) -> tuple[jax.Array, CacheState, Observation]:
  """One layer's `prefill_attention` and `decode_attention` in one: the KVs of all rows are written at once.

  Were those of the second written behind the first's attention, XLA would have to see that nobody reads the
  pool in between, or copy it.

  Args:
    state: the cache, in which `allocate` has made room for both.
    observation: of the prompt.
    layer: i32 [].
    q: [T+R, H*G, D] after RoPE: a chunk's T rows, then one for each of the first R slots; R may be S.
    k: [T+R, H, D] after RoPE.
    v: [T+R, H, D].
    slot: i32 [] of the prompt.
    count: i32 [] real rows of the chunk.
    active: [R], slots that decode; never `slot`.
    scale: factor on q k^T.
    rule: of the prompt, as for `prefill_attention`.
    decode_rule: as the `rule` of `decode_attention`.
    most_prefix: as for `prefill_attention`.

  Returns:
    Output [T+R, H*G, D], and the new cache and observation.
  """
  slots = jnp.arange(active.shape[0], dtype=jnp.int32)
  tokens = q.shape[0] - len(slots)
  valid, positions = rows_of_chunk(state, slot, tokens, count)
  observation = observe_moments(observation, layer, q[:tokens], positions, valid, rule)
  q, k, v = scale_inputs(state, layer, q, k, v)
  state = write(
      state, layer, jnp.concatenate([jnp.broadcast_to(slot, valid.shape), slots]),
      jnp.concatenate([positions, state.num_tokens[slots] - 1]), k, v, jnp.concatenate([valid, active]))
  out, state, observation = attend_chunk(
      state, observation, layer, q[:tokens], k[:tokens], v[:tokens], slot=slot, count=count, scale=scale, rule=rule,
      most_prefix=most_prefix)
  decoded, state = attend_newest(state, layer, q[tokens:], active=active, scale=scale, rule=decode_rule)
  return scale_output(state, layer, jnp.concatenate([out, decoded])), state, observation
