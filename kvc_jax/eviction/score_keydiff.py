"""KeyDiff: keys unlike the others."""

import dataclasses

import jax
import jax.numpy as jnp

from kvc_jax.eviction.score import HeldKVs, LayerKVs, ObservesNothing

_SMALLEST_NORM = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(ObservesNothing):
  """Minus the cosine between a key and the head's mean direction: KVs with the most usual keys go first.

  The mean is that of the keys held, each scaled to length 1. Needs no queries.

  Source: KeyDiff (arXiv 2504.15364), section 3.
  """

  def look(self, kvs: LayerKVs) -> jax.Array:
    directions = kvs.keys / _norm(kvs.keys)
    count = jnp.maximum(jnp.sum(kvs.held, axis=1), 1)[:, None]
    mean = jnp.sum(directions, axis=1) / count  # what is not held is 0
    mean = mean / _norm(mean)
    return -jnp.sum(directions * mean[:, None], axis=-1)

  def value(self, kvs: HeldKVs) -> jax.Array:
    assert kvs.looked is not None
    return kvs.looked


def _norm(vectors: jax.Array) -> jax.Array:
  return jnp.maximum(jnp.sqrt(jnp.sum(vectors * vectors, axis=-1, keepdims=True)), _SMALLEST_NORM)
