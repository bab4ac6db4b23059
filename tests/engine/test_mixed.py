"""A prompt's chunk with a decode step beside it is what the two are one after the other."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stepwise

from kvc_jax import Compression, Engine, FullAttention, RandomScore, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine import steps
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.flight import Flight
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.packed import Packed, unpack
from kvc_jax.engine.sequence import Sequence
from kvc_jax.tokenizer import IncrementalDecoder

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
OPTIONS = {"max_num_seqs": 4, "block_size": 4, "chunk_size": 32, "max_model_len": 256}
GREEDY = SamplingParams(temperature=0, max_tokens=40, seed=0, ignore_eos=True)
SCORED = Compression(rate=4, interval=8, scoring=FullAttention())


@pytest.fixture(scope="module")
def engine():
  return Engine(STORIES, **OPTIONS)


def _sequence(engine, length, compression=None):
  prompt = np.random.default_rng(length).integers(3, 500, length).tolist()
  return Sequence(
      request_id=0, prompt=prompt, params=GREEDY, compression=compression,
      output=OutputText(IncrementalDecoder(engine.tokenizer), ()))


def _batch(engine, compression, decoding=2):
  """A batch in which some sequences are about to decode, and another has a chunk of 20 to go."""
  batch = Batch(engine.model, engine.config, 32)
  sequences = [_sequence(engine, 9 + 11 * i, compression) for i in range(decoding)]
  for sequence in sequences:
    sequence.token_ids = [int(jnp.argmax(stepwise.prefill(batch, sequence)))]
  prompt = _sequence(engine, 52, compression)
  batch.take_slot(prompt)
  assert batch.prefill(prompt, 32)[1]
  return batch, sequences, prompt


@pytest.mark.parametrize("compression", [None, SCORED], ids=["plain", "scored"])
def test_equals_a_chunk_and_a_decode_step(engine, compression):
  batch, sequences, prompt = _batch(engine, compression)
  apart, others, other_prompt = _batch(engine, compression)
  found = batch.mixed(prompt, 20, sequences)
  logits, ok = apart.prefill(other_prompt, 20)
  rows, rows_ok = stepwise.decode(apart, others)
  assert found.ok
  assert ok
  np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
  assert found.token[0] == jnp.argmax(logits)
  for sequence, other in zip(sequences, others, strict=True):
    assert found.decoded.counts[sequence.slot] == rows_ok[other.slot] == 1
    assert found.decoded.tokens[0, sequence.slot] == jnp.argmax(rows[other.slot])
  assert found.decoded.counts.sum() == 2
  check_invariants(batch.state)
  for name in ("lengths", "num_tokens", "tables", "free_count"):
    np.testing.assert_array_equal(getattr(batch.state, name), getattr(apart.state, name))
  for name in ("kv", "scores"):
    mine, theirs = (np.asarray(getattr(b.state, name))[1:] for b in (batch, apart))  # not the null block
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_chunk_comes_first_where_blocks_are_short(engine):
  """Then there are none for the decode step; and a chunk that gets none leaves all as it was."""
  batch, sequences, prompt = _batch(engine, None)
  heads = engine.config.heads_per_sequence
  state = batch.state

  def left(blocks):
    return dataclasses.replace(jax.tree.map(jnp.copy, state), free_count=jnp.int32(blocks))

  batch.state = left(20 // 4 * heads)
  found = batch.mixed(prompt, 20, sequences)
  assert found.ok
  assert batch.state.num_tokens[prompt.slot] == 52
  needs_block = [len(s.prompt) % 4 == 0 for s in sequences]
  assert any(needs_block)
  for sequence, needs in zip(sequences, needs_block, strict=True):
    assert found.decoded.counts[sequence.slot] == (not needs)
  prompt.prefilled = 32
  batch.state = left(20 // 4 * heads - 1)
  found = batch.mixed(prompt, 20, [])
  assert not found.ok
  assert batch.state.num_tokens[prompt.slot] == 32


def test_rows_go_on_where_a_call_ended_that_nobody_read(engine):
  """Two decode steps beside two chunks, the second of tokens that the host has not seen."""
  batch, sequences, prompt = _batch(engine, None)
  first = batch.mixed(prompt, 10, sequences)
  before = Flight().decodes(sequences, [1] * len(sequences), first.decoded)
  second = batch.mixed(prompt, 10, sequences, before)
  apart, others, other_prompt = _batch(engine, None)
  apart.prefill(other_prompt, 20)
  for _ in range(2):
    rows, _ = stepwise.decode(apart, others)
    for other in others:
      other.token_ids.append(int(jnp.argmax(rows[other.slot])))
  for sequence, other in zip(sequences, others, strict=True):
    tokens = [int(found.decoded.tokens[0, sequence.slot]) for found in (first, second)]
    assert tokens == other.token_ids[1:]


@pytest.mark.parametrize(("count", "token", "goes"), [(2, 7, True), (2, 9, False), (1, 7, False)])
def test_who_drew_a_stop_id_or_found_no_block_rests(count, token, goes):
  """Slot 0 was in the call, slot 1 was not."""
  rows = steps.DecodeRows(
      tokens=jnp.array([0, 5]), limits=jnp.array([3, 3]), given=jnp.full((2, 4), -1), stop_ids=jnp.array([[9, -1]] * 2),
      sampling=None, logprobs=jnp.zeros(2, bool))
  before = steps.Decoded(jnp.array([count, 0]), jnp.array([[3, 0], [token, 0]]), None)
  followed = jax.jit(unpack)(steps.follow(Packed.of(rows), before, jnp.array([2, 0])))
  assert followed.limits.tolist() == [3 if goes else 0, 3]
  assert followed.tokens.tolist()[1] == 5
  if goes:
    assert followed.tokens[0] == token


def test_those_with_another_way_to_score_go_apart(engine, monkeypatch):
  """Beside a plain prompt no step keeps scores: who needs that has a loop of its own, and texts stay the same."""
  mixed = Engine(STORIES, rules=(WindowAttention(), FullAttention(), RandomScore()), **OPTIONS)
  long, requests = [9] * 180, [([3, 4, 5], SCORED), ([6, 7], None)]
  alone = []
  for prompt, compression in requests:
    mixed.add(prompt, GREEDY, compression)
    alone += [u.output.token_ids for u in _updates(mixed) if u.output]
  ids = [mixed.add(prompt, GREEDY, compression) for prompt, compression in requests]
  while sum(s.decodes for s in mixed._scheduler.running) < 2:
    mixed.step()
    mixed._collect()
  mixed.add(long, GREEDY)
  rode, looped = [], []
  batch, mix, decode = mixed.batch, mixed.batch.mixed, mixed.batch.decode
  monkeypatch.setattr(batch, "mixed", lambda s, n, riders, before: (rode.append(riders), mix(s, n, riders, before))[1])
  monkeypatch.setattr(batch, "decode", lambda rows, *rest: (looped.append(rows), decode(rows, *rest))[1])
  for _ in range(4):
    mixed.step()
  assert all(s.request_id == ids[1] for riders in rode for s in riders)
  assert all(s.request_id == ids[0] for rows in looped for s in rows)
  assert sum(map(len, rode)) >= 3
  assert sum(map(len, looped)) >= 3
  outputs = {u.request_id: u.output.token_ids for u in _updates(mixed) if u.output}
  assert [outputs[i] for i in ids] == alone


def _updates(engine):
  while engine.has_work:
    yield from engine.step()
