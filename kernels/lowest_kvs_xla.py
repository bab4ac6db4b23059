"""XLA version of `lowest_kvs`: a search by bits for each head's threshold."""

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.kernels.bit_search import NEVER, smallest
from kvc_jax.kernels.count_at_most_xla import count_at_most


def lowest_kvs(
    keys: jax.Array, positions: jax.Array, tables: jax.Array, lengths: jax.Array, wanted: jax.Array
) -> jax.Array:
  """See `lowest_kvs.lowest_kvs`."""
  some = (wanted > 0)[:, None] & (jnp.arange(keys.shape[1], dtype=jnp.int32) < lengths[:, None])
  threshold = _threshold(keys, lengths, wanted)
  lower, equal = (keys < threshold[:, None]) & some, (keys == threshold[:, None]) & some
  needed = wanted - jnp.sum(lower, axis=1, dtype=jnp.int32)

  def oldest() -> jax.Array:
    ages = jnp.where(equal, positions[tables].reshape(keys.shape).astype(jnp.uint32), NEVER)
    return equal & (ages <= _threshold(ages, lengths, needed)[:, None])

  # The search among equals runs only where a tie is split.
  split = jnp.any(needed < jnp.sum(equal, axis=1, dtype=jnp.int32))
  return lower | lax.cond(split, oldest, lambda: equal)


def _threshold(keys, lengths, wanted):
  """The wanted-th smallest key of each head; 0 where none is wanted."""
  return smallest(lambda t: count_at_most(keys, t, lengths) >= wanted[:, None], wanted.shape, step_bits=1)
