"""What a KV is worth: the interface of scoring rules, and what attention-based ones share.

A rule says which prompt queries are observed while prefilling and what becomes
of the accumulated sums when KVs are chosen for eviction. The sums themselves
are computed by `kvc_jax.attention`, in f32, from softmax probabilities. A rule that
needs keys, values or the last decode query looks at them layer by layer (`look`).
"""

import dataclasses
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp

from kvc_jax.errors import InputError, check_count

Observed = Literal["none", "last", "all", "moments"]

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
    held: bool [B, L, H, K].
    evictable: bool [B, L, H, K], held and not protected.
    cache_tokens: i32 [B] budget C, tokens per head.
    looked: f32 [B, L, H, K] what the rule's `look` found; None for a rule without one.
  """

  scores: jax.Array
  positions: jax.Array
  num_tokens: jax.Array
  first_query: jax.Array
  held: jax.Array | None = None
  evictable: jax.Array | None = None
  cache_tokens: jax.Array | None = None
  looked: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKVs:
  """One layer of one sequence as its cache holds it.

  Attributes:
    keys: f32 [H, K, D] after RoPE, K = M * P entries of each head's list; 0 where nothing is held.
    values: f32 [H, K, D], likewise.
    held: bool [H, K].
    positions: i32 [H, K] token positions; nonsense where nothing is held.
    scores: f32 [H, K] accumulated sums; 0 where nothing is held.
    num_tokens: i32 [] tokens seen.
    queries: f32 [H*G, D] the last decode query, after RoPE and times the softmax's scale; None
      for a cache without num_heads, and for rules that observe "none" or "moments", whose decode steps keep no query.
    log_sums: f32 [H*G] its log-sum-exp; +inf where the sequence has decoded nothing yet.
    output: [H*G, D, E] the layer's output projection, for rules with `needs_output`.
  """

  keys: jax.Array
  values: jax.Array
  held: jax.Array
  positions: jax.Array
  scores: jax.Array
  num_tokens: jax.Array
  queries: jax.Array | None = None
  log_sums: jax.Array | None = None
  output: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryMoments:
  """What one layer's prompt queries look like, before RoPE.

  Attributes:
    mean: f32 [H*G, D].
    covariance: f32 [H*G, D, D].
    frequencies: f32 [D/2] RoPE's angle per position of each pair of dimensions.
  """

  mean: jax.Array
  covariance: jax.Array
  frequencies: jax.Array


@runtime_checkable
class ScoringRule(Protocol):
  """A frozen, hashable object (it is a static argument of jitted functions).

  What else it may have: `look` (`LookingRule`), `expect` (`MomentsRule`), `pool` and
  `pools_observed` (`pooling_of`), and `needs_output`, True where `look` needs the output
  projection.

  Attributes:
    observed: prompt queries whose attention is summed: none, the last `queries`, or all;
      "moments" for the mean and covariance of all of them instead of any attention.
    queries: how many with "last".
    power: probability ** power is summed.
    buffer: newest tokens that a query does not count for.
    pooling: width of the max-pool along keys with "last"; 1 is none.
    decode_every: decode queries at positions that are multiples of it are observed, each
      counting as many times.
  """

  @property
  def observed(self) -> Observed: ...
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


class ObservesNothing:
  """The attributes of a `ScoringRule` that goes by no attention: to be inherited from."""

  observed: ClassVar[Observed] = "none"
  queries: ClassVar[int] = 0
  power: ClassVar[int] = 1
  buffer: ClassVar[int] = 0
  pooling: ClassVar[int] = 1
  decode_every: ClassVar[int] = 1


@runtime_checkable
class LookingRule(ScoringRule, Protocol):
  """A rule that looks at keys, values or the last decode query when KVs are chosen."""

  def look(self, kvs: LayerKVs) -> jax.Array:
    """A number for each KV of one layer, f32 [H, K]; `value` finds it in `HeldKVs.looked`."""
    ...


@runtime_checkable
class MomentsRule(ScoringRule, Protocol):
  """A rule with `observed` "moments": it scores a prompt by what its queries look like."""

  @property
  def sinks(self) -> int:
    """First positions whose queries do not count."""
    ...

  def expect(self, kvs: LayerKVs, moments: QueryMoments, scale: float) -> jax.Array:
    """Scores of one layer's KVs, f32 [H, K], not negative."""
    ...


def pooling_of(rule: ScoringRule) -> tuple[int, Literal["max", "mean"], bool]:
  """Width and kind of the pool along keys, and whether the observed queries' own keys take part.

  A rule without `pool` and `pools_observed` has "max" and True.
  """
  return rule.pooling, getattr(rule, "pool", "max"), getattr(rule, "pools_observed", True)


def check_rule(rule: object) -> None:
  """Raises InputError where an object is no scoring rule, or has numbers that no decode step takes."""
  known = isinstance(rule, ScoringRule) and rule.observed in get_args(Observed)
  if known and getattr(rule, "observed", None) == "moments":
    known = isinstance(rule, MomentsRule)
  if not known or isinstance(rule, type):
    raise InputError(
        f"Compression: scoring is {rule!r}, which is no scoring rule; give an object such as "
        "WindowAttention(), or one of your own with the attributes of ScoringRule")
  assert isinstance(rule, ScoringRule)
  check_attention_rule(rule)
  if getattr(rule, "pool", "max") not in ("max", "mean"):
    raise InputError(f"scoring: pool is {getattr(rule, 'pool', None)!r}; give 'max' or 'mean'")


def check_attention_rule(rule: ScoringRule, reduction: str = "sum") -> None:
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
