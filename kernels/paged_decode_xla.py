"""XLA version of `paged_decode`: the contract of the op, and the CPU path.

An online softmax over tiles of blocks, so that temporaries do not grow with the
number of KVs and time follows the longest head, not the table's width.
"""

import jax
import jax.numpy as jnp
from jax import lax

TILE_BLOCKS = 16


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    scores: jax.Array | None = None,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
  """See `paged_decode.paged_decode`."""
  table, length = tables[layer], lengths[layer]  # [S, H, M], [S, H]
  seqs, heads, _ = table.shape
  table = _padded(table)
  queries = q.reshape(seqs, heads, -1, q.shape[-1]).astype(jnp.float32) * scale
  tiles = _num_tiles(length, kv.shape[2])
  out, log_sum = _attend(queries, kv, table, length, tiles)
  if scores is not None:
    scores = _add_scores(queries, log_sum, kv, table, length, tiles, scores, positions, query_positions,
                         power=power, buffer=buffer)
  return out.reshape(q.shape).astype(q.dtype), scores


def _padded(table: jax.Array) -> jax.Array:
  """Widens the tables to whole tiles; the padding is the null block, 0."""
  spare = -table.shape[-1] % TILE_BLOCKS
  return jnp.pad(table, ((0, 0), (0, 0), (0, spare)))


def _num_tiles(length: jax.Array, block_size: int) -> jax.Array:
  tile = TILE_BLOCKS * block_size
  return lax.div(jnp.max(length) + (tile - 1), jnp.int32(tile))


def _tile(kv: jax.Array, table: jax.Array, length: jax.Array, step: jax.Array, which: int):
  """Keys (which = 0) or values (1) of a tile [S, H, tile, D], and which of them are held."""
  seqs, heads, _ = table.shape
  blocks = lax.dynamic_slice_in_dim(table, step * TILE_BLOCKS, TILE_BLOCKS, axis=2)
  tile = TILE_BLOCKS * kv.shape[2]
  held = step * tile + jnp.arange(tile, dtype=jnp.int32) < length[..., None]
  rows = kv[blocks, which].reshape(seqs, heads, tile, -1).astype(jnp.float32)
  # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
  return jnp.where(held[..., None], rows, 0.0), held, blocks


def _logits(queries: jax.Array, keys: jax.Array, held: jax.Array) -> jax.Array:
  logits = jnp.einsum("shgd,shtd->shgt", queries, keys, precision=lax.Precision.HIGHEST)
  return jnp.where(held[:, :, None], logits, -jnp.inf)


def _attend(queries, kv, table, length, tiles):
  """Online softmax; output f32 [S, H, G, D] and log-sum-exp [S, H, G] (0 for an empty head)."""

  def body(step, carry):
    top, total, acc = carry
    keys, held, _ = _tile(kv, table, length, step, 0)
    values, _, _ = _tile(kv, table, length, step, 1)
    logits = _logits(queries, keys, held)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
    weights = jnp.exp(logits - safe[..., None])
    decay = jnp.exp(top - safe)
    acc = acc * decay[..., None] + jnp.einsum(
        "shgt,shtd->shgd", weights, values, precision=lax.Precision.HIGHEST)
    return new_top, total * decay + jnp.sum(weights, axis=-1), acc

  start = (jnp.full(queries.shape[:3], -jnp.inf), jnp.zeros(queries.shape[:3]), jnp.zeros(queries.shape))
  top, total, acc = lax.fori_loop(0, tiles, body, start)
  some = total > 0
  out = jnp.where(some[..., None], acc / jnp.where(some, total, 1.0)[..., None], 0.0)
  log_sum = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), 0.0)
  return out, log_sum


def _add_scores(queries, log_sum, kv, table, length, tiles, scores, positions, query_positions,
                *, power, buffer):
  last_counted = (query_positions - buffer)[:, None, None]

  def body(step, scores):
    keys, held, blocks = _tile(kv, table, length, step, 0)
    probabilities = jnp.exp(_logits(queries, keys, held) - log_sum[..., None])
    gain = jnp.sum(probabilities**power, axis=2)  # [S, H, tile]
    counted = held & (positions[blocks].reshape(held.shape) <= last_counted)
    gain = jnp.where(counted, gain, 0.0).reshape(*blocks.shape, -1)
    # A block belongs to one head: no two gains meet, but in the null block (0).
    return scores.at[blocks].add(gain)

  return lax.fori_loop(0, tiles, body, scores)
