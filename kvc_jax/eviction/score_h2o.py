"""H2O: heavy hitters."""

import dataclasses

from kvc_jax.eviction.score_full import FullAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(FullAttention):
  """Attention of every query so far, summed: prompt and decode queries alike.

  Source: H2O (arXiv 2306.14048), algorithm 1. The paper splits its budget evenly between heavy hitters and the newest
  tokens: give `Compression` half of the budget as window, allocation "head" and interval 1 to follow it.

  Attributes:
    power: 1, plain attention.
    reduction: "sum"; "mean" over the queries that could see the key is kvpress's ObservedAttention.
    buffer: 0, every query counts for every key that it sees.
    decode_every: 1, every decode query is observed.
  """

  power: int = 1
  buffer: int = 0
  decode_every: int = 1
