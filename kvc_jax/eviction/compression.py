"""The user's request for compression: budget, protection, scoring, allocation, schedule."""

import dataclasses
import math

from kvc_jax.errors import InputError, check_count, check_real
from kvc_jax.eviction.names import ALLOCATIONS
from kvc_jax.eviction.score import ScoringRule, check_rule
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.shares import Allocation, is_allocation

MOST_KEPT_RANGES = 8
"""Of one request: their number is part of the eviction step's shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
  """How a sequence's cache is compressed.

  Give a rate, a size or a share of the scores, or several (the smallest budget then
  holds). Budgets count whole blocks: ceil(C / P) for each head that shares the budget.

  Attributes:
    rate: r >= 1; of the KVs outside the protected window 1/r stay. Computed from
      the sequence's true length, so compressing again does not compound.
    max_cache_tokens: C, tokens per head that may stay (average over the heads
      that share a budget).
    window: newest tokens of every head that are never evicted.
    sinks: first tokens of every head that are never evicted.
    scoring: what a KV is worth.
    allocation: heads that share a budget: "all" of the sequence (KV-Compress),
      those of a "layer" (as Ada-KV), or each "head" alone (as SnapKV); "pyramid" gives each head a
      budget of its own that falls from layer to layer (PyramidKV), a `HeadProfile` one from a file.
    interval: decode steps from one compression to the next; None compresses
      once, after the prompt.
    keep: ranges (start, end) of token positions that are never evicted, such as a
      system prompt's; at most 8. Where they are more than the budget, they stay.
    prefill_interval: prompt tokens from one compression to the next while the prompt
      is prefilled. None compresses a prompt once, behind its end, unless it is larger
      than the pool.
    on_demand: an engine that is short of memory may compress the request down to its
      budget at any time, instead of making it wait. Its text then depends on what
      else is served.
    mass: the smallest cache that keeps this share (0 to 1) of the sum of scores, in each group of
      heads that share a budget: of the attention observed, with a rule of power 1. Protected KVs
      count. How much that is depends on the prompt, so an engine admits the request as if nothing were evicted.
      Behind the prompt only: a second compression would take the share of what the first one left.
    safeguard: share of the budget that every head keeps at least where heads compete; Ada-KV's is 0.2.
  """

  rate: float | None = None
  max_cache_tokens: int | None = None
  window: int = 32
  sinks: int = 0
  scoring: ScoringRule = WindowAttention()  # noqa: RUF009 (frozen)
  allocation: Allocation = "all"
  interval: int | None = None
  keep: tuple[tuple[int, int], ...] | list[tuple[int, int]] = ()
  prefill_interval: int | None = None
  on_demand: bool = False
  mass: float | None = None
  safeguard: float = 0.0

  def __post_init__(self):
    if self.rate is None and self.max_cache_tokens is None and self.mass is None:
      raise InputError("Compression: give a rate or max_cache_tokens, or mass")
    if self.rate is not None:
      check_real("Compression: rate", self.rate, at_least=1, hint="a number of at least 1 (8 keeps one KV in eight)")
    check_count("Compression: window", self.window, at_least=1)
    check_count("Compression: sinks", self.sinks, at_least=0)
    if self.max_cache_tokens is not None:
      check_count("Compression: max_cache_tokens", self.max_cache_tokens, at_least=1)
    self._check_keep()
    if self.max_cache_tokens is not None and self.max_cache_tokens < self.window + self.sinks:
      raise InputError(
          f"Compression: max_cache_tokens ({self.max_cache_tokens}) is below window + sinks "
          f"({self.window} + {self.sinks}), which are never evicted; raise it or shrink the window")
    check_rule(self.scoring)
    if not is_allocation(self.allocation):
      raise InputError(
          f"Compression: allocation is {self.allocation!r}; give one of {', '.join(ALLOCATIONS)}, or a HeadProfile")
    self._check_mass_and_safeguard()
    if self.interval is not None:
      check_count("Compression: interval", self.interval, at_least=1, hint=" decode steps, or None for once")
    if self.prefill_interval is not None:
      check_count("Compression: prefill_interval", self.prefill_interval, at_least=1, hint=" tokens, or None")
    if self.scoring.observed == "moments" and self.scores_decode:
      raise InputError(
          f"Compression: {type(self.scoring).__name__} scores prompts alone; leave interval and on_demand out")
    if not isinstance(self.on_demand, bool):
      raise InputError(f"Compression: on_demand is {self.on_demand!r}; give True or False")

  def _check_mass_and_safeguard(self):
    for name in ("mass", "safeguard"):
      share = getattr(self, name)
      if share is not None:
        check_real(f"Compression: {name}", share, at_least=0, hint="a number from 0 to 1")
        if share > 1:
          raise InputError(f"Compression: {name} is {share}; give a number from 0 to 1")
    if self.mass is not None and self.scoring.observed == "none":
      raise InputError(
          f"Compression: mass is a share of the scores, but {type(self.scoring).__name__} keeps none; give a rule that "
          "observes queries, or a rate")
    if self.mass is not None and (self.interval, self.prefill_interval, self.on_demand) != (None, None, False):
      raise InputError(
          "Compression: mass is a share of the scores held, and a second compression would take it of what the first "
          "one left; leave interval, prefill_interval and on_demand out, or give a rate instead")
    if self.safeguard and self.allocation not in ("all", "layer"):
      raise InputError("Compression: safeguard is for allocations in which heads compete; give all or layer")

  def _check_keep(self):
    pairs = self.keep if isinstance(self.keep, (tuple, list)) else (None,)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
      raise InputError(f"Compression: keep is {self.keep!r}; give a list of (start, end) pairs")
    if len(pairs) > MOST_KEPT_RANGES:
      raise InputError(f"Compression: keep has {len(pairs)} ranges; give {MOST_KEPT_RANGES} at most")
    for start, end in pairs:
      check_count("Compression: the start of a range to keep", start, at_least=0)
      check_count("Compression: the end of a range to keep", end, at_least=start + 1)
    # A tuple of tuples, so that the object can be hashed whatever it was made from.
    object.__setattr__(self, "keep", tuple((int(start), int(end)) for start, end in pairs))

  @property
  def scores_decode(self) -> bool:
    """Whether a compression may follow behind decode steps, which then have to keep scores up to date."""
    return self.interval is not None or self.on_demand

  def floor_tokens(self, num_tokens: int) -> int:
    """Tokens per head, on the average, that a compression at `num_tokens` leaves at most.

    The budget, or what is protected where that is more.
    """
    return max(self.cache_tokens(num_tokens), self._protected_tokens(num_tokens))

  def _protected_tokens(self, num_tokens: int) -> int:
    """Tokens of every head that are never evicted; ranges may overlap, and reach behind the sequence's end."""
    count = end = 0
    for start, stop in sorted([(0, self.sinks), (max(num_tokens - self.window, 0), num_tokens), *self.keep]):
      start, stop = max(start, end), min(stop, num_tokens)
      count, end = count + max(stop - start, 0), max(end, stop)
    return count

  def least_tokens(self, num_tokens: int) -> int:
    """Tokens that every head keeps at least, of a sequence that has seen `num_tokens`."""
    return int(self.safeguard * self.cache_tokens(num_tokens))

  def cache_tokens(self, num_tokens: int) -> int:
    """Budget C, tokens per head, of a sequence that has seen `num_tokens`."""
    budgets = [num_tokens]
    if self.rate is not None:
      window = min(self.window, num_tokens)
      budgets.append(window + math.ceil((num_tokens - window) / self.rate))
    if self.max_cache_tokens is not None:
      budgets.append(self.max_cache_tokens)
    return min(budgets)
