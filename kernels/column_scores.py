"""Column sums of attention probabilities over cached keys: the op behind prefill scores."""

import jax
from jaxtyping import Array, Float, Int

from kvc_jax.kernels import backends, column_scores_triton, column_scores_xla


def column_scores(
    q: Float[Array, "queries q_heads head_dim"],
    log_sums: Float[Array, "queries q_heads"],
    query_positions: Int[Array, " queries"],
    kv: Float[Array, "blocks 2 block_size head_dim"],
    positions: Int[Array, "blocks block_size"],
    tables: Int[Array, "layers seqs kv_heads max_blocks"],
    lengths: Int[Array, "layers seqs kv_heads"],
    layer: jax.Array,
    slot: jax.Array,
    *,
    scale: float,
    power: int,
    buffer: int,
) -> jax.Array:
  """Sum over queries of probability ** power, for every KV that one sequence holds.

  Args:
    q: [R, H*G, D] queries after RoPE.
    log_sums: f32 [R, H*G] log-sum-exp of each query over all keys it attended.
    query_positions: i32 [R]; a query counts for keys at positions <= its own -
      `buffer`, so a negative one (below all positions) counts for none.
    kv: [N, 2, P, D] the pool.
    positions: i32 [N, P].
    tables: i32 [L, S, H, M].
    lengths: i32 [L, S, H].
    layer: i32 [].
    slot: i32 [].
    scale: factor on q k^T.
    power: 1 or 2.
    buffer: newest tokens that a query does not count for.

  Returns:
    f32 [H, G, M*P] in the order of the head's list; 0 where nothing is held.
  """
  if q.shape[:2] != log_sums.shape or q.shape[0] != query_positions.shape[0]:
    raise ValueError(
        f"column_scores: q {q.shape}, log_sums {log_sums.shape}, query_positions {query_positions.shape} "
        "do not match")
  backend = backends.choose("column_scores", backends.shape_of(kv, q.shape[1] // tables.shape[2], q.dtype))
  run = {"triton": column_scores_triton.column_scores}.get(backend, column_scores_xla.column_scores)
  return run(
      q, log_sums, query_positions, kv, positions, tables, lengths, layer, slot,
      scale=scale, power=power, buffer=buffer)
