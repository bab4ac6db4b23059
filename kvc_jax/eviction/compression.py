"""The user's request for compression: budget, protection, scoring, allocation, schedule."""

import dataclasses
import math

from kvc_jax.errors import InputError, check_count, check_real
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import Allocation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
  """How a sequence's cache is compressed.

  Give a rate, or a size, or both (the smaller budget then holds). Budgets count
  whole blocks: ceil(C / P) for each head that shares the budget.

  Attributes:
    rate: r >= 1; of the KVs outside the protected window 1/r stay. Computed from
      the sequence's true length, so compressing again does not compound.
    max_cache_tokens: C, tokens per head that may stay (average over the heads
      that share a budget).
    window: newest tokens of every head that are never evicted.
    sinks: first tokens of every head that are never evicted.
    scoring: what a KV is worth.
    allocation: heads that share a budget: "all" of the sequence (KV-Compress),
      those of a "layer" (as Ada-KV), or each "head" alone (as SnapKV).
    interval: decode steps from one compression to the next; None compresses
      once, after the prompt.
  """

  rate: float | None = None
  max_cache_tokens: int | None = None
  window: int = 32
  sinks: int = 0
  scoring: ScoringRule = WindowAttention()  # noqa: RUF009 (frozen)
  allocation: Allocation = "all"
  interval: int | None = None

  def __post_init__(self):
    if self.rate is None and self.max_cache_tokens is None:
      raise InputError("Compression: give a rate or max_cache_tokens")
    if self.rate is not None:
      check_real("Compression: rate", self.rate, at_least=1, hint="a number of at least 1 (8 keeps one KV in eight)")
    check_count("Compression: window", self.window, at_least=1)
    check_count("Compression: sinks", self.sinks, at_least=0)
    if self.max_cache_tokens is not None:
      check_count("Compression: max_cache_tokens", self.max_cache_tokens, at_least=1)
    if self.max_cache_tokens is not None and self.max_cache_tokens < self.window + self.sinks:
      raise InputError(
          f"Compression: max_cache_tokens ({self.max_cache_tokens}) is below window + sinks "
          f"({self.window} + {self.sinks}), which are never evicted; raise it or shrink the window")
    known = isinstance(self.scoring, ScoringRule) and self.scoring.observed in ("none", "last", "all")
    if not known or isinstance(self.scoring, type):
      raise InputError(
          f"Compression: scoring is {self.scoring!r}, which is no scoring rule; give an object such as "
          "WindowAttention(), or one of your own with the attributes of ScoringRule")
    if self.allocation not in ("all", "layer", "head"):
      raise InputError(f"Compression: allocation is {self.allocation!r}; give 'all', 'layer' or 'head'")
    if self.interval is not None:
      check_count("Compression: interval", self.interval, at_least=1, hint=" decode steps, or None for once")

  def cache_tokens(self, num_tokens: int) -> int:
    """Budget C, tokens per head, of a sequence that has seen `num_tokens`."""
    budgets = [num_tokens]
    if self.rate is not None:
      window = min(self.window, num_tokens)
      budgets.append(window + math.ceil((num_tokens - window) / self.rate))
    if self.max_cache_tokens is not None:
      budgets.append(self.max_cache_tokens)
    return min(budgets)
