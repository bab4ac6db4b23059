"""XLA version of `column_scores`: one pass over tiles of keys."""

import jax
import jax.numpy as jnp
from jax import lax

TILE_BLOCKS = 16


def column_scores(
    q: jax.Array,
    log_sums: jax.Array,
    query_positions: jax.Array,
    kv: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    slot: jax.Array,
    *,
    scale: float,
    power: int,
    buffer: int,
) -> jax.Array:
  """See `column_scores.column_scores`."""
  table, length = tables[layer, slot], lengths[layer, slot]  # [H, M], [H]
  heads, columns = table.shape
  width = columns * kv.shape[2]
  table = jnp.pad(table, ((0, 0), (0, -columns % TILE_BLOCKS)))
  tile = TILE_BLOCKS * kv.shape[2]
  count, _, head_dim = q.shape
  queries = q.reshape(count, heads, -1, head_dim).astype(jnp.float32) * scale
  queries = queries.transpose(1, 2, 0, 3)  # [H, G, R, D]
  log_sums = log_sums.reshape(count, heads, -1).transpose(1, 2, 0)[..., None]
  last_counted = (query_positions - buffer)[:, None]

  def body(step, sums):
    blocks = lax.dynamic_slice_in_dim(table, step * TILE_BLOCKS, TILE_BLOCKS, axis=1)
    held = step * tile + jnp.arange(tile, dtype=jnp.int32) < length[:, None]
    keys = kv[blocks, 0].reshape(heads, tile, head_dim).astype(jnp.float32)
    keys = jnp.where(held[..., None], keys, 0.0)
    counted = positions[blocks].reshape(heads, 1, tile) <= last_counted  # [H, R, tile]
    counted = (counted & held[:, None])[:, None]
    logits = jnp.einsum("hgrd,htd->hgrt", queries, keys, precision=lax.Precision.HIGHEST)
    # Masked before the exponential: an uncounted key may lie above the log-sum-exp.
    probabilities = jnp.exp(jnp.where(counted, logits - log_sums, -jnp.inf))
    total = jnp.sum(probabilities**power, axis=2)
    return lax.dynamic_update_slice_in_dim(sums, total, step * tile, axis=2)

  sums = jnp.zeros((heads, queries.shape[1], table.shape[1] * kv.shape[2]))
  tiles = lax.div(jnp.max(length) + (tile - 1), jnp.int32(tile))
  return lax.fori_loop(0, tiles, body, sums)[..., :width]
