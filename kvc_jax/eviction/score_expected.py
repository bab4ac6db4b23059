"""Expected Attention: what queries still to come will attend to."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from kvc_jax.errors import InputError, check_count, check_real
from kvc_jax.eviction.score import HeldKVs, LayerKVs, Observed, QueryMoments

_MOST_FUTURE = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention:
  """Attention that normally distributed queries to come are expected to pay, times the value's norm.

  The prompt's queries before RoPE have mean m and covariance S. RoPE's rotation, averaged over the next `future`
  positions, turns them to m' and S'. A key's expected weight is exp(k.m' / sqrt(D) + k.S'.k / (2 D)), normalised over
  the keys held; averaged over the query heads of the group.

  It scores prompts only: `Compression` refuses it with `interval` or `on_demand`.

  Source: Expected Attention (Devoto et al. 2025, arXiv 2510.00636), section 3, with the norm of the value itself in
  place of that of its projection, as in kvpress.

  Attributes:
    future: positions behind the prompt that the rotation is averaged over.
    sinks: first positions: their queries do not count, their keys take no part in the softmax, and they go last.
    covariance: False uses the mean alone.
    value_norm: times the L2 norm of the value.
    epsilon: added to the expected attention before that.
  """

  observed: ClassVar[Observed] = "moments"
  queries: ClassVar[int] = 0
  power: ClassVar[int] = 1
  buffer: ClassVar[int] = 0
  pooling: ClassVar[int] = 1
  decode_every: ClassVar[int] = 1
  future: int = 512
  sinks: int = 4
  covariance: bool = True
  value_norm: bool = True
  epsilon: float = 0.0

  def __post_init__(self):
    check_count("scoring: future", self.future, at_least=1, at_most=_MOST_FUTURE)
    check_count("scoring: sinks", self.sinks, at_least=0)
    check_real("scoring: epsilon", self.epsilon, at_least=0, hint="0 or a small positive number")
    for name in ("covariance", "value_norm"):
      if not isinstance(getattr(self, name), bool):
        raise InputError(f"scoring: {name} is {getattr(self, name)!r}; give True or False")

  def expect(self, kvs: LayerKVs, moments: QueryMoments, scale: float) -> jax.Array:
    heads = kvs.keys.shape[0]
    group = moments.mean.shape[0] // heads
    positions = (kvs.num_tokens + jnp.arange(self.future, dtype=jnp.int32)).astype(jnp.float32)
    angles = positions[:, None] * moments.frequencies
    turn = jnp.mean(jnp.cos(angles), axis=0), jnp.mean(jnp.sin(angles), axis=0)
    mean = _turned(moments.mean, turn)
    spread = _turned(_turned(moments.covariance, turn).swapaxes(1, 2), turn)
    counts = kvs.held & (kvs.positions >= self.sinks)

    def of_query_head(inputs: tuple[jax.Array, ...]) -> jax.Array:
      head, mean, spread = inputs
      keys = kvs.keys[head]
      logits = scale * _product(keys, mean)
      if self.covariance:
        logits += scale * scale / 2 * jnp.sum(_product(keys, spread) * keys, axis=-1)
      return jax.nn.softmax(logits, where=counts[head])

    attention = lax.map(of_query_head, (jnp.repeat(jnp.arange(heads), group), mean, spread))
    attention = jnp.mean(attention.reshape(heads, group, -1), axis=1)
    if self.value_norm:
      attention = (attention + self.epsilon) * jnp.sqrt(jnp.sum(kvs.values * kvs.values, axis=-1))
    return jnp.where(counts, attention, 0.0)

  def value(self, kvs: HeldKVs) -> jax.Array:
    return jnp.where(kvs.positions < self.sinks, jnp.finfo(jnp.float32).max, kvs.scores)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _turned(vectors: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies an averaged rotation (cosines and sines [D/2]) to the last axis."""
  cos, sin = turn
  first, second = jnp.split(vectors, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
