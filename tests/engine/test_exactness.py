"""`LLM` on the shipped model gives the same to the bit, whatever runs beside a request and in whatever pieces."""

import pathlib

import numpy as np
import pytest
import stepwise

from kvc_jax import LLM, Compression, FullAttention, RandomScore, SamplingParams, WindowAttention
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.sequence import Sequence

pytestmark = pytest.mark.optimized

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 5
TIGHT = 12 * 20 + 1  # blocks of a pool that holds 48 KVs of each of 20 heads

# Engines of one shape run the same compiled programs: a test takes another shape only where it is about that.


@pytest.fixture(scope="module")
def llm():
  return LLM(STORIES, max_num_seqs=3, block_size=4, chunk_size=32)


def _sequence(llm, prompt, compression):
  return Sequence(
      request_id=0, prompt=llm.tokenizer.encode(prompt), params=GREEDY, compression=compression, output=None)


def _logits(llm, compression, tokens):
  """Logits behind the prompt and behind each of `tokens` greedy decode steps."""
  batch = Batch(llm.engine.model, llm.config, 32)
  sequence = _sequence(llm, LONG[:180], compression)
  logits = [np.asarray(stepwise.prefill(batch, sequence))]
  for _ in range(tokens):
    if compression and (not sequence.steps or (compression.interval and sequence.steps % compression.interval == 0)):
      stepwise.compress(batch, sequence)
    sequence.token_ids.append(int(logits[-1].argmax()))
    step, ok = stepwise.decode(batch, [sequence])
    assert ok[sequence.slot]
    logits.append(np.asarray(step[sequence.slot]))
  return np.array(logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_budget_at_least_the_length_is_bit_identical(dtype):
  llm = LLM(STORIES, dtype=dtype, max_num_seqs=3, block_size=4, chunk_size=32)
  plain = _logits(llm, None, 20)
  full = FullAttention(buffer=WindowAttention().buffer)  # decode steps keep scores as for the other rule
  compressions = [
      Compression(rate=1, interval=1, scoring=WindowAttention()),
      Compression(max_cache_tokens=400, interval=1, scoring=full, allocation="head"),
      Compression(rate=1, scoring=full, allocation="head")]
  if dtype == "float32":  # a rule that observes nothing runs the same model steps as no rule
    compressions.append(
        Compression(rate=1, max_cache_tokens=400, interval=4, scoring=RandomScore(), allocation="layer"))
  for compression in compressions:
    np.testing.assert_array_equal(_logits(llm, compression, 20), plain)
  smaller = _logits(llm, Compression(rate=2.0, interval=1), 20)
  assert (smaller[1:] != plain[1:]).any(axis=-1).all()  # the comparison can fail


def test_text_is_the_same_alone_and_in_a_batch(llm):
  prompts = ["", LONG, "Once upon a time", "The dog was sad. ", LONG[:150]]
  together = llm.generate(prompts, GREEDY, Compression(rate=4, interval=4))
  for prompt, output in zip(prompts, together, strict=True):
    (alone,) = llm.generate(prompt, GREEDY, Compression(rate=4, interval=4))
    assert (alone.text, alone.token_ids) == (output.text, output.token_ids)
    assert (alone.receipt.kvs_kept == output.receipt.kvs_kept).all()


@pytest.mark.parametrize("length", [75, len(LONG)])
def test_chunk_size_changes_neither_text_nor_what_is_kept(llm, length):
  """Chunks of 7 give the same text and keep the same positions as one of 32, and as several of them."""
  kept = []
  for engine in (llm, LLM(STORIES, max_num_seqs=3, block_size=4, chunk_size=7)):
    (output,) = engine.generate(LONG[:length], GREEDY, Compression(rate=8, window=8), return_positions=True)
    assert (len(output.prompt_token_ids) <= 32) == (length == 75)
    assert output.receipt.freed_blocks
    kept.append((output.text, output.receipt.positions.tolist()))
  assert kept[0] == kept[1]


@pytest.mark.parametrize("compression", [None, Compression(rate=2, window=4, interval=4)])
def test_who_gives_way_to_others_loses_nothing(llm, compression):
  """Three prompts grow until the pool is empty: the newest start over, and texts are as with room for all."""
  tight = LLM(STORIES, max_num_seqs=3, block_size=4, chunk_size=32, num_blocks=TIGHT)
  prompts = ["", "A", "B"]
  params = SamplingParams(temperature=0, max_tokens=40)
  pieces, ids = ["", "", ""], [[], [], []]

  def on_text(chunk):
    pieces[chunk.index] += chunk.text
    ids[chunk.index] += chunk.token_ids

  outputs = tight.generate(prompts, params, compression, on_text=on_text)
  roomy = llm.generate(prompts, params, compression)
  assert [(o.text, o.token_ids, o.finish_reason) for o in outputs] == [
      (o.text, o.token_ids, "length") for o in roomy]
  assert pieces == [o.text for o in outputs]
  assert ids == [o.token_ids for o in outputs]
  assert tight.free_blocks == tight.config.num_blocks - 1
  assert tight.engine.stats().preemptions
