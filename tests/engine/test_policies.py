"""Every scoring rule through the engine, on the shipped model."""

import dataclasses

import numpy as np
import pytest

from kvc_jax import LLM, Compression, SamplingParams
from kvc_jax.eviction.rules import RULES

PROMPT = "Once upon a time, there was a little dog named Tim. He liked to play. " * 2
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
WINDOW, BLOCK = 6, 4


@pytest.fixture(scope="module")
def llm():
  return LLM("assets/stories260K", block_size=BLOCK, max_num_seqs=2, chunk_size=32, dtype="float32")


def _compression(name, **options):
  again = {} if name == "expected" else {"interval": 4}
  return Compression(window=WINDOW, scoring=RULES[name](), **again, **options)


@pytest.mark.parametrize("name", ["snapkv", "tova", "expected"])
def test_a_rule_compresses_while_a_prompt_is_prefilled(llm, name):
  compression = Compression(rate=4, window=WINDOW, scoring=RULES[name](), prefill_interval=20)
  output = llm.generate(PROMPT, dataclasses.replace(GREEDY, max_tokens=1), compression)[0]
  tokens = len(output.prompt_token_ids)
  assert output.receipt.compressions == -(-tokens // 20) >= 3
  allowed = -(-compression.cache_tokens(tokens) // BLOCK) * output.receipt.kvs_kept.size
  assert output.receipt.blocks_held == allowed


@pytest.mark.parametrize("name", RULES)
def test_a_rule_meets_its_budget_and_changes_nothing_without_one(llm, name):
  plain = llm.generate(PROMPT, GREEDY)[0]
  loose = llm.generate(PROMPT, GREEDY, _compression(name, rate=1))[0]
  assert loose.token_ids == plain.token_ids
  assert loose.receipt.freed_blocks == 0
  compression = _compression(name, rate=4)
  tight = llm.generate(PROMPT, GREEDY, compression, return_positions=True)[0]
  tokens, heads = tight.receipt.tokens_seen, tight.receipt.kvs_kept.size
  at_last = tokens if compression.interval is None else tokens - (len(tight.token_ids) - 1) % 4
  budget = -(-compression.cache_tokens(at_last) // BLOCK) * heads
  grown = -(-(tokens - (len(tight.prompt_token_ids) if compression.interval is None else at_last)) // BLOCK) * heads
  assert tight.receipt.blocks_held <= budget + grown < tight.receipt.blocks_uncompressed
  newest = np.arange(tokens - WINDOW + 4, tokens)
  for row in tight.receipt.positions.reshape(-1, tight.receipt.positions.shape[-1]):
    assert np.isin(newest, row).all()
  assert llm.free_blocks == llm.config.num_blocks - 1
