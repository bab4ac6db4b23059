"""The op that moves surviving KVs into the holes that eviction left.

After evicting some of a head's n KVs n' are kept. The survivors at index >= n'
are as many as the holes at index < n', and the two sets are disjoint, so the
moves can go in any order (KV-Compress, arXiv 2410.00161).

    index     0 1 2 3 4 5 6 7        n = 8, evicted: 1 3 6, n' = 5
    stays     x . x . x x . x        holes below 5: 1 3; survivors from 5: 5 7
    after     0 5 2 7 4              moves 5 -> 1, 7 -> 3
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvc_jax.kernels import backends, compact_kv_triton, compact_kv_xla


def compact_kv(
    kv: Float[Array, "blocks 2 block_size head_dim"],
    scores: Float[Array, "blocks block_size"],
    positions: Int[Array, "blocks block_size"],
    evicted: Bool[Array, "heads kvs"],
    tables: Int[Array, "heads max_blocks"],
    lengths: Int[Array, " heads"],
    kept: Int[Array, " heads"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Closes the holes below `kept`: key, value, score and position move together.

  Args:
    kv: [N, 2, P, D] the pool.
    scores: f32 [N, P].
    positions: i32 [N, P].
    evicted: True for each KV that goes, in the order of the head's list, M * P
      entries per head. False from the head's length on.
    tables: i32 [R, M] block ids of each head; a block stands in one row only.
    lengths: i32 [R] KVs of each head before.
    kept: i32 [R] KVs of each head after: length minus the evicted.

  Returns:
    The three pools, updated in place where the caller's jit donates them.
  """
  heads, kvs = evicted.shape
  if tables.shape != (heads, kvs // kv.shape[2]) or lengths.shape != (heads,) or kept.shape != (heads,):
    raise ValueError(
        f"compact_kv: evicted {evicted.shape}, tables {tables.shape}, lengths {lengths.shape} and kept {kept.shape} "
        f"do not match at block size {kv.shape[2]}")
  backend = backends.choose("compact_kv", backends.shape_of(kv, 1, jnp.float32))
  run = {"triton": compact_kv_triton.compact_kv}.get(backend, compact_kv_xla.compact_kv)
  return run(kv, scores, positions, evicted, tables, lengths, kept)
