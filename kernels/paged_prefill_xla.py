"""XLA version of `paged_prefill`: online softmax over tiles of keys."""

import jax
import jax.numpy as jnp
from jax import lax

TILE_BLOCKS = 16
CHUNK_TILE = 256


def paged_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    prefix_lengths: jax.Array,
    layer: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
  """See `paged_prefill.paged_prefill`."""
  tokens, q_heads, head_dim = q.shape
  heads = k.shape[1]
  queries = q.reshape(tokens, heads, -1, head_dim).astype(jnp.float32) * scale
  queries = queries.transpose(1, 2, 0, 3)  # [H, G, T, D]
  start = (jnp.full(queries.shape[:3], -jnp.inf), jnp.zeros(queries.shape[:3]), jnp.zeros(queries.shape))
  carry = _attend_prefix(start, queries, kv, tables[layer, slot], prefix_lengths)
  top, total, acc = _attend_chunk(carry, queries, k, v, count)
  out = (acc / total[..., None]).transpose(2, 0, 1, 3).reshape(q.shape)
  log_sum = (top + jnp.log(total)).transpose(2, 0, 1).reshape(tokens, q_heads)
  return out.astype(q.dtype), log_sum


def _attend_prefix(carry, queries, kv, table, lengths):
  """Every row sees the whole prefix; `table` [H, M], `lengths` [H]."""
  heads = table.shape[0]
  table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % TILE_BLOCKS)))
  tile = TILE_BLOCKS * kv.shape[2]

  def body(step, carry):
    blocks = lax.dynamic_slice_in_dim(table, step * TILE_BLOCKS, TILE_BLOCKS, axis=1)
    held = step * tile + jnp.arange(tile, dtype=jnp.int32) < lengths[:, None]  # [H, tile]
    rows = kv[blocks].swapaxes(1, 2).reshape(heads, 2, tile, -1).astype(jnp.float32)
    rows = jnp.where(held[:, None, :, None], rows, 0.0)
    return _online_softmax(carry, queries, rows[:, 0], rows[:, 1], held[:, None, None])

  tiles = lax.div(jnp.max(lengths) + (tile - 1), jnp.int32(tile))
  return lax.fori_loop(0, tiles, body, carry)


def _attend_chunk(carry, queries, k, v, count):
  """Row t sees rows 0..t of the chunk."""
  tokens = k.shape[0]
  tile = min(CHUNK_TILE, tokens)
  spare = -tokens % tile
  keys, values = (
      jnp.pad(x.astype(jnp.float32), ((0, spare), (0, 0), (0, 0))).swapaxes(0, 1) for x in (k, v))
  row = jnp.arange(tokens, dtype=jnp.int32)[:, None]

  def body(step, carry):
    column = step * tile + jnp.arange(tile, dtype=jnp.int32)
    seen = column <= row  # [T, tile]; a padding row sees itself, so no row is empty
    key_tile = lax.dynamic_slice_in_dim(keys, step * tile, tile, axis=1)
    value_tile = lax.dynamic_slice_in_dim(values, step * tile, tile, axis=1)
    return _online_softmax(carry, queries, key_tile, value_tile, seen)

  # At least one tile: with nothing seen a padding row would be 0 / 0.
  tiles = lax.div(jnp.maximum(count, 1) + (tile - 1), jnp.int32(tile))
  return lax.fori_loop(0, tiles, body, carry)


def _online_softmax(carry, queries, keys, values, seen):
  """Adds a tile of keys and values [H, tile, D] to running (max, sum, output)."""
  top, total, acc = carry
  logits = jnp.einsum("hgtd,hsd->hgts", queries, keys, precision=lax.Precision.HIGHEST)
  logits = jnp.where(seen, logits, -jnp.inf)
  new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
  safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
  weights = jnp.exp(logits - safe[..., None])
  decay = jnp.exp(top - safe)
  acc = acc * decay[..., None] + jnp.einsum("hgts,hsd->hgtd", weights, values, precision=lax.Precision.HIGHEST)
  return new_top, total * decay + jnp.sum(weights, axis=-1), acc
