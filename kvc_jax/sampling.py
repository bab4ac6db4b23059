"""Choosing the next token on the device: greedy, temperature, top-k, top-p, min-p."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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
    # It sorts the vocabulary, which takes longer than the rest of the draw.
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
    top, ids = lax.top_k(every, most_ranks(vocab))
    return Logprobs(jnp.take_along_axis(every, tokens[:, None], axis=-1)[:, 0], top, ids.astype(jnp.int32))

  def none() -> Logprobs:
    ranks = (seqs, most_ranks(vocab))
    return Logprobs(jnp.zeros(seqs), jnp.zeros(ranks), jnp.zeros(ranks, jnp.int32))

  return lax.cond(wanted, found, none)


def _truncate(logits: Array, params: SamplingArrays) -> Array:
  """Logits with -inf where top-k, top-p or min-p rule a token out; the best always stays."""
  vocab = logits.shape[-1]
  order = jnp.argsort(logits, axis=-1, descending=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  probabilities = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  rank = jnp.arange(vocab)
  top_k = jnp.where(params.top_k > 0, params.top_k, vocab)[:, None]
  stays = (rank < top_k) & (before < params.top_p[:, None])
  stays &= probabilities >= params.min_p[:, None] * probabilities[:, :1]
  stays |= rank == 0
  rows = jnp.arange(logits.shape[0])[:, None]
  return jnp.full_like(logits, -jnp.inf).at[rows, order].set(jnp.where(stays, ranked, -jnp.inf))
