"""cuDNN version of `paged_prefill`, for Ampere GPUs and newer: flash attention in two parts.

The chunk attends itself, causally. Then the prefix is gathered from the pool in
pieces of a fixed size, as many as the longest head has, so time and memory follow
what is held and not the tables' width. KV heads stand in cuDNN's batch axis, where
each may have a length of its own. Parts are merged by their log-sum-exp.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

# jax.nn.dot_product_attention rounds the log-sum-exp to the queries' dtype: 0.4% of a
# number near 10 is 3% of every weight. The function beneath it gives it in f32.
from jax._src.cudnn import fused_attention_stablehlo as cudnn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the prefix is walked.

  Attributes:
    piece: KVs of each head per piece; at least one block.
  """

  piece: int = 8192


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
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `paged_prefill.paged_prefill`; `interpret` puts XLA's attention in cuDNN's place."""
  del count  # padding rows see what is before them and cost what the others cost
  tokens, heads, _ = k.shape

  def chunk_only():
    out, log_sum = _attend(q[None], k[None].astype(q.dtype), v[None].astype(q.dtype), None, scale, interpret)
    return out[0], log_sum.reshape(heads, -1, tokens)  # [H, G, T]

  def with_prefix():
    return _add_prefix(
        *chunk_only(), q, kv, tables[layer, slot], prefix_lengths, scale, config or Config(), interpret)

  # The chunk's own attention stands in both branches: a branch that hands it through would copy it.
  out, log_sum = lax.cond(jnp.any(prefix_lengths > 0), with_prefix, chunk_only)
  return out, log_sum.reshape(-1, tokens).T


def _attend(q, k, v, lengths, scale, interpret):
  """Output [B, T, N, D] and its log-sum-exp f32 [B, N, T].

  q is [B, T, N, D], k and v [B, K, N / G, D]. `lengths` i32 [B]: every row sees
  that many keys, and what a batch entry without keys gives means nothing. None:
  row t sees keys 0..t.
  """
  causal = lengths is None
  if interpret:
    out, log_sum = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla",
        return_residual=True)
    return out, log_sum.swapaxes(1, 2).astype(jnp.float32)
  batch, tokens = q.shape[:2]
  return cudnn.dot_product_attention(
      q, k, v, q_seqlen=None if causal else jnp.full((batch,), tokens, jnp.int32), kv_seqlen=lengths, scale=scale,
      mask_type=cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.PADDING, return_residual=True)


def _add_prefix(out, log_sum, q, kv, tables, lengths, scale, config, interpret):
  """Merges attention over the prefix into the chunk's own.

  Args:
    out: [T, H*G, D] over the chunk alone.
    log_sum: f32 [H, G, T] of it.
    q: [T, H*G, D].
    kv: [N, 2, P, D].
    tables: i32 [H, M].
    lengths: i32 [H] KVs of the prefix.
    scale: factor on q k^T.
    config: sizes.
    interpret: as in `paged_prefill`.

  Returns:
    Output [T, H*G, D] and log-sum-exp [H, G, T] over prefix and chunk.
  """
  heads, columns = tables.shape
  block_size = kv.shape[2]
  blocks = max(1, min(config.piece // block_size, columns))
  piece = blocks * block_size
  tables = jnp.pad(tables, ((0, 0), (0, -columns % blocks)))
  queries = _fold(q, heads)

  def body(step, carry):
    out, log_sum = carry
    ids = lax.dynamic_slice_in_dim(tables, step * blocks, blocks, axis=1)
    left = jnp.clip(lengths - step * piece, 0, piece)
    keys, values = (_gather(kv, ids, left, which).astype(q.dtype) for which in (0, 1))
    part, part_log_sum = _attend(queries, keys, values, left, scale, interpret)
    return _merge(out, log_sum, part, jnp.where(left[:, None, None] > 0, part_log_sum, -jnp.inf))

  steps = lax.div(jnp.max(lengths) + (piece - 1), jnp.int32(piece))
  out, log_sum = lax.fori_loop(0, steps, body, (_fold(out, heads).astype(jnp.float32), log_sum))
  return out.astype(q.dtype).swapaxes(0, 1).reshape(q.shape), log_sum


def _fold(x, heads):
  """[T, H*G, D] -> [H, T, G, D]."""
  tokens, _, head_dim = x.shape
  return x.reshape(tokens, heads, -1, head_dim).swapaxes(0, 1)


def _gather(kv, ids, lengths, which):
  """Keys (`which` = 0) or values (1) of blocks [H, J]: [H, J*P, 1, D], 0 from each head's length on."""
  rows = kv[ids, which].reshape(ids.shape[0], -1, 1, kv.shape[-1])
  held = jnp.arange(rows.shape[1], dtype=jnp.int32) < lengths[:, None]
  # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
  return jnp.where(held[..., None, None], rows, 0)


def _merge(out, log_sum, part, part_log_sum):
  """Two outputs [H, T, G, D] and log-sum-exps [H, G, T] of the same queries over two sets of keys.

  A part with log-sum-exp -inf counts for nothing, whatever it holds.
  """
  total = jnp.logaddexp(log_sum, part_log_sum)
  kept, gained = (jnp.exp(x - total).swapaxes(1, 2)[..., None] for x in (log_sum, part_log_sum))  # [H, T, G, 1]
  return out * kept + jnp.where(gained > 0, part.astype(jnp.float32) * gained, 0.0), total
