"""KVC-w: attention of the prompt's last queries."""

import dataclasses
from typing import ClassVar, Literal

import jax

from kvc_jax.eviction.score import HeldKVs, Observed, check_attention_rule, mean_over_queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowAttention:
  """Sum of squared attention of the last `queries` prompt tokens, max-pooled along keys.

  Source: KV-Compress (arXiv 2410.00161), KVC-w with w = 8..32; pooling as in SnapKV.

  Attributes:
    queries: w, prompt queries observed.
    power: 2 for squared attention, 1 for plain.
    pooling: width of the max-pool along keys, odd; 1 for none.
    reduction: "sum", or "mean" over the queries that could see the key.
    buffer: newest tokens that a query does not count for.
    decode_every: decode queries at positions that are multiples of it are observed, each
      counting as many times. The paper observes all (1), which makes GPU decode steps that
      score about 3% slower than 2 does.
  """

  observed: ClassVar[Observed] = "last"
  queries: int = 16
  power: int = 2
  pooling: int = 7
  reduction: Literal["sum", "mean"] = "sum"
  buffer: int = 0
  decode_every: int = 2

  def __post_init__(self):
    check_attention_rule(self, self.reduction)

  def value(self, kvs: HeldKVs) -> jax.Array:
    return mean_over_queries(kvs, self.buffer) if self.reduction == "mean" else kvs.scores
