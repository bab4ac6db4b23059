"""Which blocks to free and which KVs to evict, without a sort.

Freeing the first block of a head costs its last block's occupancy h (1..P)
evictions, each further block P more, so block j of a head costs the
(h - 1 + j*P)-th smallest value. "The E cheapest blocks of the group" is then a
threshold: the smallest value at which at least E blocks can be freed. It is
searched for bit by bit on the order-preserving integer image of the values. The
cost of a block is KV-Compress's (arXiv 2410.00161), which sorts instead.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from kvc_jax.kernels.count_at_most import bits_per_step, count_at_most

NEVER = jnp.uint32(0xFFFF_FFFF)
"""Key of a KV that must stay or is not held: above every threshold."""

_SIGN = jnp.uint32(0x8000_0000)


def keys_of(values: Array, evictable: Array) -> Array:
  """uint32 keys in the order of the f32 values, -0 equal to 0; NEVER where not evictable or +inf."""
  bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values).astype(jnp.float32), jnp.uint32)
  image = jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)
  return jnp.where(evictable & (values < jnp.inf), image, NEVER)


def select(
    keys: UInt32[Array, "heads kvs"],
    positions: Callable[[], Int[Array, "heads kvs"]],
    lengths: Int[Array, " heads"],
    excess: Int[Array, " groups"],
    block_size: int,
) -> tuple[Int[Array, " heads"], Int[Array, " heads"], Bool[Array, "heads kvs"]]:
  """Chooses the cheapest blocks of each group and the KVs that pay for them.

  Ties: blocks of equal cost go in head order; KVs of equal value in one head go
  oldest position first. So the choice does not depend on where a KV is stored.

  Args:
    keys: u32 [R, K], `keys_of` the KVs; NEVER from a head's length on.
    positions: gives i32 [R, K] token positions, distinct within a head; called
      for a part of the program that runs only where KVs of equal value compete.
    lengths: i32 [R] KVs of each head.
    excess: i32 [E] blocks to free in each group, which is R / E neighbouring
      heads; fewer are freed where fewer can be.
    block_size: P.

  Returns:
    i32 [R] blocks freed and KVs evicted of each head, and True [R, K] for each KV
    to evict.
  """
  heads = lengths.shape[0] // excess.shape[0]
  last_block = jnp.where(lengths > 0, lax.rem(lengths - 1, jnp.int32(block_size)) + 1, 0)[:, None]

  def blocks_up_to(thresholds: Array) -> Array:
    """Blocks that the KVs up to each threshold [groups, T] pay for, [groups, heads, T]."""
    count = count_at_most(keys, jnp.repeat(thresholds, heads, axis=0), lengths)
    paid = (count >= last_block) & (last_block > 0)
    blocks = jnp.where(paid, 1 + lax.div(count - last_block, jnp.int32(block_size)), 0)
    return blocks.reshape(-1, heads, thresholds.shape[1])

  threshold = _smallest(lambda t: jnp.sum(blocks_up_to(t), axis=1) >= excess[:, None], excess.shape)
  # NEVER means that all there is will go; it is no threshold itself, for it would count what must stay.
  up_to = jnp.minimum(threshold, NEVER - 1)
  around = blocks_up_to(jnp.stack([jnp.maximum(up_to, 1) - 1, up_to], axis=1))
  below = jnp.where(up_to[:, None] > 0, around[..., 0], 0)
  at_threshold = around[..., 1] - below
  left = jnp.maximum(excess - jnp.sum(below, axis=1), 0)[:, None]
  before = jnp.cumsum(at_threshold, axis=1) - at_threshold
  freed = jnp.where(excess[:, None] > 0, below + jnp.clip(left - before, 0, at_threshold), 0).reshape(-1)
  evictions = jnp.where(freed > 0, last_block[:, 0] + (freed - 1) * block_size, 0)
  return freed, evictions, _lowest(keys, positions, lengths, evictions)


def _lowest(keys: Array, positions: Callable[[], Array], lengths: Array, evictions: Array) -> Array:
  """Marks the `evictions` lowest KVs of each head, the oldest first among equals."""
  threshold = _smallest(lambda t: count_at_most(keys, t, lengths) >= evictions[:, None], evictions.shape)
  some = evictions > 0
  # The smallest threshold with enough: no fewer than one KV equals it.
  around = count_at_most(keys, jnp.stack([jnp.maximum(threshold, 1) - 1, threshold], axis=1), lengths)
  lower_count = jnp.where(threshold > 0, around[:, 0], 0)
  needed = jnp.where(some, evictions - lower_count, 0)
  lower = (keys < threshold[:, None]) & some[:, None]
  equal = (keys == threshold[:, None]) & some[:, None]

  def oldest() -> Array:
    ages = jnp.where(equal, positions().astype(jnp.uint32), NEVER)
    last = _smallest(lambda t: count_at_most(ages, t, lengths) >= needed[:, None], evictions.shape, bits=31)
    return equal & (ages <= last[:, None])

  # The search among equals runs only where a tie is split.
  split = jnp.any(some & (needed < around[:, 1] - lower_count))
  return lower | lax.cond(split, oldest, lambda: equal)


def _smallest(holds: Callable[[Array], Array], shape: tuple[int, ...], bits: int = 32) -> Array:
  """Smallest uint32 below 2**bits - 1 for which the monotone `holds` is true; 2**bits - 1 where none is.

  `holds` takes thresholds [*shape, T] and answers for each.
  """
  step_bits = bits_per_step()
  steps = -(-bits // step_bits)
  digits = jnp.arange(1, 2**step_bits, dtype=jnp.uint32)

  def body(step, low):
    shift = (jnp.uint32(steps - 1) - step.astype(jnp.uint32)) * jnp.uint32(step_bits)
    # The last number with a smaller digit: where `holds` is false, this digit or a higher one is the answer's.
    missed = ~holds(low[..., None] + (digits << shift) - 1)
    return low + (jnp.sum(missed, axis=-1, dtype=jnp.uint32) << shift)

  return lax.fori_loop(0, steps, body, jnp.zeros(shape, jnp.uint32))
