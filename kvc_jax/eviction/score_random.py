"""Random worth: the baseline that any rule has to beat."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvc_jax.eviction.score import HeldKVs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomScore:
  """Uniform worth in [0, 1), a function of (seed, layer, head, position) alone.

  So the choice depends neither on the batch nor on how the prompt was chunked.
  """

  seed: int = 0

  @property
  def observed(self) -> Literal["none", "last", "all"]:
    return "none"

  @property
  def queries(self) -> int:
    return 0

  @property
  def power(self) -> int:
    return 2

  @property
  def buffer(self) -> int:
    return 0

  @property
  def pooling(self) -> int:
    return 1

  def value(self, kvs: HeldKVs) -> jax.Array:
    _, layers, heads, _ = kvs.positions.shape
    head_ids = jnp.arange(layers * heads, dtype=jnp.int32).reshape(1, layers, heads)
    head_keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self.seed), i))(head_ids.reshape(-1))
    head_keys = head_keys.reshape(layers, heads)

    def draw(key, position):
      return jax.random.uniform(jax.random.fold_in(key, position))

    over_list = jax.vmap(draw, in_axes=(None, 0))
    over_heads = jax.vmap(jax.vmap(over_list))
    return jax.vmap(over_heads, in_axes=(None, 0))(head_keys, kvs.positions)
