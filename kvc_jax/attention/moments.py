"""Mean and covariance of a prompt's queries before RoPE, gathered chunk by chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvc_jax.eviction.score import QueryMoments
from kvc_jax.model.rope import apply_rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Of all layers, over the queries so far.

  Attributes:
    counts: f32 [L] queries that counted.
    means: f32 [L, H*G, D].
    scatters: f32 [L, H*G, D, D] sums of outer products of the differences from the mean.
    frequencies: f32 [D/2] RoPE's angle per position of each pair of dimensions.
  """

  counts: jax.Array
  means: jax.Array
  scatters: jax.Array
  frequencies: jax.Array


def init_moments(num_layers: int, num_heads: int, head_dim: int, frequencies: np.ndarray | jax.Array) -> Moments:
  """Moments of no queries; for the arguments see `init_observation`."""
  shape = (num_layers, num_heads, head_dim)
  return Moments(
      counts=jnp.zeros(num_layers), means=jnp.zeros(shape), scatters=jnp.zeros((*shape, head_dim)),
      frequencies=jnp.asarray(frequencies, jnp.float32))


def add_queries(
    moments: Moments,
    layer: jax.Array,
    q: Float[Array, "tokens q_heads head_dim"],
    positions: Int[Array, " tokens"],
    counted: Bool[Array, " tokens"],
) -> Moments:
  """Takes in one layer's queries [T, H*G, D] after RoPE; those not `counted` are left out.

  Joined as Chan, Golub and LeVeque (1979) do, so that no large sums are subtracted.
  """
  rows = apply_rope(q.astype(jnp.float32), -positions, moments.frequencies)
  rows = jnp.where(counted[:, None, None], rows, 0.0)  # zero times a padding row's NaN would be NaN
  weight = counted.astype(jnp.float32)
  new = jnp.sum(weight)
  mean = jnp.einsum("t,tnd->nd", weight, rows, precision=lax.Precision.HIGHEST) / jnp.maximum(new, 1.0)
  apart = jnp.where(counted[:, None, None], rows - mean, 0.0)
  scatter = jnp.einsum("tnd,tne->nde", apart, apart, precision=lax.Precision.HIGHEST)
  old, old_mean = moments.counts[layer], moments.means[layer]
  total = jnp.maximum(old + new, 1.0)
  step = mean - old_mean
  between = jnp.einsum("nd,ne->nde", step, step, precision=lax.Precision.HIGHEST) * (old * new / total)
  return dataclasses.replace(
      moments,
      counts=moments.counts.at[layer].add(new),
      means=moments.means.at[layer].add(step * (new / total)),
      scatters=moments.scatters.at[layer].add(scatter + between))


def moments_of(moments: Moments, layer: jax.Array) -> QueryMoments:
  """One layer's mean and covariance; zeros where no query counted."""
  count = jnp.maximum(moments.counts[layer], 1.0)
  return QueryMoments(moments.means[layer], moments.scatters[layer] / count, moments.frequencies)
