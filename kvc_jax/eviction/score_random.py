"""Random worth: the baseline that any rule has to beat."""

import dataclasses

import jax
import jax.numpy as jnp

from kvc_jax.eviction.score import HeldKVs, ObservesNothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomScore(ObservesNothing):
  """Uniform worth in [0, 1), a function of (seed, layer, head, position) alone.

  So the choice depends neither on the batch nor on how the prompt was chunked.
  """

  seed: int = 0

  def value(self, kvs: HeldKVs) -> jax.Array:
    _, layers, heads, _ = kvs.positions.shape
    head_ids = jnp.arange(layers * heads, dtype=jnp.int32).reshape(layers, heads, 1)

    def draw(head, position):
      key = jax.random.fold_in(jax.random.key(self.seed), head)
      return jax.random.uniform(jax.random.fold_in(key, position))

    return jnp.vectorize(draw)(head_ids, kvs.positions)
