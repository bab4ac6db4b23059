"""Attention of one sequence's prompt chunk over its cached prefix and itself: the op."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvc_jax.kernels import backends, paged_prefill_cudnn, paged_prefill_xla


def paged_prefill(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    kv: Float[Array, "blocks 2 block_size head_dim"],
    tables: Int[Array, "layers seqs kv_heads max_blocks"],
    prefix_lengths: Int[Array, " kv_heads"],
    layer: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    *,
    scale: float,
    most_prefix: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Chunk attention: all of the prefix, and the chunk itself causally.

  Heads may differ in how much of the prefix they kept. The mask, with a prefix
  of n KVs in one head, a chunk of T rows and `count` of them real:

            prefix 0..n-1 | chunk 0 1 2 3
    row 0      1 1 1 1    |       1
    row 1      1 1 1 1    |       1 1
    row 2      1 1 1 1    |       1 1 1

  Args:
    q: [T, H*G, D] after RoPE; head h*G + g reads KV head h.
    k: [T, H, D] the chunk's keys after RoPE.
    v: [T, H, D].
    kv: [N, 2, P, D] the pool.
    tables: i32 [L, S, H, M].
    prefix_lengths: i32 [H] KVs before the chunk in each head.
    layer: i32 [].
    slot: i32 [].
    count: i32 [] rows of the chunk that are real; the rest of the output means nothing.
    scale: factor on q k^T.
    most_prefix: static bound of `prefix_lengths`. None: the device says how long they are, and on a GPU
      the host then waits for its answer.

  Returns:
    Output [T, H*G, D] in the dtype of q and its log-sum-exp f32 [T, H*G], for
    `column_scores`.
  """
  tokens, q_heads, head_dim = q.shape
  if k.shape != v.shape or k.shape[0] != tokens or k.shape[1] != tables.shape[2]:
    raise ValueError(f"paged_prefill: q {q.shape}, k {k.shape}, v {v.shape}, tables {tables.shape} do not match")
  if q_heads % k.shape[1] or head_dim != kv.shape[-1]:
    raise ValueError(f"paged_prefill: q {q.shape} fits neither {k.shape[1]} KV heads nor pool {kv.shape}")
  backend = backends.choose("paged_prefill", backends.shape_of(kv, q_heads // tables.shape[2], q.dtype))
  arguments = (q, k, v, kv, tables, prefix_lengths, layer, slot, count)
  if backend == "cudnn":
    return paged_prefill_cudnn.paged_prefill(*arguments, scale=scale, most_prefix=most_prefix)
  return paged_prefill_xla.paged_prefill(*arguments, scale=scale)


def bound_of_prefix(tokens: int, kv: jax.Array, group: int, dtype: DTypeLike) -> int | None:
  """The `most_prefix` for a prefix of at most `tokens` KVs in each head: one of few, each a program of its own.

  Args:
    tokens: 0 or more.
    kv: [N, 2, P, D] the pool.
    group: query heads of each KV head, G.
    dtype: of queries.
  """
  if backends.choose("paged_prefill", backends.shape_of(kv, group, dtype)) == "cudnn":
    return paged_prefill_cudnn.bound_of_prefix(tokens)
  return None
