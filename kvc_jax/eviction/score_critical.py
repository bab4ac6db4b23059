"""CriticalKV: attention weighted by what a value does to the layer's output."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.errors import InputError, check_real
from kvc_jax.eviction.score import HeldKVs, LayerKVs, Observed, check_attention_rule

_FIRST = 1e10
"""Above any weighted attention."""
_SPREAD = 1e30
"""Brings the attention of those kept first to a range in which adding `_FIRST` leaves their order."""
_TOGETHER = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV:
  """Mean attention of the last `queries` prompt tokens, pooled as in SnapKV, in two stages.

  A share of the head's budget goes by attention alone; the rest by (attention + epsilon) times the L1 norm of the
  value behind the output projection, averaged over the query heads of the group.

  Source: CriticalKV, "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective" (arXiv
  2502.03805), algorithm 1. With allocation "head" it is that on SnapKV. The first stage is each head's own with any
  allocation; the paper's Ada-KV variant first gives heads their budgets by attention alone.

  Attributes:
    queries: prompt queries observed.
    pooling: width of the max-pool along keys, odd; 1 for none.
    epsilon: added to the attention.
    first_share: of the budget, by attention alone; protected KVs count in it.
    decode_every: as for `WindowAttention`.
  """

  observed: ClassVar[Observed] = "last"
  power: ClassVar[int] = 1
  buffer: ClassVar[int] = 0
  pools_observed: ClassVar[bool] = False
  needs_output: ClassVar[bool] = True
  queries: int = 32
  pooling: int = 7
  epsilon: float = 1e-4
  first_share: float = 0.5
  decode_every: int = 2

  def __post_init__(self):
    check_attention_rule(self)
    check_real("scoring: epsilon", self.epsilon, at_least=0, hint="0 or a small positive number")
    check_real("scoring: first_share", self.first_share, at_least=0, hint="a number from 0 to 1")
    if self.first_share > 1:
      raise InputError(f"scoring: first_share is {self.first_share}; give a number from 0 to 1")

  def look(self, kvs: LayerKVs) -> jax.Array:
    assert kvs.output is not None
    output = kvs.output
    heads, query_heads = kvs.values.shape[0], output.shape[0]
    group = query_heads // heads

    def norms_of(query_head: jax.Array) -> jax.Array:
      weights = output[query_head].astype(jnp.float32)

      def norm(value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(jnp.matmul(value, weights, precision=lax.Precision.HIGHEST)))

      return lax.map(norm, kvs.values[query_head // group], batch_size=_TOGETHER)

    norms = jnp.mean(lax.map(norms_of, jnp.arange(query_heads)).reshape(heads, group, -1), axis=1)
    mean = kvs.scores / (group * jnp.minimum(kvs.num_tokens, self.queries))
    return (mean + self.epsilon) * norms

  def value(self, kvs: HeldKVs) -> jax.Array:
    assert kvs.looked is not None
    assert kvs.held is not None
    assert kvs.evictable is not None
    assert kvs.cache_tokens is not None
    protected = jnp.sum(kvs.held & ~kvs.evictable, axis=-1)
    budget = jnp.floor(self.first_share * kvs.cache_tokens).astype(jnp.int32)[:, None, None]
    attention = jnp.where(kvs.evictable, kvs.scores, -1.0)
    best_first = jnp.lexsort((-kvs.positions, -attention), axis=-1)  # between equal ones the newest
    rank = jnp.argsort(best_first, axis=-1)
    is_first = rank < (budget - protected)[..., None]
    return jnp.where(is_first, _FIRST + _SPREAD * kvs.scores, kvs.looked)
