"""Key norm: keys of low L2 norm draw much attention."""

import dataclasses

import jax
import jax.numpy as jnp

from kvc_jax.eviction.score import HeldKVs, LayerKVs, ObservesNothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyNorm(ObservesNothing):
  """Minus the L2 norm of the key: KVs with the longest keys go first. Needs no queries.

  Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (arXiv 2406.11430),
  which leaves the first two layers alone.
  """

  def look(self, kvs: LayerKVs) -> jax.Array:
    return -jnp.sqrt(jnp.sum(kvs.keys * kvs.keys, axis=-1))

  def value(self, kvs: HeldKVs) -> jax.Array:
    assert kvs.looked is not None
    return kvs.looked
