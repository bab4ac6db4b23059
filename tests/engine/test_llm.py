"""`LLM` on the shipped model: freed memory, compiles, stops, streaming."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import stepwise
from builders import held_keys_and_values, poison

from kvc_jax import LLM, Compression, SamplingParams
from kvc_jax.attention.decode import decode_attention
from kvc_jax.cache.alloc import allocate
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine import steps
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.sequence import Sequence

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 5

# Engines of one shape run the same compiled programs: a test takes another shape only where it is about that.
TIGHT = 60 * 20 + 1  # blocks of a pool that holds 240 KVs of each of 20 heads


@pytest.fixture(scope="module")
def llm():
  return LLM(STORIES, max_num_seqs=3, block_size=4, chunk_size=32)


@pytest.fixture(scope="module")
def tight():
  return LLM(STORIES, max_num_seqs=3, block_size=4, chunk_size=32, num_blocks=TIGHT)


@pytest.fixture(scope="module")
def short():
  """Of another shape, and of little context."""
  return LLM(STORIES, max_num_seqs=3, block_size=8, chunk_size=32, max_model_len=256)


def _sequence(llm, prompt, compression):
  return Sequence(
      request_id=0, prompt=llm.tokenizer.encode(prompt), params=GREEDY, compression=compression, output=None)


def test_attention_after_eviction_is_dense_attention_over_what_is_kept(llm):
  """After an eviction at 4x a decode query sees just the KVs that are held, in every layer and head."""
  batch = Batch(llm.engine.model, llm.config, 32)
  sequence = _sequence(llm, LONG, Compression(rate=4, window=8))
  stepwise.prefill(batch, sequence)
  stepwise.compress(batch, sequence)
  state = poison(batch.state)
  check_invariants(state)
  shape, slot = llm.engine.model.config, sequence.slot
  active = np.arange(llm.config.num_slots) == slot
  state, _ = jax.jit(allocate, static_argnames="max_count")(
      state, jnp.arange(llm.config.num_slots), active.astype(np.int32), max_count=1)
  rng = np.random.default_rng(0)
  attend = jax.jit(functools.partial(decode_attention, scale=0.3))
  for layer in range(shape.num_layers):
    q, k, v = (rng.normal(size=(llm.config.num_slots, n, shape.head_dim)).astype(np.float32)
               for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads))
    out, state = attend(state, jnp.int32(layer), q, k, v, active=active)
    held = [held_keys_and_values(state, layer, slot, h) for h in range(shape.num_kv_heads)]
    expected = oracles.attention_ragged(q[slot], [h[1] for h in held], [h[2] for h in held], 0.3)
    np.testing.assert_allclose(out[slot], expected, atol=2e-6)


def test_freed_is_really_freed(tight):
  """A pool with room for one prompt: after 8x the blocks in the receipt are free and serve a second one."""
  prompt = tight.tokenizer.encode(LONG)
  one = tight.config.blocks_for(len(prompt) + 1)
  batch = Batch(tight.engine.model, tight.config, 32)
  first, second = (_sequence(tight, LONG, Compression(rate=8, window=8)) for _ in range(2))
  stepwise.prefill(batch, first)
  assert batch.free_blocks < one  # a second prompt does not fit
  before = batch.free_blocks
  stepwise.compress(batch, first)
  receipt = stepwise.receipt(batch, first)
  assert batch.free_blocks - before == receipt.freed_blocks == receipt.blocks_uncompressed - receipt.blocks_held
  assert receipt.rate_reached > 4
  stepwise.prefill(batch, second)
  check_invariants(batch.state)
  batch.release(first)
  batch.release(second)
  assert batch.free_blocks == batch.config.num_blocks - 1


def test_waits_for_blocks_then_serves_all(tight):
  """Prompts that do not fit together run one behind the other, and a full pool ends cleanly."""
  outputs = tight.generate([LONG, LONG, LONG], GREEDY)
  assert {o.text for o in outputs} == {outputs[0].text}
  assert tight.free_blocks == TIGHT - 1
  outputs = tight.generate(["", "", ""], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))
  assert [(o.finish_reason, len(o.token_ids)) for o in outputs] == [("cache_full", 240)] * 3
  assert tight.free_blocks == TIGHT - 1


def test_a_step_that_is_broken_off_leaves_a_working_engine(llm, monkeypatch):
  """An interrupt between donating the cache and taking it back must not end the engine."""
  expected = llm.generate("Once", GREEDY)[0].text
  decode_loop = steps.decode_loop

  def interrupted(*args, **options):
    decode_loop(*args, **options)
    raise KeyboardInterrupt

  monkeypatch.setattr(steps, "decode_loop", interrupted)
  with pytest.raises(KeyboardInterrupt):
    llm.generate(["Once", "A"], GREEDY)
  monkeypatch.undo()
  assert llm.free_blocks == llm.config.num_blocks - 1
  assert llm.generate("Once", GREEDY)[0].text == expected


def test_generate_cannot_be_called_from_its_callback(llm):
  with pytest.raises(RuntimeError, match="a callback cannot call it again"):
    llm.generate("a", GREEDY, on_text=lambda chunk: llm.generate("b"))
  assert len(llm.generate("a", GREEDY)) == 1


def test_prompt_and_text_read_as_one(llm):
  """The first piece keeps its space behind a prompt, and has none at the start of a text."""
  (output,) = llm.generate("Once upon", GREEDY)
  assert output.text.startswith(" a time")
  assert llm.generate("", GREEDY)[0].text.startswith("Once upon a time")


def test_interval_keeps_a_long_story_small(llm):
  params = SamplingParams(temperature=0, max_tokens=150)
  (output,) = llm.generate("", params, Compression(max_cache_tokens=40, window=8, interval=4))
  assert output.receipt.compressions == 149 // 4 + 1
  assert output.receipt.kvs_kept.sum() <= (40 + 4) * output.receipt.kvs_kept.size
  assert output.receipt.freed_blocks > 0


def test_rate_does_not_compound(llm):
  """Compressing again at the same length frees nothing more."""
  batch = Batch(llm.engine.model, llm.config, 32)
  sequence = _sequence(llm, LONG, Compression(rate=4))
  stepwise.prefill(batch, sequence)
  stepwise.compress(batch, sequence)
  freed, lengths = sequence.freed_blocks, stepwise.receipt(batch, sequence).kvs_kept
  stepwise.compress(batch, sequence)
  assert sequence.freed_blocks == freed
  assert (stepwise.receipt(batch, sequence).kvs_kept == lengths).all()


def test_other_lengths_compile_nothing(short, compiled):
  """Once two have been served, of which one decodes while the other is prefilled."""
  compiled.clear()
  short.generate([LONG[:60], LONG], GREEDY, Compression(rate=4, interval=4))
  before = len(compiled)
  short.generate([LONG[:9], LONG[:200], LONG], GREEDY, Compression(rate=8, window=16, interval=4))
  assert 0 < before == len(compiled)


def test_sampling_depends_on_the_seed_alone(llm):
  params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=7, max_tokens=16)
  first, other = llm.generate(["Once", "Once"], [params, dataclasses.replace(params, seed=8)])
  (again,) = llm.generate("Once", params)
  assert first.token_ids == again.token_ids != other.token_ids
  top_one = SamplingParams(temperature=1.0, top_k=1, max_tokens=16)
  greedy = dataclasses.replace(GREEDY, max_tokens=16)
  assert llm.generate("Once", top_one)[0].text == llm.generate("Once", greedy)[0].text


def test_requests_without_a_seed_differ(llm):
  params = SamplingParams(temperature=1.0, max_tokens=48)
  first, second = llm.generate(["Once", "Once"], params)
  (third,) = llm.generate("Once", params)
  assert len({tuple(o.token_ids) for o in (first, second, third)}) == 3


def test_stop_string_is_left_out_and_streams_the_same(llm):
  plain = llm.generate("", SamplingParams(temperature=0, max_tokens=60))[0]
  stop = "little girl"
  chunks = []
  (output,) = llm.generate("", SamplingParams(temperature=0, max_tokens=60, stop=stop), on_text=chunks.append)
  assert output.finish_reason == "stop"
  assert output.text == plain.text[: plain.text.index(stop)]
  assert "".join(c.text for c in chunks) == output.text
  assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_streaming_pieces_make_up_each_text(llm):
  pieces = {0: "", 1: "", 2: ""}

  def on_text(chunk):
    pieces[chunk.index] += chunk.text

  outputs = llm.generate(["", LONG, "A"], GREEDY, on_text=on_text)
  assert [o.text for o in outputs] == [pieces[i] for i in range(3)]
  assert all(o.finish_reason == "length" and len(o.token_ids) == GREEDY.max_tokens for o in outputs)


def test_a_stop_string_of_held_back_bytes_ends_at_once(llm):
  """The newline is a byte token here, which decoding holds back until the next token."""
  plain = llm.generate("", SamplingParams(temperature=0, max_tokens=90))[0]
  newline = llm.tokenizer.encode("a\n")[-1]
  (output,) = llm.generate("", SamplingParams(temperature=0, max_tokens=90, stop="\n"))
  assert output.text == plain.text.split("\n")[0]
  assert output.token_ids == plain.token_ids[: plain.token_ids.index(newline) + 1]


def test_stop_token_id(llm):
  plain = llm.generate("", GREEDY)[0]
  stop = plain.token_ids[5]
  first = plain.token_ids.index(stop)
  (output,) = llm.generate("", dataclasses.replace(GREEDY, stop_token_ids=(stop,)))
  assert output.finish_reason == "stop"
  assert output.token_ids == plain.token_ids[: first + 1]


def test_context_end_is_length(short):
  (output,) = short.generate([5] * 240, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
  assert output.finish_reason == "length"
  assert len(output.prompt_token_ids) + len(output.token_ids) == 256


def test_a_raising_callback_leaks_no_block(llm):
  def on_text(chunk):
    raise RuntimeError("reader went away")

  with pytest.raises(RuntimeError, match="went away"):
    llm.generate([LONG, ""], GREEDY, on_text=on_text)
  assert llm.free_blocks == llm.config.num_blocks - 1
  assert len(llm.generate([LONG, "", "A"], GREEDY)) == 3


def test_results_come_as_they_end(llm):
  ended = []
  params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (9, 3, 5)]
  outputs = llm.generate(["a", "b", "c"], params, on_result=ended.append)
  assert [o.index for o in ended] == [1, 2, 0]
  assert sorted(ended, key=lambda o: o.index) == outputs


def test_ids_as_prompts_and_empty_list(llm):
  ids = llm.tokenizer.encode("Once upon")
  by_text, by_ids = llm.generate("Once upon", GREEDY)[0], llm.generate(ids, GREEDY)[0]
  assert by_text.text == by_ids.text == llm.generate([ids], GREEDY)[0].text
  assert llm.generate([]) == []


class _Pieces:
  """A decoder that gives out the pieces it was made with."""

  def __init__(self, *pieces):
    self._pieces = list(pieces)

  def add(self, token_id):
    return self._pieces[token_id]

  def peek(self):
    return ""

  def flush(self):
    return ""


@pytest.mark.parametrize(("pieces", "stops", "text", "stopped"), [
    (["ab", "cd"], ("bc",), "a", True),  # across two tokens
    (["ab", "c"], ("bd",), "abc", False),  # held back, then given out
    (["aa", "ab"], ("aab",), "a", True),  # the hold overlaps itself
    (["x END y"], ("END", "x E"), "", True),  # the earliest one counts
    (["ab"], (), "ab", False),
])
def test_output_text(pieces, stops, text, stopped):
  output = OutputText(_Pieces(*pieces), stops)
  given = "".join(output.add(i) for i in range(len(pieces))) + output.finish()
  assert (given, output.text, output.stopped) == (text, text, stopped)
