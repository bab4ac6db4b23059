"""Random worth: the baseline that any rule has to beat."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvc_jax.eviction.score import HeldKVs, Observed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomScore:
  """Uniform worth in [0, 1), a function of (seed, layer, head, position) alone.

  So the choice depends neither on the batch nor on how the prompt was chunked.
  """

  observed: ClassVar[Observed] = "none"
  queries: ClassVar[int] = 0
  power: ClassVar[int] = 2
  buffer: ClassVar[int] = 0
  pooling: ClassVar[int] = 1
  decode_every: ClassVar[int] = 1
  seed: int = 0

  def value(self, kvs: HeldKVs) -> jax.Array:
    _, layers, heads, _ = kvs.positions.shape
    head_ids = jnp.arange(layers * heads, dtype=jnp.int32).reshape(layers, heads, 1)

    def draw(head, position):
      key = jax.random.fold_in(jax.random.key(self.seed), head)
      return jax.random.uniform(jax.random.fold_in(key, position))

    return jnp.vectorize(draw)(head_ids, kvs.positions)
