"""Perplexity against a dense forward pass, and against the log-probabilities that the engine itself gives."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attend

from kvc_jax import Compression, Engine, FullAttention, InputError, SamplingParams
from kvc_jax.evaluation import perplexity
from kvc_jax.evaluation.perplexity import Window, run_perplexity, windows_of

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
TEXT = (STORIES / "expected_200_steps.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def engine():
  return Engine(STORIES, block_size=4, max_num_seqs=2, chunk_size=32)


@pytest.fixture(scope="module")
def windows(engine):
  return windows_of(engine.tokenizer, TEXT, context_tokens=50, target_tokens=15)


def dense_nll(engine, window):
  ids = jnp.array(window.context + window.targets)
  hidden, _ = engine.model(ids, jnp.arange(len(ids)), dense_attend, None)
  logprobs = np.array(jax.nn.log_softmax(engine.model.logits(hidden), axis=-1), np.float64)
  first = len(window.context)
  return -sum(logprobs[first - 1 + i, token] for i, token in enumerate(window.targets))


def test_uncompressed_is_that_of_a_dense_pass(engine, windows, tmp_path):
  free = engine.batch.free_blocks
  records = run_perplexity(engine, windows, tmp_path / "perplexity.jsonl", None, {})
  assert [record["id"] for record in records] == ["0", "1", "2"]
  for record, window in zip(records, windows, strict=True):
    nll = dense_nll(engine, window)
    assert record["nll"] == pytest.approx(nll, abs=1e-3)
    # The tolerance tells the window from one that is shifted by a token.
    shifted = Window(context=window.context + window.targets[:1], targets=window.targets[1:])
    assert abs(dense_nll(engine, shifted) - nll) > 1e-2
    assert (record["prompt_tokens"], record["predicted_tokens"]) == (50, 15)
    assert record["blocks_held"] == record["blocks_uncompressed"] == engine.config.blocks_for(64)
  assert engine.batch.free_blocks == free


@pytest.mark.parametrize("compression", [
    Compression(rate=4, window=4),
    Compression(rate=4, window=4, interval=3, scoring=FullAttention(buffer=4)),
    Compression(max_cache_tokens=12, window=4, prefill_interval=16, allocation="head"),
])
def test_compressed_is_what_the_engine_says_of_its_own_text(engine, windows, tmp_path, compression):
  asked = {engine.add(window.context, SamplingParams(temperature=0, max_tokens=15, logprobs=0), compression): window
           for window in windows}
  outputs = {}
  while engine.has_work:
    for update in engine.step():
      if update.output:
        outputs[update.request_id] = update.output
  own = [Window(context=asked[at].context, targets=outputs[at].token_ids) for at in asked]
  records = run_perplexity(engine, own, tmp_path / "perplexity.jsonl", compression, {})
  plain = run_perplexity(engine, own, tmp_path / "plain.jsonl", None, {})
  for record, uncompressed, output in zip(records, plain, outputs.values(), strict=True):
    assert record["nll"] == pytest.approx(-sum(token.logprob for token in output.logprobs), abs=1e-4)
    assert abs(record["nll"] - uncompressed["nll"]) > 1e-3
    assert record["kvs_kept"] == output.receipt.kvs_kept.tolist()
    assert record["bytes_held"] == output.receipt.bytes_held < uncompressed["bytes_held"]


def test_a_broken_run_goes_on(engine, windows, tmp_path):
  path = tmp_path / "perplexity.jsonl"
  whole = run_perplexity(engine, windows, path, None, {})
  path.write_bytes(path.read_bytes()[:-20])
  again = run_perplexity(engine, windows, path, None, {})
  assert [r["nll"] for r in again] == pytest.approx([r["nll"] for r in whole], abs=1e-4)
  assert again[:2] == whole[:2]
  with pytest.raises(InputError, match="was made with windows"):
    run_perplexity(engine, windows[:2], path, None, {})


def test_windows_lie_one_behind_the_other(engine, monkeypatch):
  tokenizer = engine.tokenizer
  windows = windows_of(tokenizer, TEXT, context_tokens=11, target_tokens=5, most=4)
  assert len(windows) == 4
  assert all(window.context[0] == tokenizer.bos_id for window in windows)
  ids = [i for window in windows for i in window.context[1:] + window.targets]
  assert ids == tokenizer.encode(TEXT, add_special_tokens=False)[:60]
  every = windows_of(tokenizer, TEXT, context_tokens=11, target_tokens=5)
  assert len(every) == len(tokenizer.encode(TEXT, add_special_tokens=False)) // 15
  monkeypatch.setattr(perplexity, "_WIDEST_TOKEN", 1)  # as if a piece of the text was too short
  assert windows_of(tokenizer, TEXT, context_tokens=11, target_tokens=5, most=4) == windows


def test_windows_that_do_not_fit_are_named(engine, windows, tmp_path):
  with pytest.raises(InputError, match="3 tokens, but a window takes 9"):
    windows_of(engine.tokenizer, "a dog", context_tokens=5, target_tokens=5)
  for name, options in [("--context-tokens", (1, 5, 1)), ("--target-tokens", (5, 0, 1)), ("--windows", (5, 5, 0))]:
    context, targets, most = options
    with pytest.raises(InputError, match=name):
      windows_of(engine.tokenizer, TEXT, context_tokens=context, target_tokens=targets, most=most)
  long = [Window(context=[1] * 500, targets=[1] * 50)]
  with pytest.raises(InputError, match=r"500 \+ 50 tokens, but the context is 512"):
    run_perplexity(engine, long, tmp_path / "a.jsonl", None, {})
