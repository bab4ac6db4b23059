"""Decode attention over block tables that differ for every head: the op."""

import jax
from jaxtyping import Array, Float, Int

from kvc_jax.kernels import backends, paged_decode_triton, paged_decode_xla


def paged_decode(
    q: Float[Array, "seqs q_heads head_dim"],
    kv: Float[Array, "blocks 2 block_size head_dim"],
    tables: Int[Array, "layers seqs kv_heads max_blocks"],
    lengths: Int[Array, "layers seqs kv_heads"],
    layer: jax.Array,
    scores: Float[Array, "blocks block_size"] | None = None,
    positions: Int[Array, "blocks block_size"] | None = None,
    query_positions: Int[Array, " seqs"] | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
  """Attention of one query token per sequence over the KVs that each head kept.

  With `scores`, every attended KV's score grows by the sum over its G query
  heads of probability ** power, where key position <= query position - buffer
  (KV-Compress, arXiv 2410.00161: the metric is kept up to date while decoding).

  Args:
    q: [S, H*G, D] queries after RoPE; head h*G + g reads KV head h.
    kv: [N, 2, P, D] the pool.
    tables: i32 [L, S, H, M] block ids of every layer.
    lengths: i32 [L, S, H] KVs of each head; a head with none yields zeros.
    layer: i32 [] which layer's tables to use.
    scores: f32 [N, P], or None for no score output.
    positions: i32 [N, P] token positions of the KVs; needed with `scores`.
    query_positions: i32 [S], no KV of the sequence is newer; needed with `scores`.
    scale: factor on q k^T.
    power: 1 or 2.
    buffer: newest tokens that a query does not count for.

  Returns:
    Output [S, H*G, D] in the dtype of q, and the updated scores (None without).
  """
  seqs, q_heads, head_dim = q.shape
  if tables.shape[:3] != lengths.shape or tables.shape[1] != seqs:
    raise ValueError(f"paged_decode: q {q.shape}, tables {tables.shape}, lengths {lengths.shape} do not match")
  if q_heads % tables.shape[2] or head_dim != kv.shape[-1]:
    raise ValueError(f"paged_decode: q {q.shape} fits neither {tables.shape[2]} KV heads nor pool {kv.shape}")
  if scores is not None and (positions is None or query_positions is None):
    raise ValueError("paged_decode: scores need positions and query_positions")
  backend = backends.choose("paged_decode", backends.shape_of(kv, q_heads // tables.shape[2], q.dtype))
  run = {"triton": paged_decode_triton.paged_decode}.get(backend, paged_decode_xla.paged_decode)
  return run(
      q, kv, tables, lengths, layer, scores, positions, query_positions,
      scale=scale, power=power, buffer=buffer)
