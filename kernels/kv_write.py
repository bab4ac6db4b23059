"""The op that stores new keys and values in the block pool."""

import jax
from jaxtyping import Array, Float, Int

from kvc_jax.kernels import kv_write_xla


def kv_write(
    kv: Float[Array, "blocks 2 block_size head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    blocks: Int[Array, "tokens kv_heads"],
    offsets: Int[Array, "tokens kv_heads"],
) -> jax.Array:
  """Sets kv[blocks[t, h], :, offsets[t, h]] to (k[t, h], v[t, h]).

  Targets must be distinct, those that are dropped as well (`scatter.apart`).

  Args:
    kv: [N, 2, P, D] the pool.
    k: [T, H, D]; cast to the pool's dtype.
    v: [T, H, D].
    blocks: i32 [T, H] block ids; N and above drop the row.
    offsets: i32 [T, H] KV slot within the block.

  Returns:
    The pool, updated in place where the caller's jit donates it.
  """
  if k.shape != v.shape or k.shape[:2] != blocks.shape or blocks.shape != offsets.shape:
    raise ValueError(
        f"kv_write: k {k.shape}, v {v.shape}, blocks {blocks.shape} and offsets {offsets.shape} do not match")
  if k.shape[-1] != kv.shape[-1]:
    raise ValueError(f"kv_write: head_dim of k is {k.shape[-1]}, of the pool {kv.shape[-1]}")
  return kv_write_xla.kv_write(kv, k, v, blocks, offsets)
