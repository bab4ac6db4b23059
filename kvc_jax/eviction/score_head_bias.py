"""A rule whose choice among heads is shifted by a head profile."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.errors import InputError, check_real
from kvc_jax.eviction.profile import HeadProfile
from kvc_jax.eviction.score import HeldKVs, LookingRule, Observed, ScoringRule, check_rule, pooling_of

_LEAST_SHARE = 1e-3
"""Of the mean share: a place where nothing was kept is not worth nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadBias:
  """Another rule's worth times (share / mean share) ** weight, by layer, head and place in the sequence.

  The budget stays shared among heads: what a head kept while calibrating only speaks for or against its KVs. The
  reference (KV-Compress's fork of vLLM) has its kv-head-bias for this.

  Attributes:
    rule: one that sums attention: WindowAttention, FullAttention, SnapKV, H2O or one's own.
    profile: of `kvc calibrate`.
    weight: 0 changes nothing.
  """

  rule: ScoringRule
  profile: HeadProfile
  weight: float = 1.0

  def __post_init__(self):
    check_rule(self.rule)
    if self.rule.observed not in ("last", "all") or isinstance(self.rule, LookingRule):
      raise InputError(
          f"scoring: a head bias goes with rules that sum attention, which {type(self.rule).__name__} does not; "
          "give window, full, snapkv or h2o")
    if not isinstance(self.profile, HeadProfile):
      raise InputError(f"scoring: the profile of a head bias is {self.profile!r}; give a HeadProfile")
    check_real("scoring: weight of a head bias", self.weight, at_least=0, hint="0 or more")

  @property
  def observed(self) -> Observed:
    return self.rule.observed

  @property
  def queries(self) -> int:
    return self.rule.queries

  @property
  def power(self) -> int:
    return self.rule.power

  @property
  def buffer(self) -> int:
    return self.rule.buffer

  @property
  def pooling(self) -> int:
    return self.rule.pooling

  @property
  def pool(self) -> Literal["max", "mean"]:
    return pooling_of(self.rule)[1]

  @property
  def pools_observed(self) -> bool:
    return pooling_of(self.rule)[2]

  @property
  def decode_every(self) -> int:
    return self.rule.decode_every

  def value(self, kvs: HeldKVs) -> jax.Array:
    assert kvs.evictable is not None
    shares = self.profile.shares
    table = np.maximum(shares / shares.mean(), _LEAST_SHARE) ** self.weight
    # The profile's places are parts of what was not protected.
    far = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(kvs.evictable, kvs.positions, far), axis=(1, 2, 3), keepdims=True)
    last = jnp.max(jnp.where(kvs.evictable, kvs.positions, 0), axis=(1, 2, 3), keepdims=True)
    place = (kvs.positions - first) / jnp.maximum(last + 1 - first, 1)
    bins = jnp.clip((place * shares.shape[2]).astype(jnp.int32), 0, shares.shape[2] - 1)
    factors = jnp.take_along_axis(jnp.asarray(table, jnp.float32)[None], bins, axis=-1)
    return self.rule.value(kvs) * factors
