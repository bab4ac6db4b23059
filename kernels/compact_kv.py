"""The op that moves surviving KVs into the holes that eviction left."""

import jax
from jaxtyping import Array, Float, Int

from kvc_jax.kernels import compact_kv_xla


def compact_kv(
    kv: Float[Array, "blocks 2 block_size head_dim"],
    scores: Float[Array, "blocks block_size"],
    positions: Int[Array, "blocks block_size"],
    sources: Int[Array, " moves"],
    targets: Int[Array, " moves"],
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Copies KV slot sources[i] to targets[i] for i < count: key, value, score, position.

  No slot is both a source and a target, so the moves can go in any order.

  Args:
    kv: [N, 2, P, D] the pool.
    scores: f32 [N, P].
    positions: i32 [N, P].
    sources: i32 [K] KV slots, numbered block * P + offset; 0 from `count` on.
    targets: i32 [K], likewise.
    count: i32 [] how many of the K moves are real.

  Returns:
    The three pools, updated in place where the caller's jit donates them.
  """
  if sources.shape != targets.shape:
    raise ValueError(f"compact_kv: {sources.shape} sources but {targets.shape} targets")
  return compact_kv_xla.compact_kv(kv, scores, positions, sources, targets, count)
