"""What a KV is worth: the interface of scoring rules, and what attention-based ones share.

A rule says which prompt queries are observed while prefilling and what becomes
of the accumulated sums when KVs are chosen for eviction. The sums themselves
are computed by `kvc_jax.attention`, in f32, from softmax probabilities.
"""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from kvc_jax.errors import InputError, check_count

# The queries of all layers are kept while a prompt is prefilled.
_MOST_QUERIES = 4096
_WIDEST_POOLING = 1023
_WIDEST_BUFFER = 2**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeldKVs:
  """What a rule may look at when values are asked for.

  Attributes:
    scores: f32 [B, L, H, K] accumulated sums, K = M * P entries of each head's list.
    positions: i32 [B, L, H, K] token positions.
    num_tokens: i32 [B] tokens seen.
    first_query: i32 [B] position of the first query that was observed.
  """

  scores: jax.Array
  positions: jax.Array
  num_tokens: jax.Array
  first_query: jax.Array


@runtime_checkable
class ScoringRule(Protocol):
  """A frozen, hashable object (it is a static argument of jitted functions).

  Attributes:
    observed: prompt queries whose attention is summed: none, the last `queries`, or all.
    queries: how many with "last".
    power: probability ** power is summed.
    buffer: newest tokens that a query does not count for.
    pooling: width of the max-pool along keys with "last"; 1 is none.
    decode_every: decode queries at positions that are multiples of it are observed, each
      counting as many times.
  """

  @property
  def observed(self) -> Literal["none", "last", "all"]: ...
  @property
  def queries(self) -> int: ...
  @property
  def power(self) -> int: ...
  @property
  def buffer(self) -> int: ...
  @property
  def pooling(self) -> int: ...
  @property
  def decode_every(self) -> int: ...

  def value(self, kvs: HeldKVs) -> jax.Array:
    """Worth of each KV, f32 [B, L, H, K]; the lowest go first. Entries not held are ignored."""
    ...


def check_rule(rule: object) -> None:
  """Raises InputError where an object is no scoring rule, or has numbers that no decode step takes."""
  known = isinstance(rule, ScoringRule) and rule.observed in ("none", "last", "all")
  if not known or isinstance(rule, type):
    raise InputError(
        f"Compression: scoring is {rule!r}, which is no scoring rule; give an object such as "
        "WindowAttention(), or one of your own with the attributes of ScoringRule")
  assert isinstance(rule, ScoringRule)
  check_count("scoring: power", rule.power, at_least=1, at_most=2)
  check_count("scoring: buffer", rule.buffer, at_least=0, at_most=_WIDEST_BUFFER)
  check_count("scoring: decode_every", rule.decode_every, at_least=1, at_most=_WIDEST_BUFFER)


def check_attention_rule(rule: ScoringRule, reduction: str) -> None:
  """Raises InputError where a number of an attention-based rule is out of range."""
  check_count("scoring: power", rule.power, at_least=1, at_most=2)
  if reduction not in ("sum", "mean"):
    raise InputError(f"scoring: reduction is {reduction!r}; give 'sum' or 'mean'")
  if rule.observed == "last":
    check_count("scoring: queries", rule.queries, at_least=1, at_most=_MOST_QUERIES)
  check_count("scoring: buffer", rule.buffer, at_least=0, at_most=_WIDEST_BUFFER)
  check_count("scoring: decode_every", rule.decode_every, at_least=1, at_most=_WIDEST_BUFFER)
  check_count("scoring: pooling", rule.pooling, at_least=1, at_most=_WIDEST_POOLING)
  if rule.pooling % 2 == 0:
    raise InputError(f"scoring: pooling is {rule.pooling}; an odd width is needed")


def first_observed(rule: ScoringRule, prompt_tokens: int) -> int:
  """Position of the first query that `rule` observes in a prompt of that many tokens."""
  return max(0, prompt_tokens - rule.queries) if rule.observed == "last" else 0


def mean_over_queries(kvs: HeldKVs, buffer: int) -> jax.Array:
  """Sums divided by the number of observed queries that counted for each KV (at least 1)."""
  first = jnp.maximum(kvs.positions + buffer, kvs.first_query[:, None, None, None])
  count = kvs.num_tokens[:, None, None, None] - first
  return kvs.scores / jnp.maximum(count, 1).astype(jnp.float32)
