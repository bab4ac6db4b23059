"""KVC-full: attention of all queries."""

import dataclasses
from typing import ClassVar, Literal

import jax

from kvc_jax.eviction.score import HeldKVs, Observed, check_attention_rule, mean_over_queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullAttention:
  """Sum of squared attention of every query, no pooling.

  A query counts for a key only when key position <= query position - buffer:
  a token's own and its near neighbours' attention say little about its worth.

  Source: KV-Compress (arXiv 2410.00161), KVC-full; with power 1 and buffer 0
  the accumulated score of H2O.

  Attributes:
    power: 2 for squared attention, 1 for plain.
    reduction: "sum", or "mean" over the queries that counted for the key.
    buffer: newest tokens that a query does not count for.
    decode_every: decode queries at positions that are multiples of it are observed, each
      counting as many times. The paper observes all (1), which makes GPU decode steps that
      score about 3% slower than 2 does.
  """

  observed: ClassVar[Observed] = "all"
  queries: ClassVar[int] = 0
  pooling: ClassVar[int] = 1
  power: int = 2
  reduction: Literal["sum", "mean"] = "sum"
  buffer: int = 10
  decode_every: int = 2

  def __post_init__(self):
    check_attention_rule(self, self.reduction)

  def value(self, kvs: HeldKVs) -> jax.Array:
    return mean_over_queries(kvs, self.buffer) if self.reduction == "mean" else kvs.scores
