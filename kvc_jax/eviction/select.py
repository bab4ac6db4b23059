"""Which blocks to free and which KVs to evict, without a sort.

Freeing the first block of a head costs its last block's occupancy h (1..P)
evictions, each further block P more, so block j of a head costs the
(h - 1 + j*P)-th smallest value. "The E cheapest blocks of the group" is then a
threshold: the smallest value at which at least E blocks can be freed. It is
found by bisection on the order-preserving integer image of the values. The cost
of a block is KV-Compress's (arXiv 2410.00161), which sorts instead.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_SIGN = jnp.uint32(0x8000_0000)


def select(
    values: Float[Array, "groups heads kvs"],
    positions: Int[Array, "groups heads kvs"],
    last_block: Int[Array, "groups heads"],
    excess: Int[Array, " groups"],
    block_size: int,
) -> tuple[Int[Array, "groups heads"], Bool[Array, "groups heads kvs"]]:
  """Chooses the cheapest blocks of each group and the KVs that pay for them.

  Ties: blocks of equal cost go in head order; KVs of equal value in one head go
  oldest position first. So the choice does not depend on where a KV is stored.

  Args:
    values: f32, worth of each KV; +inf where it must stay or is not held.
    positions: i32 token positions, distinct within a head.
    last_block: i32 KVs in each head's last block, 1..P; 0 for an empty head.
    excess: i32 blocks to free in each group; fewer are freed where fewer can be.
    block_size: P.

  Returns:
    Blocks freed per head, and True for each KV to evict.
  """
  image = _ordered(values)
  limit = _ordered(jnp.asarray(jnp.inf, jnp.float32))

  def evictable_up_to(threshold: Array) -> Array:
    """KVs per head with image <= threshold [groups, 1 or heads]; +inf never counts."""
    below = (image <= threshold[..., None]) & (image < limit)
    return jnp.sum(below, axis=-1, dtype=jnp.int32)

  def blocks_from(count: Array) -> Array:
    paid = (count >= last_block) & (last_block > 0)
    return jnp.where(paid, 1 + lax.div(count - last_block, jnp.int32(block_size)), 0)

  def enough_blocks(threshold: Array) -> Array:
    return jnp.sum(blocks_from(evictable_up_to(threshold[:, None])), axis=1) >= excess

  threshold = _smallest(enough_blocks, excess.shape, limit)[:, None]
  below = jnp.where(threshold > 0, blocks_from(evictable_up_to(jnp.maximum(threshold, 1) - 1)), 0)
  at_threshold = blocks_from(evictable_up_to(threshold)) - below
  left = jnp.maximum(excess - jnp.sum(below, axis=1), 0)[:, None]
  before = jnp.cumsum(at_threshold, axis=1) - at_threshold
  freed = below + jnp.clip(left - before, 0, at_threshold)
  freed = jnp.where(excess[:, None] > 0, freed, 0)
  evictions = jnp.where(freed > 0, last_block + (freed - 1) * block_size, 0)
  return freed, _lowest(image, positions, evictions, evictable_up_to, limit)


def _lowest(image: Array, positions: Array, evictions: Array, evictable_up_to: Callable, limit: Array) -> Array:
  """Marks the `evictions` lowest KVs of each head, the oldest first among equals."""
  wanted = jnp.maximum(evictions, 1)
  threshold = _smallest(lambda t: evictable_up_to(t) >= wanted, evictions.shape, limit)[..., None]
  some = (evictions > 0)[..., None]
  lower = (image < threshold) & some
  equal = (image == threshold) & (image < limit) & some
  needed = evictions - jnp.sum(lower, axis=-1, dtype=jnp.int32)
  split = jnp.any(needed < jnp.sum(equal, axis=-1, dtype=jnp.int32))

  def oldest() -> Array:
    def enough(last: Array) -> Array:
      old = equal & (positions.astype(jnp.uint32) <= last[..., None])
      return jnp.sum(old, axis=-1, dtype=jnp.int32) >= needed

    last = _smallest(enough, evictions.shape, _SIGN)
    return equal & (positions.astype(jnp.uint32) <= last[..., None]) & (needed > 0)[..., None]

  # Real scores are seldom equal; the second search runs only where a tie is split.
  return lower | lax.cond(split, oldest, lambda: equal)


def _ordered(values: Array) -> Array:
  """uint32 image of f32 values with the same order, -0 equal to 0."""
  bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values).astype(jnp.float32), jnp.uint32)
  return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _smallest(holds: Callable[[Array], Array], shape: tuple[int, ...], limit: Array) -> Array:
  """Smallest uint32 in [0, limit) for which the monotone `holds` is true; `limit` where none is."""

  def body(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    found = holds(middle)
    return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

  bounds = (jnp.zeros(shape, jnp.uint32), jnp.full(shape, limit, jnp.uint32))
  return lax.fori_loop(0, 32, body, bounds)[1]
