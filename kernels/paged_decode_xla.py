"""XLA version of `paged_decode`: the contract of the op, and the CPU path.

An online softmax over tiles of blocks: temporaries do not grow with the number of KVs.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.kernels import tiles_xla


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
  tables, lengths = tiles_xla.pad_to_tiles(tables[layer]), lengths[layer]  # [S, H, M], [S, H]
  seqs, heads = lengths.shape
  queries = q.reshape(seqs, heads, -1, q.shape[-1]).astype(jnp.float32) * scale  # [S, H, G, D]
  out, log_sum = _attend(queries, kv, tables, lengths)
  if scores is not None:
    scores = _add_scores(queries, log_sum, kv, tables, lengths, scores, positions, query_positions,
                         power=power, buffer=buffer)
  return out.reshape(q.shape).astype(q.dtype), scores


def _attend(queries, kv, tables, lengths):
  """Output f32 [S, H, G, D] and log-sum-exp [S, H, G]; 0 for an empty head."""
  block_size = kv.shape[2]

  def body(step, carry):
    blocks, held = tiles_xla.tile_of(tables, lengths, step, block_size)
    logits = tiles_xla.logits_of(queries, tiles_xla.gather(kv, blocks, held, 0), held[:, :, None])
    return tiles_xla.online_softmax(carry, logits, tiles_xla.gather(kv, blocks, held, 1))

  tiles = tiles_xla.count_tiles(lengths, block_size)
  top, total, acc = lax.fori_loop(0, tiles, body, tiles_xla.start_softmax(queries))
  some = total > 0
  out = jnp.where(some[..., None], acc / jnp.where(some, total, 1.0)[..., None], 0.0)
  return out, jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), 0.0)


def _add_scores(queries, log_sum, kv, tables, lengths, scores, positions, query_positions, *, power, buffer):
  block_size = kv.shape[2]
  last_counted = (query_positions - buffer)[:, None, None]

  def body(step, scores):
    blocks, held = tiles_xla.tile_of(tables, lengths, step, block_size)
    logits = tiles_xla.logits_of(queries, tiles_xla.gather(kv, blocks, held, 0), held[:, :, None])
    gain = jnp.sum(jnp.exp(logits - log_sum[..., None]) ** power, axis=2)  # [S, H, tile]
    counted = held & (positions[blocks].reshape(held.shape) <= last_counted)
    gain = jnp.where(counted, gain, 0.0).reshape(*blocks.shape, block_size)
    # A block belongs to one head: no two gains meet, but in the null block (0).
    return scores.at[blocks].add(gain)

  return lax.fori_loop(0, tiles_xla.count_tiles(lengths, block_size), body, scores)
