"""Decode attention over block tables that differ for every head: the op."""

import jax
from jaxtyping import Array, Float, Int

from kvc_jax.kernels import backends, paged_decode_mosaic, paged_decode_triton, paged_decode_xla
from kvc_jax.kernels.observed import Observed


def paged_decode(
    q: Float[Array, "seqs q_heads head_dim"],
    kv: Float[Array, "blocks 2 block_size head_dim"],
    tables: Int[Array, "layers seqs kv_heads max_blocks"],
    lengths: Int[Array, "layers seqs kv_heads"],
    layer: jax.Array,
    observed: Observed | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
    every: int = 1,
) -> tuple[jax.Array, Observed | None]:
  """Attention of one query token per sequence over the KVs that each head kept.

  With `observed`, scores grow by what the sequence's last query attended: the sum
  over its G query heads of probability ** power, for each KV at a position <= the
  query's - buffer (KV-Compress, arXiv 2410.00161: the metric is kept up to date
  while decoding). The queries of this call are observed in turn. Scattered writes are
  what that costs; with `every` above 1 fewer queries count, each for as many.

  Args:
    q: [S, H*G, D] queries after RoPE; head h*G + g reads KV head h.
    kv: [N, 2, P, D] the pool.
    tables: i32 [L, S, H, M] block ids of every layer.
    lengths: i32 [L, S, H] KVs of each head; a head with none yields zeros.
    layer: i32 [] which layer's tables to use.
    observed: None for no scores. Only the last KV of a head may be newer than the
      observed query.
    scale: factor on q k^T.
    power: 1 or 2.
    buffer: newest tokens that a query does not count for.
    every: only queries at positions that are multiples of it count, `every` times each.

  Returns:
    Output [S, H*G, D] in the dtype of q; and `observed` with this layer's scores
    updated and its queries and log-sum-exp replaced (None without).
  """
  seqs, q_heads, head_dim = q.shape
  if tables.shape[:3] != lengths.shape or tables.shape[1] != seqs:
    raise ValueError(f"paged_decode: q {q.shape}, tables {tables.shape}, lengths {lengths.shape} do not match")
  if q_heads % tables.shape[2] or head_dim != kv.shape[-1]:
    raise ValueError(f"paged_decode: q {q.shape} fits neither {tables.shape[2]} KV heads nor pool {kv.shape}")
  if observed is not None and observed.queries.shape != (tables.shape[0], *q.shape):
    raise ValueError(
        f"paged_decode: observed queries {observed.queries.shape} are not those of {tables.shape[0]} layers and "
        f"q {q.shape}")
  backend = backends.choose(
      "paged_decode", backends.shape_of(kv, q_heads // tables.shape[2], q.dtype, scored=observed is not None))
  return _RUNS[backend](
      q, kv, tables, lengths, layer, observed, scale=scale, power=power, buffer=buffer, every=every)


# Jitted, so that a model whose layers are written out traces and lowers the kernel once, not in every layer.
_RUNS = {
    name: jax.jit(module.paged_decode, static_argnames=("scale", "power", "buffer", "every"))
    for name, module in (
        ("mosaic", paged_decode_mosaic), ("triton", paged_decode_triton), (backends.XLA, paged_decode_xla))}
