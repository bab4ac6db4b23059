"""Choosing the next token on the device: greedy, temperature, top-k, top-p, min-p.

On a GPU nothing here sorts or loops. What does so in a branch can stand in no CUDA graph, and the host then waits in
every step for the device to say which branch it is.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvc_jax.kernels.bit_search import smallest

MOST_LOGPROBS = 20
"""Most probable tokens whose log-probabilities a request can ask for, as in OpenAI's API."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
  """Sampling settings of each row, on the device or still on the host; one compile serves any mix.

  Attributes:
    temperature: f32 [S]; 0, or next to it, is greedy.
    top_k: i32 [S]; 0 is off.
    top_p: f32 [S]; 1 is off.
    min_p: f32 [S]; 0 is off.
    seed: u32 [S] of the request.
    step: i32 [S] index of the token to be drawn among the request's outputs.
  """

  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  min_p: jax.Array | np.ndarray
  seed: jax.Array | np.ndarray
  step: jax.Array | np.ndarray


_LEAST_TEMPERATURE = 1e-5
"""Below it logits over temperature overflow; such draws are greedy."""


def sample(logits: Float[Array, "seqs vocab"], params: SamplingArrays) -> Int[Array, " seqs"]:
  """Draws one token id per row, i32 [S].

  A draw depends on the row's logits, seed and step alone, never on its place in
  the batch.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  warm = params.temperature >= _LEAST_TEMPERATURE

  def drawn() -> Array:
    scaled = logits / jnp.where(warm, params.temperature, 1.0)[:, None]
    truncates = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    # It takes longer than the rest of the draw.
    kept = lax.cond(
        jnp.any(truncates & warm), lambda: jnp.where(truncates[:, None], _truncate(scaled, params), scaled),
        lambda: scaled)
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(params.seed, params.step)
    tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return jnp.where(warm, tokens, greedy)

  return lax.cond(jnp.any(warm), drawn, lambda: greedy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
  """Log-probabilities of drawn tokens under the model's own distribution.

  Attributes:
    drawn: f32 [..., S] of the token that was drawn.
    top: f32 [..., S, R] of the most probable tokens, the best first.
    top_ids: i32 [..., S, R] their ids.
  """

  drawn: jax.Array
  top: jax.Array
  top_ids: jax.Array


def most_ranks(vocab_size: int) -> int:
  """R: most probable tokens that are found where any are asked for."""
  return min(MOST_LOGPROBS, vocab_size)


def logprobs_of(
    logits: Float[Array, "seqs vocab"], tokens: Int[Array, " seqs"], wanted: Bool[Array, ""]
) -> Logprobs:
  """Log-probabilities of `tokens` and of each row's best; zeros at no cost where they are not `wanted`."""
  seqs, vocab = logits.shape

  def found() -> Logprobs:
    every = jax.nn.log_softmax(logits, axis=-1)
    top, ids = _best(every, most_ranks(vocab))
    return Logprobs(jnp.take_along_axis(every, tokens[:, None], axis=-1)[:, 0], top, ids)

  def none() -> Logprobs:
    ranks = (seqs, most_ranks(vocab))
    return Logprobs(jnp.zeros(seqs), jnp.zeros(ranks), jnp.zeros(ranks, jnp.int32))

  return lax.cond(wanted, found, none)


def _best(values: Array, count: int) -> tuple[Array, Array]:
  """The `count` largest of each row [S, V] and their places, the largest first."""
  return lax.platform_dependent(
      values, cpu=lambda values: tuple(lax.top_k(values, count)), default=lambda values: best_one_by_one(values, count))


def best_one_by_one(values: Array, count: int) -> tuple[Array, Array]:
  """What `lax.top_k` gives, the first of ties first (zeros of both signs are), without its sort: for a GPU."""
  places, keys = jnp.arange(values.shape[-1], dtype=jnp.int32), jnp.maximum(_in_order(values), 1)
  ids = []
  for _ in range(count):
    ids.append(jnp.argmax(keys, axis=-1).astype(jnp.int32))
    keys = jnp.where(places == ids[-1][:, None], jnp.uint32(0), keys)  # below the key of -inf
  found = jnp.stack(ids, axis=-1)
  return jnp.take_along_axis(values, found, axis=-1), found


def _truncate(logits: Array, params: SamplingArrays) -> Array:
  """Logits with -inf where top-k, top-p or min-p rule a token out; the best always stays.

  Nothing is sorted: a threshold is searched for.
  """
  keys, probabilities = _in_order(logits), jax.nn.softmax(logits, axis=-1)
  top_k = jnp.where(params.top_k > 0, params.top_k, logits.shape[-1])
  top_p = jnp.where(params.top_p < 1, params.top_p, jnp.inf)  # sums of probabilities round to 1 before their end

  def above(thresholds: Array) -> tuple[Array, Array]:
    """How many tokens are above each of [S, T], and how probable they are together."""
    larger = keys[:, None] > thresholds[..., None]
    return jnp.sum(larger, axis=-1), jnp.sum(jnp.where(larger, probabilities[:, None], 0.0), axis=-1)

  def holds(thresholds: Array) -> Array:
    count, mass = above(thresholds)
    return (count < top_k[:, None]) & (mass < top_p[:, None])

  def search(step_bits: int) -> Callable[[], Array]:
    return lambda: smallest(holds, logits.shape[:1], step_bits)

  # Bit by bit is a loop, which compiles soonest; on a GPU it is to be no loop.
  lowest = lax.platform_dependent(cpu=search(1), default=search(4))[:, None]
  count, mass = above(lowest)
  ties = keys == lowest
  rank = jnp.cumsum(ties, axis=-1) - 1  # of several that are as good, the first go first
  at = jnp.max(jnp.where(ties, probabilities, 0.0), axis=-1, keepdims=True)
  stays = (keys > lowest) | (
      ties & (count + rank < top_k[:, None]) & (mass + rank * at < top_p[:, None]))
  stays &= probabilities >= params.min_p[:, None] * jnp.max(probabilities, axis=-1, keepdims=True)
  stays |= jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[:, None]
  return jnp.where(stays, logits, -jnp.inf)


def _in_order(values: Array) -> Array:
  """uint32 keys that are ordered as f32 values are."""
  bits = lax.bitcast_convert_type(values + 0.0, jnp.uint32)  # no zero is negative
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
