"""XLA version of `paged_decode`: the contract of the op, and the CPU path.

An online softmax over tiles of blocks: temporaries do not grow with the number of KVs.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.kernels import tiles_xla
from kvc_jax.kernels.observed import Observed


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    observed: Observed | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
    every: int = 1,
) -> tuple[jax.Array, Observed | None]:
  """See `paged_decode.paged_decode`."""
  tables, lengths = tiles_xla.pad_to_tiles(tables[layer]), lengths[layer]  # [S, H, M], [S, H]
  out, log_sums = _attend(_grouped(q, lengths, scale), kv, tables, lengths)
  if observed is not None:
    observed = _add_scores(observed, kv, tables, lengths, layer, scale=scale, power=power, buffer=buffer,
                           every=every)
    observed = _observe(observed, layer, q, log_sums, lengths)
  return out.reshape(q.shape).astype(q.dtype), observed


def _grouped(q, lengths, scale):
  """Queries [S, H*G, D], scaled, as f32 [S, H, G, D]."""
  return q.reshape(*lengths.shape, -1, q.shape[-1]).astype(jnp.float32) * scale


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


def _add_scores(observed, kv, tables, lengths, layer, *, scale, power, buffer, every):
  """Adds the probabilities of the observed queries, whose log-sum-exp is known."""
  queries = _grouped(observed.queries[layer], lengths, scale)
  log_sums = observed.log_sums[layer].reshape(queries.shape[:3])[..., None]
  block_size = kv.shape[2]
  counts = observed.query_positions % every == 0
  last_counted = jnp.where(counts, observed.query_positions - buffer, -1)[:, None, None]

  def body(step, scores):
    blocks, held = tiles_xla.tile_of(tables, lengths, step, block_size)
    # Masked before the exponential: an uncounted key may lie above the log-sum-exp.
    counted = held & (observed.positions[blocks].reshape(held.shape) <= last_counted)
    logits = tiles_xla.logits_of(queries, tiles_xla.gather(kv, blocks, held, 0), counted[:, :, None])
    gain = jnp.sum(jnp.exp(logits - log_sums) ** power, axis=2)  # [S, H, tile]
    gain = jnp.where(counted, gain * every, 0.0).reshape(*blocks.shape, block_size)
    # A block belongs to one head: no two gains meet, but in the null block (0).
    return scores.at[blocks].add(gain)

  scores = lax.fori_loop(0, tiles_xla.count_tiles(lengths, block_size), body, observed.scores)
  return observed._replace(scores=scores)


def _observe(observed, layer, q, log_sums, lengths):
  """Leaves the queries and their log-sum-exp for the next step; a head that holds nothing keeps the old ones."""
  heads = q.shape[1] // lengths.shape[1]
  some = jnp.repeat(lengths > 0, heads, axis=1)  # [S, H*G]
  queries = jnp.where(some[..., None], q.astype(observed.queries.dtype), observed.queries[layer])
  log_sums = jnp.where(some, log_sums.reshape(some.shape), observed.log_sums[layer])
  return observed._replace(
      queries=observed.queries.at[layer].set(queries), log_sums=observed.log_sums.at[layer].set(log_sums))
