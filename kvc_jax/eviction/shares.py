"""How a sequence's budget is shared out among its heads: blocks above the budget, for each group of heads.

A group is where heads compete: all of the sequence, those of a layer, or a head alone. Where heads stand alone,
each has a number of blocks of its own, and these add up to no more than the sequence's whole budget,
so that admission need not know how it is shared out.
"""

from typing import get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kvc_jax.cache.alloc import blocks_held
from kvc_jax.eviction.names import AllocationName
from kvc_jax.eviction.profile import HeadProfile

Allocation = AllocationName | HeadProfile

PYRAMID_BETA = 20
"""The last layer's share is 1/20 of the mean: PyramidKV's own setting."""

_HALVINGS = 32


def is_allocation(allocation: object) -> bool:
  """Whether this is a name of an allocation or a head profile."""
  return isinstance(allocation, HeadProfile) or (
      isinstance(allocation, str) and allocation in get_args(AllocationName))


def excess_blocks(
    lengths: Int[Array, "seqs layers kv_heads"],
    num_tokens: Int[Array, " seqs"],
    cache_tokens: Int[Array, " seqs"],
    protected: Int[Array, " seqs"],
    block_size: int,
    allocation: Allocation,
) -> Int[Array, " groups"]:
  """Blocks above the budget of each group.

  Args:
    lengths: i32 [B, L, H] KVs held.
    num_tokens: i32 [B] tokens seen.
    cache_tokens: i32 [B] budget C in tokens per head.
    protected: i32 [B] tokens of each head that cannot be evicted, at most.
    block_size: P.
    allocation: "all": one group per sequence; "layer": L of them; "head", "pyramid" and a
      profile: L * H. (static)
  """
  _, layers, heads = lengths.shape
  held, budget = blocks_held(lengths, block_size), blocks_held(cache_tokens, block_size)
  if isinstance(allocation, str) and allocation != "pyramid":
    group_heads = {"all": layers * heads, "layer": heads, "head": 1}[allocation]
    # Summed per group before the clip: what one head holds less, another may hold more.
    return jnp.maximum(jnp.sum((held - budget[:, None, None]).reshape(-1, group_heads), axis=1), 0)
  floor = blocks_held(jnp.minimum(protected, num_tokens), block_size)
  mean, most = jnp.maximum(budget - floor, 0), jnp.maximum(blocks_held(num_tokens, block_size) - floor, 0)
  if isinstance(allocation, HeadProfile):
    above = _by_weight(mean, most, jnp.asarray(allocation.weights))
  else:
    above = jnp.broadcast_to(_pyramid(mean, most, layers)[:, :, None], lengths.shape)
  return jnp.maximum(held - floor[:, None, None] - above, 0).reshape(-1)


def _pyramid(mean: Array, most: Array, layers: int) -> Array:
  """Blocks [B, L] per head of each layer, falling by the same step from layer to layer.

  Source: PyramidKV (arXiv 2406.02069), section 4: the last layer gets mean / beta, the first
  2 mean - mean / beta; where that is more than there is, the first layer keeps all and the last gets what
  the mean then leaves. Here in blocks instead of tokens, rounded so that they add up.
  """
  whole, top = mean.astype(jnp.float32), most.astype(jnp.float32)
  first = jnp.minimum(2 * whole - whole / PYRAMID_BETA, top)
  step = 2 * (first - whole) / max(layers - 1, 1)
  layer = jnp.arange(layers + 1, dtype=jnp.float32)
  return _rounded(layer * first[:, None] - step[:, None] * layer * (layer - 1) / 2, mean * layers)


def _by_weight(mean: Array, most: Array, weights: Array) -> Array:
  """Blocks [B, L, H] in proportion to weights [L, H], none above `most`: what one head cannot hold goes to others."""
  layers, heads = weights.shape
  flat = weights.reshape(-1).astype(jnp.float32)
  whole, top = (mean * layers * heads).astype(jnp.float32), most.astype(jnp.float32)[:, None]

  def blocks(factor: Array) -> Array:
    return jnp.minimum(factor[:, None] * flat, top)

  def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = (low + high) / 2
    fits = jnp.sum(blocks(middle), axis=1) <= whole
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

  # With this factor the least of the weights (all are positive) reaches the top.
  high = top[:, 0] / jnp.min(flat)
  low, _ = lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(high), high))
  steps = jnp.cumsum(jnp.pad(blocks(low), ((0, 0), (1, 0))), axis=1)
  # Where all heads are full the whole is not reached.
  total = jnp.minimum(mean, most) * layers * heads
  return _rounded(steps, total).reshape(-1, layers, heads)


def _rounded(steps: Array, total: Array) -> Array:
  """Whole numbers [B, n] for the differences of running sums [B, n + 1], which add up to `total` [B]."""
  marks = jnp.minimum(jnp.floor(steps + 0.5).astype(jnp.int32), total[:, None])
  marks = marks.at[:, -1].set(total)
  return jnp.diff(marks, axis=1)
