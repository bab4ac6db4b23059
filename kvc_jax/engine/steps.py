"""The jitted steps: prefill a chunk, decode a token for every slot, score, compress, release.

Each takes the cache and gives it back, donated, so the pool is updated in place.
"""

import functools

import jax
import jax.numpy as jnp

from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import Observation, prefill_attention, score_observed
from kvc_jax.cache import alloc
from kvc_jax.cache.state import CacheState
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.eviction.step import Allocation, Eviction
from kvc_jax.eviction.step import evict as evict_step
from kvc_jax.model.llama import Llama

DECODE_OPTIONS = {
    # XLA counts the pool again for each update in place, sees memory run out, and would compute
    # small things anew in every layer instead of keeping them.
    "xla_disable_hlo_passes": "rematerialization",
    # XLA's Triton products of a few rows win when timed alone, but leave f32 sums of split products
    # to further kernels, where cuBLAS adds the residual as well.
    "xla_gpu_enable_triton_gemm": False,
}
"""Compiler options of a decode step; only an outermost jit may have any."""


@functools.partial(jax.jit, static_argnames="rule", donate_argnames=("state", "observation"))
def prefill_chunk(
    model: Llama,
    state: CacheState,
    observation: Observation,
    tokens: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    *,
    rule: ScoringRule | None,
) -> tuple[jax.Array, jax.Array, CacheState, Observation]:
  """Runs one chunk of one prompt.

  Args:
    model: the model.
    state: the cache; donated.
    observation: of the chunks before; donated.
    tokens: i32 [T] of a fixed T; from `count` on padding.
    slot: i32 [].
    count: i32 [], 1..T.
    rule: None where the prompt will not be compressed.

  Returns:
    Logits f32 [V] behind the chunk's last token; ok bool [] (False: no blocks,
    and the cache is as before); the cache; the observation.
  """
  state, ok = alloc.allocate(state, slot[None], count[None], max_count=tokens.shape[0])
  count = jnp.where(ok[0], count, 0)
  positions = state.num_tokens[slot] - count + jnp.arange(tokens.shape[0], dtype=jnp.int32)
  scale = model.config.head_dim**-0.5

  def attend(layer, q, k, v, carry):
    state, observation = carry
    out, state, observation = prefill_attention(
        state, observation, layer, q, k, v, slot=slot, count=count, scale=scale, rule=rule)
    return out, (state, observation)

  hidden, (state, observation) = model(tokens, positions, attend, (state, observation))
  last = hidden[jnp.maximum(count - 1, 0)]
  return model.logits(last[None])[0], ok[0], state, observation


@functools.partial(
    jax.jit, static_argnames="rule", donate_argnames="state", compiler_options=DECODE_OPTIONS)
def decode_step(
    model: Llama,
    state: CacheState,
    tokens: jax.Array,
    active: jax.Array,
    *,
    rule: ScoringRule | None,
) -> tuple[jax.Array, jax.Array, CacheState]:
  """Runs one token of every active slot. An outermost jit: it carries compiler options.

  Args:
    model: the model.
    state: the cache; donated.
    tokens: i32 [S] newest token of each slot.
    active: bool [S].
    rule: adds attention to the scores; None where no compression will follow.

  Returns:
    Logits f32 [S, V]; ok bool [S] (False: not active, or no block was free, and
    the slot is as before); the cache.
  """
  slots = jnp.arange(state.num_slots, dtype=jnp.int32)
  state, ok = alloc.allocate(state, slots, active.astype(jnp.int32), max_count=1)
  ok &= active
  scale = model.config.head_dim**-0.5

  def attend(layer, q, k, v, state):
    return decode_attention(state, layer, q, k, v, active=ok, scale=scale, rule=rule)

  hidden, state = model(tokens, jnp.maximum(state.num_tokens - 1, 0), attend, state)
  return model.logits(hidden), ok, state


@functools.partial(jax.jit, static_argnames=("rule", "scale"), donate_argnames="state")
def score_prompt(
    state: CacheState, observation: Observation, slot: jax.Array, *, scale: float, rule: ScoringRule
) -> CacheState:
  """Scores a prompt's KVs behind its last chunk; see `score_observed`."""
  return score_observed(state, observation, slot, scale=scale, rule=rule)


@functools.partial(jax.jit, static_argnames=("rule", "allocation"), donate_argnames="state")
def evict(
    state: CacheState,
    slots: jax.Array,
    cache_tokens: jax.Array,
    window: jax.Array,
    sinks: jax.Array,
    first_query: jax.Array,
    *,
    rule: ScoringRule,
    allocation: Allocation,
) -> tuple[CacheState, Eviction]:
  """`kvc_jax.eviction.step.evict`, jitted and donated."""
  return evict_step(
      state, slots, cache_tokens, window, sinks, first_query, rule=rule, allocation=allocation)


@functools.partial(jax.jit, donate_argnames="state")
def release(state: CacheState, slots: jax.Array) -> CacheState:
  """`kvc_jax.cache.alloc.release`, jitted and donated."""
  return alloc.release(state, slots)
