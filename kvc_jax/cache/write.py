"""Writing keys and values of new tokens into blocks that `allocate` gave."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvc_jax.cache.state import CacheState
from kvc_jax.kernels.kv_write import kv_write
from kvc_jax.kernels.scatter import apart


def write(
    state: CacheState,
    layer: jax.Array,
    slots: Int[Array, " tokens"],
    positions: Int[Array, " tokens"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    valid: Bool[Array, " tokens"],
) -> CacheState:
  """Stores one layer's keys and values of tokens that `allocate` has made room for.

  A sequence's newest tokens stand at the end of each head's list, so the token
  at position p has index length - (num_tokens - p). That holds from `allocate`
  to the next eviction; write in between.

  Args:
    state: the cache.
    layer: i32 [].
    slots: i32 [T] slot of each token.
    positions: i32 [T] position of each token in its sequence.
    k: keys after RoPE [T, H, D]; cast to the pool's dtype.
    v: values [T, H, D].
    valid: [T]; tokens that are not are dropped.
  """
  slots = jnp.where(valid, slots, 0)
  behind = state.num_tokens[slots] - positions  # 1 for the newest token
  index = state.lengths[layer, slots] - behind[:, None]  # [T, H]
  index = jnp.where(valid[:, None], index, 0)
  head = jnp.arange(state.num_kv_heads)
  blocks = state.tables[layer, slots[:, None], head, lax.div(index, jnp.int32(state.block_size))]
  blocks = apart(blocks, valid[:, None], state.num_blocks)
  offsets = lax.rem(index, jnp.int32(state.block_size))
  return dataclasses.replace(state, kv=kv_write(state.kv, k, v, blocks, offsets))
