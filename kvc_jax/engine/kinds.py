"""Kinds of requests: those of one kind run the same compiled programs."""

import itertools
from collections.abc import Iterable
from typing import Any

from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.eviction.shares import Allocation


def kinds_of(rules: Iterable[ScoringRule], allocations: Iterable[Allocation]) -> list[Compression | None]:
  """Uncompressed, and each rule with each allocation, compressed once and again."""
  return [None, *(
      Compression(max_cache_tokens=1, window=1, interval=None if rule.observed == "moments" else 1, scoring=rule,
                  allocation=allocation)
      for rule, allocation in itertools.product(rules, allocations))]


def kind_of(compression: Compression) -> tuple[Any, ...]:
  """What tells requests apart whose compression runs other programs."""
  return compression.scoring, compression.allocation, compression.mass is not None


def smallest_of(compression: Compression) -> Compression:
  """A request of the same kind that a prompt of one token can have."""
  return Compression(
      max_cache_tokens=1, window=1, scoring=compression.scoring, allocation=compression.allocation,
      interval=1 if compression.scores_decode else None, mass=None if compression.mass is None else 0.5)
