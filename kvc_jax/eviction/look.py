"""What a rule may see of a sequence's KVs, gathered from the pool a layer at a time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvc_jax.cache.state import CacheState
from kvc_jax.eviction.score import LayerKVs, LookingRule

OutputWeights = Array | Sequence[Array]
"""Output projections [L, H*G, D, E]; or one [H*G, D, E] for each layer."""


def layer_kvs(
    state: CacheState,
    layer: jax.Array,
    slot: jax.Array,
    tables: Int[Array, "kv_heads max_blocks"],
    lengths: Int[Array, " kv_heads"],
    num_tokens: jax.Array,
    *,
    scale: float,
    observes: bool = True,
    output: Array | None = None,
) -> LayerKVs:
  """One layer of one sequence, in f32 and without what nothing holds.

  Args:
    state: the cache.
    layer: i32 [].
    slot: i32 [], below S.
    tables: i32 [H, M] of this layer and slot; M may be cut short.
    lengths: i32 [H], likewise.
    num_tokens: i32 [] of the sequence.
    scale: the softmax's factor on q k^T.
    observes: whether the sequence's decode steps keep their query for the rule. What another rule's left is none of
      its business: it depends on what else is served.
    output: [H*G, D, E] the layer's output projection, where the rule needs it.
  """
  shape = (*tables.shape[:1], tables.shape[1] * state.block_size)
  held = jnp.arange(shape[1], dtype=jnp.int32) < lengths[:, None]
  scales = jnp.ones((shape[0], 2)) if state.kv_scales is None else state.kv_scales[layer]

  def rows(which: int) -> jax.Array:
    found = state.kv[tables, which].reshape(*shape, -1).astype(jnp.float32)
    # What lies behind a head's end may be NaN.
    return jnp.where(held[..., None], found * scales[:, which, None, None], 0.0)

  queries, log_sums = None, None
  if observes and state.queries is not None and state.log_sums is not None:
    queries, log_sums = state.queries[layer, slot].astype(jnp.float32) * scale, state.log_sums[layer, slot]
    # Queries that wait are in the unit of the stored keys.
    queries = queries / jnp.repeat(scales[:, 0], queries.shape[0] // shape[0])[:, None]
  return LayerKVs(
      keys=rows(0), values=rows(1), held=held, positions=state.positions[tables].reshape(shape),
      scores=jnp.where(held, state.scores[tables].reshape(shape), 0.0), num_tokens=num_tokens, queries=queries,
      log_sums=log_sums, output=output)


def look_at(
    state: CacheState,
    rule: LookingRule,
    slots: Int[Array, " seqs"],
    tables: Int[Array, "seqs layers kv_heads max_blocks"],
    lengths: Int[Array, "seqs layers kv_heads"],
    num_tokens: Int[Array, " seqs"],
    *,
    scale: float,
    output: OutputWeights | None = None,
) -> Float[Array, "seqs layers kv_heads kvs"]:
  """What the rule's `look` finds for every KV, a layer of a sequence at a time: 0 where a layer holds nothing.

  Raises:
    ValueError: the rule needs the output projection and there is none.
  """
  if getattr(rule, "needs_output", False) and output is None:
    raise ValueError(f"evict: {type(rule).__name__} weighs values by the output projection; give output=")
  seqs, layers, heads, columns = tables.shape
  slots = jnp.minimum(slots, state.num_slots - 1)

  def one(seq: jax.Array, layer: jax.Array, weights: Array | None) -> jax.Array:
    def look() -> jax.Array:
      kvs = layer_kvs(
          state, layer, slots[seq], tables[seq, layer], lengths[seq, layer], num_tokens[seq], scale=scale,
          observes=rule.observed not in ("none", "moments"), output=weights)
      return rule.look(kvs).astype(jnp.float32)

    nothing = jnp.zeros((heads, columns * state.block_size))
    return lax.cond(jnp.any(lengths[seq, layer] > 0), look, lambda: nothing)

  every = jnp.arange(seqs, dtype=jnp.int32)
  if output is None or isinstance(output, jax.Array):
    pairs = jnp.repeat(every, layers), jnp.tile(jnp.arange(layers, dtype=jnp.int32), seqs)
    found = lax.map(lambda pair: one(pair[0], pair[1], None if output is None else output[pair[1]]), pairs)
    return found.reshape(seqs, layers, heads, -1)
  by_layer = [
      lax.map(lambda seq, layer=layer: one(seq, jnp.int32(layer), output[layer]), every) for layer in range(layers)]
  return jnp.stack(by_layer, axis=1)
