"""Which blocks to free and which KVs to evict, without a sort.

Freeing the first block of a head costs its last block's occupancy h (1..P)
evictions, each further block P more, so block j of a head costs the
(h - 1 + j*P)-th smallest value. "The E cheapest blocks of the group" is then a
threshold: the smallest value at which at least E blocks can be freed. It is
searched for bit by bit on the order-preserving integer image of the values. The
cost of a block is KV-Compress's (arXiv 2410.00161), which sorts instead.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from kvc_jax.kernels.bit_search import NEVER, smallest
from kvc_jax.kernels.count_at_most import bits_per_step, count_at_most
from kvc_jax.kernels.lowest_kvs import lowest_kvs

_SIGN = jnp.uint32(0x8000_0000)


def keys_of(values: Array, evictable: Array) -> Array:
  """uint32 keys in the order of the f32 values, -0 equal to 0; the highest where not evictable or +inf."""
  bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values).astype(jnp.float32), jnp.uint32)
  image = jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)
  return jnp.where(evictable & (values < jnp.inf), image, NEVER)


def select(
    keys: UInt32[Array, "heads kvs"],
    positions: Int[Array, "blocks block_size"],
    tables: Int[Array, "heads max_blocks"],
    lengths: Int[Array, " heads"],
    excess: Int[Array, " groups"],
) -> tuple[Int[Array, " heads"], Int[Array, " heads"], Bool[Array, "heads kvs"]]:
  """Chooses the cheapest blocks of each group and the KVs that pay for them.

  Ties: blocks of equal cost go in head order; KVs of equal value in one head go
  oldest position first. So the choice does not depend on where a KV is stored.

  Args:
    keys: u32 [R, M*P], `keys_of` the KVs, in the order of each head's list.
    positions: i32 [N, P] token positions, distinct within a head.
    tables: i32 [R, M] block ids.
    lengths: i32 [R] KVs of each head.
    excess: i32 [E] blocks to free in each group, which is R / E neighbouring
      heads; fewer are freed where fewer can be.

  Returns:
    i32 [R] blocks freed and KVs evicted of each head, and True [R, M*P] for each
    KV to evict.
  """
  block_size = positions.shape[1]
  heads = lengths.shape[0] // excess.shape[0]
  last_block = jnp.where(lengths > 0, lax.rem(lengths - 1, jnp.int32(block_size)) + 1, 0)[:, None]

  def blocks_up_to(thresholds: Array) -> Array:
    """Blocks that the KVs up to each threshold [groups, T] pay for, [groups, heads, T]."""
    count = count_at_most(keys, thresholds, lengths)
    paid = (count >= last_block) & (last_block > 0)
    blocks = jnp.where(paid, 1 + lax.div(count - last_block, jnp.int32(block_size)), 0)
    return blocks.reshape(-1, heads, thresholds.shape[1])

  threshold = smallest(
      lambda t: jnp.sum(blocks_up_to(t), axis=1) >= excess[:, None], excess.shape, step_bits=bits_per_step())
  # NEVER means that all there is will go; it is no threshold itself, for it would count what must stay.
  up_to = jnp.minimum(threshold, NEVER - 1)
  around = blocks_up_to(jnp.stack([jnp.maximum(up_to, 1) - 1, up_to], axis=1))
  below = jnp.where(up_to[:, None] > 0, around[..., 0], 0)
  at_threshold = around[..., 1] - below
  left = jnp.maximum(excess - jnp.sum(below, axis=1), 0)[:, None]
  before = jnp.cumsum(at_threshold, axis=1) - at_threshold
  freed = jnp.where(excess[:, None] > 0, below + jnp.clip(left - before, 0, at_threshold), 0).reshape(-1)
  evictions = jnp.where(freed > 0, last_block[:, 0] + (freed - 1) * block_size, 0)
  return freed, evictions, lowest_kvs(keys, positions, tables, lengths, evictions)
