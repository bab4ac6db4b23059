"""StreamingLLM: attention sinks and the newest tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from kvc_jax.errors import check_count
from kvc_jax.eviction.score import HeldKVs, ObservesNothing

_ABOVE_ALL = 2.0**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(ObservesNothing):
  """The first `sinks` positions, then the newest: worth is the position.

  Source: StreamingLLM (arXiv 2309.17453), section 3.2. Kept keys keep the positions that they were written with; the
  paper gives them new ones, so that positions stay within the trained context.

  Attributes:
    sinks: first tokens that go last of all.
  """

  sinks: int = 4

  def __post_init__(self):
    check_count("scoring: sinks", self.sinks, at_least=0)

  def value(self, kvs: HeldKVs) -> jax.Array:
    return jnp.where(kvs.positions < self.sinks, _ABOVE_ALL, kvs.positions.astype(jnp.float32))
