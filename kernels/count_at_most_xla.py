"""XLA version of `count_at_most`."""

import jax
import jax.numpy as jnp


def count_at_most(keys: jax.Array, thresholds: jax.Array, lengths: jax.Array) -> jax.Array:
  """See `count_at_most.count_at_most`."""
  thresholds = jnp.repeat(thresholds, keys.shape[0] // thresholds.shape[0], axis=0)
  held = jnp.arange(keys.shape[1], dtype=jnp.int32) < lengths[:, None]
  # One sum per threshold: XLA fuses them into one read of the keys.
  return jnp.stack(
      [jnp.sum(held & (keys <= column[:, None]), axis=1, dtype=jnp.int32) for column in thresholds.T], axis=1)
