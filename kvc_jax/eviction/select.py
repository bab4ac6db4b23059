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
from jaxtyping import Array, Bool, Float, Int, UInt32

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
    most: Int[Array, " heads"] | None = None,
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
    most: i32 [R] blocks that each head may lose; None for any number.

  Returns:
    i32 [R] blocks freed and KVs evicted of each head, and True [R, M*P] for each
    KV to evict.
  """
  block_size = positions.shape[1]
  heads = lengths.shape[0] // excess.shape[0]

  def blocks_up_to(thresholds: Array) -> Array:
    """Blocks that the KVs up to each threshold [groups, T] pay for, [groups, heads, T]."""
    return _blocks_up_to(keys, lengths, thresholds, block_size, most).reshape(-1, heads, thresholds.shape[1])

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
  evictions = _evictions(lengths, freed, block_size)
  return freed, evictions, lowest_kvs(keys, positions, tables, lengths, evictions)


def excess_by_mass(
    keys: UInt32[Array, "heads kvs"],
    scores: Float[Array, "heads kvs"],
    lengths: Int[Array, " heads"],
    lost: Float[Array, " seqs"],
    num_groups: int,
    block_size: int,
    most: Int[Array, " heads"] | None = None,
) -> Int[Array, " groups"]:
  """Blocks of each group that can go while the scores evicted sum to no more than a share of all held.

  The blocks that `select` then frees are those that cost up to a threshold, the highest that keeps
  the sum within bounds; blocks of equal cost go together or stay together.

  Args:
    keys: u32 [R, M*P], as for `select`.
    scores: f32 [R, M*P] not negative; whatever is not held is ignored.
    lengths: i32 [R] KVs of each head.
    lost: f32 [B] share of the sum that may go, for R / B neighbouring heads each; below 0 nothing may.
    num_groups: E, of R / E neighbouring heads; a multiple of B.
    block_size: P.
    most: as for `select`.

  Returns:
    i32 [E].
  """
  heads = lengths.shape[0] // num_groups
  held = jnp.arange(keys.shape[1], dtype=jnp.int32) < lengths[:, None]
  scores = jnp.where(held, scores, 0.0)
  lost = jnp.repeat(lost, num_groups // lost.shape[0])
  allowed = jnp.where(lost < 0, -1.0, lost * jnp.sum(scores.reshape(num_groups, -1), axis=1))
  order = jnp.argsort(jnp.where(held, keys, NEVER), axis=1)
  running = jnp.cumsum(jnp.take_along_axis(scores, order, axis=1), axis=1)
  running = jnp.pad(running, ((0, 0), (1, 0)))  # [R, M*P + 1]: of the n lowest

  def loses_more(thresholds: Array) -> Array:
    blocks = _blocks_up_to(keys, lengths, thresholds, block_size, most)
    gone = _evictions(lengths[:, None], blocks, block_size)
    sums = jnp.take_along_axis(running, gone, axis=1)
    return jnp.sum(sums.reshape(num_groups, heads, -1), axis=1) > allowed[:, None]

  first_too_high = smallest(loses_more, (num_groups,), step_bits=bits_per_step())
  threshold = jnp.maximum(first_too_high, 1) - 1
  blocks = _blocks_up_to(keys, lengths, jnp.minimum(threshold, NEVER - 1)[:, None], block_size, most)
  return jnp.where(first_too_high > 0, jnp.sum(blocks.reshape(num_groups, heads), axis=1), 0)


def _last_block(lengths: Array, block_size: int) -> Array:
  """KVs in each head's last block; 0 where there is none."""
  return jnp.where(lengths > 0, lax.rem(lengths - 1, jnp.int32(block_size)) + 1, 0)


def _blocks_up_to(keys: Array, lengths: Array, thresholds: Array, block_size: int, most: Array | None) -> Array:
  """Blocks of each head, [R, T], that its KVs up to the thresholds [E, T] of its group pay for."""
  last_block = _last_block(lengths, block_size)[:, None]
  count = count_at_most(keys, thresholds, lengths)
  paid = (count >= last_block) & (last_block > 0)
  blocks = jnp.where(paid, 1 + lax.div(count - last_block, jnp.int32(block_size)), 0)
  return blocks if most is None else jnp.minimum(blocks, most[:, None])


def _evictions(lengths: Array, freed: Array, block_size: int) -> Array:
  """KVs that go with so many blocks of a head."""
  return jnp.where(freed > 0, _last_block(lengths, block_size) + (freed - 1) * block_size, 0)
