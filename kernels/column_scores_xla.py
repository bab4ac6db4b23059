"""XLA version of `column_scores`: one pass over tiles of keys."""

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.kernels import tiles_xla


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
  tables, lengths = tables[layer, slot], lengths[layer, slot]  # [H, M], [H]
  heads, columns = tables.shape
  block_size = kv.shape[2]
  tables = tiles_xla.pad_to_tiles(tables)
  count, _, head_dim = q.shape
  queries = q.reshape(count, heads, -1, head_dim).astype(jnp.float32) * scale
  queries = queries.transpose(1, 2, 0, 3).reshape(heads, -1, head_dim)  # [H, G*R, D]
  log_sums = log_sums.T.reshape(heads, -1)[..., None]
  group = queries.shape[1] // count
  last_counted = jnp.tile(query_positions - buffer, group)[:, None]

  def body(step, sums):
    blocks, held = tiles_xla.tile_of(tables, lengths, step, block_size)
    # Masked before the exponential: an uncounted key may lie above the log-sum-exp.
    counted = held[:, None] & (positions[blocks].reshape(heads, 1, -1) <= last_counted)
    logits = tiles_xla.logits_of(queries, tiles_xla.gather(kv, blocks, held, 0), counted)
    raised = jnp.exp(logits - log_sums) ** power  # [H, G*R, tile]
    total = jnp.sum(raised.reshape(heads, group, count, -1), axis=2)
    return lax.dynamic_update_slice_in_dim(sums, total, step * total.shape[-1], axis=2)

  sums = jnp.zeros((heads, group, tables.shape[-1] * block_size))
  sums = lax.fori_loop(0, tiles_xla.count_tiles(lengths, block_size), body, sums)
  return sums[..., : columns * block_size]
