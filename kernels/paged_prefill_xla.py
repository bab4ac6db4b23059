"""XLA version of `paged_prefill`: online softmax over tiles of keys."""

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.kernels import tiles_xla

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
  _, heads, _ = k.shape
  queries = q.reshape(tokens, heads, -1, head_dim).astype(jnp.float32) * scale
  queries = queries.transpose(1, 2, 0, 3).reshape(heads, -1, head_dim)  # [H, G*T, D]
  carry = _attend_prefix(tiles_xla.start_softmax(queries), queries, kv, tables[layer, slot], prefix_lengths)
  top, total, acc = _attend_chunk(carry, queries, k, v, count)
  out = (acc / total[..., None]).reshape(heads, -1, tokens, head_dim).transpose(2, 0, 1, 3)
  log_sum = (top + jnp.log(total)).reshape(q_heads, tokens).T
  return out.reshape(q.shape).astype(q.dtype), log_sum


def _attend_prefix(carry, queries, kv, tables, lengths):
  """Every row sees the whole prefix; `tables` [H, M], `lengths` [H]."""
  block_size = kv.shape[2]
  tables = tiles_xla.pad_to_tiles(tables)

  def body(step, carry):
    blocks, held = tiles_xla.tile_of(tables, lengths, step, block_size)
    logits = tiles_xla.logits_of(queries, tiles_xla.gather(kv, blocks, held, 0), held[:, None])
    return tiles_xla.online_softmax(carry, logits, tiles_xla.gather(kv, blocks, held, 1))

  return lax.fori_loop(0, tiles_xla.count_tiles(lengths, block_size), body, carry)


def _attend_chunk(carry, queries, k, v, count):
  """Row t sees rows 0..t of the chunk."""
  tokens, _, _ = k.shape
  tile = min(CHUNK_TILE, tokens)
  spare = -tokens % tile
  keys, values = (
      jnp.pad(x.astype(jnp.float32), ((0, spare), (0, 0), (0, 0))).swapaxes(0, 1) for x in (k, v))
  rows = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), queries.shape[1] // tokens)[:, None]  # [G*T, 1]

  def body(step, carry):
    column = step * tile + jnp.arange(tile, dtype=jnp.int32)
    key_tile = lax.dynamic_slice_in_dim(keys, step * tile, tile, axis=1)
    value_tile = lax.dynamic_slice_in_dim(values, step * tile, tile, axis=1)
    # A padding row sees itself, so no row is empty.
    return tiles_xla.online_softmax(carry, tiles_xla.logits_of(queries, key_tile, column <= rows), value_tile)

  # At least one tile: with nothing seen a padding row would be 0 / 0.
  tiles = lax.div(jnp.maximum(count, 1) + (tile - 1), jnp.int32(tile))
  return lax.fori_loop(0, tiles, body, carry)
