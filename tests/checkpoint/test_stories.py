"""The packaged model tells the story that llama2.c tells, to the letter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from dense import dense_attend
from flax import nnx
from hf_folders import ASSET

from kvc_jax.checkpoint.store import load_model
from kvc_jax.tokenizer import IncrementalDecoder, Tokenizer

STEPS = 200


def greedy(model, first, steps):
  """`steps` greedy tokens behind `first`; one compilation, as the row is padded to its final length."""
  graph, params = nnx.split(model)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(params, tokens, position):
    model = nnx.merge(graph, params)
    hidden, _ = model(tokens, jnp.arange(steps + 1), dense_attend)
    chosen = jnp.argmax(model.logits(hidden[position][None])[0])
    return tokens.at[position + 1].set(chosen.astype(jnp.int32))

  tokens = jnp.zeros(steps + 1, jnp.int32).at[0].set(first)
  for position in range(steps):
    tokens = step(params, tokens, position)
  return [int(token) for token in np.asarray(tokens[1:])]


def test_200_greedy_steps_are_llama2cs():
  tokenizer = Tokenizer.from_folder(ASSET)
  model = load_model(ASSET)
  assert model.embed.embedding.dtype == jnp.float32
  tokens = greedy(model, tokenizer.bos_id, STEPS)
  expected = (ASSET / "expected_200_steps.txt").read_text(encoding="utf-8")
  assert tokenizer.decode(tokens) == expected
  decoder = IncrementalDecoder(tokenizer)
  assert "".join([*map(decoder.add, tokens), decoder.flush()]) == expected
