"""XLA version of `kv_write`: one scatter."""

import jax
import jax.numpy as jnp

from kvc_jax.kernels.scatter import put


def kv_write(kv: jax.Array, k: jax.Array, v: jax.Array, blocks: jax.Array, offsets: jax.Array) -> jax.Array:
  """See `kv_write.kv_write`."""
  rows = jnp.stack([k, v], axis=2).astype(kv.dtype)  # [T, H, 2, D]
  return put(kv.at[blocks, :, offsets], rows)
