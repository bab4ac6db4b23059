"""SnapKV: attention of the prompt's last queries, as that paper has it."""

import dataclasses
from typing import ClassVar, Literal

import jax

from kvc_jax.errors import InputError
from kvc_jax.eviction.score import HeldKVs, Observed, check_attention_rule, mean_over_queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV:
  """Mean attention of the last `queries` prompt tokens, pooled along the keys before them.

  With `Compression(allocation="head", window=queries)` it is SnapKV, with "layer" Ada-KV's scoring, with "pyramid"
  PyramidKV's.

  Source: SnapKV (arXiv 2404.14469), section 4; its LongBench settings are the defaults. Its groups of query heads are
  summed here (their mean, but for a factor), so that each KV head keeps one set. kvpress has queries=64, pooling=5,
  pool="mean". Keys of the observed window itself take no part in the pool and are not protected by the rule: give
  `Compression` a window of at least `queries`.

  Attributes:
    queries: prompt queries observed.
    pooling: width of the pool along keys, odd; 1 for none.
    pool: "max", or "mean" over the width, with zeros beyond the ends.
    decode_every: decode queries at positions that are multiples of it are observed, each counting as many times. The
      paper compresses prompts only.
  """

  observed: ClassVar[Observed] = "last"
  power: ClassVar[int] = 1
  buffer: ClassVar[int] = 0
  pools_observed: ClassVar[bool] = False
  queries: int = 32
  pooling: int = 7
  pool: Literal["max", "mean"] = "max"
  decode_every: int = 2

  def __post_init__(self):
    check_attention_rule(self)
    if self.pool not in ("max", "mean"):
      raise InputError(f"scoring: pool is {self.pool!r}; give 'max' or 'mean'")

  def value(self, kvs: HeldKVs) -> jax.Array:
    return mean_over_queries(kvs, self.buffer)
