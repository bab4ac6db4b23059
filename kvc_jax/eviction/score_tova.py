"""TOVA: what the last token attends to."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.eviction.score import HeldKVs, LayerKVs, Observed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA:
  """Attention of the newest query alone, averaged over all query heads of the layer.

  That is the prompt's last token, or behind it the last decoded one. A head that no longer holds a token
  counts with attention 0.

  Source: TOVA, "Transformers are Multi-State RNNs" (arXiv 2401.06104), section 3.2; to follow it give `Compression`
  allocation "head" and interval 1. The newest token itself is protected by the window here.
  """

  observed: ClassVar[Observed] = "last"
  queries: ClassVar[int] = 1
  power: ClassVar[int] = 1
  buffer: ClassVar[int] = 0
  pooling: ClassVar[int] = 1
  decode_every: ClassVar[int] = 1

  def look(self, kvs: LayerKVs) -> jax.Array:
    heads = kvs.keys.shape[0]
    if kvs.queries is None or kvs.log_sums is None:
      raise ValueError("TOVA: this cache keeps no decode queries; give CacheConfig num_heads")
    group = kvs.queries.shape[0] // heads
    queries = kvs.queries.reshape(heads, group, -1)
    logits = jnp.einsum("hgd,hkd->hgk", queries, kvs.keys, precision=lax.Precision.HIGHEST)
    newest = jnp.sum(jnp.exp(logits - kvs.log_sums.reshape(heads, group, 1)), axis=1)
    # A sequence that has decoded nothing has the sums of its prompt's last token.
    attention = jnp.where(jnp.isfinite(kvs.log_sums[0]), newest, kvs.scores)
    return _sum_by_position(jnp.where(kvs.held, attention, 0.0), kvs) / (heads * group)

  def value(self, kvs: HeldKVs) -> jax.Array:
    assert kvs.looked is not None
    return kvs.looked


def _sum_by_position(attention: jax.Array, kvs: LayerKVs) -> jax.Array:
  """Sums attention [H, K] over the heads that hold the same token."""
  last = jnp.iinfo(jnp.int32).max
  positions = jnp.where(kvs.held, kvs.positions, last)

  def aligned() -> jax.Array:
    return jnp.broadcast_to(jnp.sum(attention, axis=0), attention.shape)

  def apart() -> jax.Array:
    flat = positions.reshape(-1)
    order = jnp.argsort(flat)
    ordered = flat[order]
    segment = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (ordered[1:] != ordered[:-1]).astype(jnp.int32)]))
    sums = jax.ops.segment_sum(attention.reshape(-1)[order], segment, num_segments=flat.size)
    return jnp.zeros(flat.size).at[order].set(sums[segment]).reshape(attention.shape)

  return lax.cond(jnp.all(positions == positions[0]), aligned, apart)
