"""The op that marks the KVs of lowest worth in each head."""

import jax
from jaxtyping import Array, Int, UInt32

from kvc_jax.kernels import backends, lowest_kvs_triton, lowest_kvs_xla


def lowest_kvs(
    keys: UInt32[Array, "heads kvs"],
    positions: Int[Array, "blocks block_size"],
    tables: Int[Array, "heads max_blocks"],
    lengths: Int[Array, " heads"],
    wanted: Int[Array, " heads"],
) -> jax.Array:
  """Marks the `wanted` lowest keys of each head; among equals the oldest positions.

  Args:
    keys: u32 [R, K] in the order of the head's list, K = M * P; 2**32 - 1 for a KV
      that is not to be marked.
    positions: i32 [N, P] token positions of the KVs, distinct within a head.
    tables: i32 [R, M] block ids.
    lengths: i32 [R] KVs of each head; keys from there on are not looked at.
    wanted: i32 [R], at most as many as there are keys below 2**32 - 1.

  Returns:
    bool [R, K], True for each KV marked.
  """
  heads, kvs = keys.shape
  if tables.shape != (heads, kvs // positions.shape[1]) or lengths.shape != (heads,) or wanted.shape != (heads,):
    raise ValueError(
        f"lowest_kvs: keys {keys.shape}, tables {tables.shape}, lengths {lengths.shape} and wanted {wanted.shape} "
        f"do not match at block size {positions.shape[1]}")
  backend = backends.choose("lowest_kvs", backends.KEYS)
  run = {"triton": lowest_kvs_triton.lowest_kvs}.get(backend, lowest_kvs_xla.lowest_kvs)
  return run(keys, positions, tables, lengths, wanted)
