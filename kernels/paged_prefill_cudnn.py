"""cuDNN version of `paged_prefill`, for Ampere GPUs and newer: flash attention in parts.

The chunk attends itself, causally. The prefix is gathered from the pool in pieces of
a fixed size, as many as the longest head has, so time and memory follow what is held
and not the tables' width. KV heads stand in cuDNN's batch axis, where each may have
a length of its own. Parts are merged by their log-sum-exp.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

# jax.nn.dot_product_attention rounds the log-sum-exp to the queries' dtype: 0.4% of a
# number near 10 is 3% of every weight. The function beneath it gives it in f32.
from jax._src.cudnn import fused_attention_stablehlo as cudnn

_NOTHING = -1e30
"""Log-sum-exp over no keys; finite, so that two of them merge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the prefix is walked.

  Attributes:
    piece: KVs of each head per piece; at least one block.
  """

  piece: int = 16_384


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
    most_prefix: int | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `paged_prefill.paged_prefill`; `interpret` puts XLA's attention in cuDNN's place."""
  del count  # padding rows see what is before them and cost what the others cost
  piece = max(1, min((config or Config()).piece // kv.shape[2], tables.shape[-1])) * kv.shape[2]

  def chunk_only():
    out, log_sum = _attend(q[None], k[None].astype(q.dtype), v[None].astype(q.dtype), None, scale, interpret)
    return out[0], log_sum[0]

  def with_prefix(attend_prefix):
    prefix = attend_prefix(q, kv, tables[layer, slot], prefix_lengths, piece, scale, interpret)
    out, log_sum = _merge(*chunk_only(), *map(_unfold, prefix))
    return out.astype(q.dtype), log_sum

  if most_prefix == 0:
    return chunk_only()
  if most_prefix is not None and min(most_prefix, tables.shape[-1] * kv.shape[2]) <= piece:
    return with_prefix(_one_piece)
  # The chunk's own attention stands in each branch: a branch that hands it through would copy it.
  return lax.switch(
      jnp.minimum(_count_pieces(prefix_lengths, piece), 2),
      (chunk_only, lambda: with_prefix(_one_piece), lambda: with_prefix(_many_pieces)))


def bound_of_prefix(tokens: int, config: Config | None = None) -> int | None:
  """See `paged_prefill.bound_of_prefix`: nothing, one piece, or more than can be known."""
  piece = (config or Config()).piece
  return 0 if tokens == 0 else piece if tokens <= piece else None


def _attend(q, k, v, lengths, scale, interpret):
  """Output [B, T, N, D] and its log-sum-exp f32 [B, T, N].

  q is [B, T, N, D], k and v [B, K, N / G, D]. `lengths` i32 [B]: every row sees
  that many keys, and what a batch entry without keys gives means nothing. None:
  row t sees keys 0..t.
  """
  causal = lengths is None
  if interpret:
    out, log_sum = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla",
        return_residual=True)
    return out, log_sum.astype(jnp.float32)
  batch, tokens, _, _ = q.shape
  out, log_sum = cudnn.dot_product_attention(
      q, k, v, q_seqlen=None if causal else jnp.full((batch,), tokens, jnp.int32), kv_seqlen=lengths, scale=scale,
      mask_type=cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.PADDING, return_residual=True)
  return out, log_sum.swapaxes(1, 2)


def _count_pieces(lengths, piece):
  """Pieces that the longest head has, i32 []."""
  return lax.div(jnp.max(lengths) + (piece - 1), jnp.int32(piece))


def _one_piece(q, kv, tables, lengths, piece, scale, interpret):
  """Attention over a prefix of at most `piece` KVs: output [H, T, G, D], log-sum-exp f32 [H, T, G].

  q is [T, H*G, D], kv [N, 2, P, D], tables i32 [H, M], lengths i32 [H].
  """
  heads, _ = tables.shape
  ids = tables[:, : piece // kv.shape[2]]
  keys, values = (_gather(kv, ids, lengths, which).astype(q.dtype) for which in (0, 1))
  out, log_sum = _attend(_fold(q, heads), keys, values, lengths, scale, interpret)
  held = lengths[:, None, None] > 0
  return jnp.where(held[..., None], out, 0), jnp.where(held, log_sum, _NOTHING)


def _many_pieces(q, kv, tables, lengths, piece, scale, interpret):
  """`_one_piece` for a prefix of any length; its output is f32."""
  heads, columns = tables.shape
  blocks = piece // kv.shape[2]
  tables = jnp.pad(tables, ((0, 0), (0, -columns % blocks)))

  def body(step, carry):
    ids = lax.dynamic_slice_in_dim(tables, step * blocks, blocks, axis=1)
    left = jnp.clip(lengths - step * piece, 0, piece)
    return _merge(*carry, *_one_piece(q, kv, ids, left, piece, scale, interpret))

  out = jnp.zeros(_fold(q, heads).shape, jnp.float32)
  return lax.fori_loop(
      0, _count_pieces(lengths, piece), body, (out, jnp.full(out.shape[:-1], _NOTHING, jnp.float32)))


def _gather(kv, ids, lengths, which):
  """Keys (`which` = 0) or values (1) of blocks [H, J]: [H, J*P, 1, D], 0 from each head's length on."""
  rows = kv[ids, which].reshape(ids.shape[0], -1, 1, kv.shape[-1])
  held = jnp.arange(rows.shape[1], dtype=jnp.int32) < lengths[:, None]
  # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
  return jnp.where(held[..., None, None], rows, 0)


def _fold(x, heads):
  """[T, H*G, D] -> [H, T, G, D]."""
  tokens, _, head_dim = x.shape
  return x.reshape(tokens, heads, -1, head_dim).swapaxes(0, 1)


def _unfold(x):
  """[H, T, G, ...] -> [T, H*G, ...]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _merge(out, log_sum, part, part_log_sum):
  """Attention over two sets of keys from that over each: outputs [..., D] (f32 out), log-sum-exps f32 [...]."""
  total = jnp.logaddexp(log_sum, part_log_sum)
  return (out.astype(jnp.float32) * jnp.exp(log_sum - total)[..., None]
          + part.astype(jnp.float32) * jnp.exp(part_log_sum - total)[..., None]), total
