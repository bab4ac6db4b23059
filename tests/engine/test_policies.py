"""Every scoring rule through the engine, on the shipped model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax import LLM, Compression, Engine, FullAttention, InputError, SamplingParams
from kvc_jax.eviction.rules import RULES
from kvc_jax.eviction.score_key_norm import KeyNorm

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


@dataclasses.dataclass(frozen=True)
class _Curious(KeyNorm):
  """Would choose otherwise if it found a decode query, though it observes none."""

  def look(self, kvs):
    found = super().look(kvs)
    return found if kvs.log_sums is None else jnp.where(jnp.isfinite(kvs.log_sums).any(), -found, found)


def test_a_rule_that_observes_nothing_sees_no_query_of_others():
  """Requests that are decoded together share steps, and others' steps keep queries."""
  engine = Engine("assets/stories260K", block_size=BLOCK, max_num_seqs=2, chunk_size=32, dtype="float32")

  def serve(*rules):
    own, *_ = [
        engine.add(PROMPT, GREEDY, Compression(rate=4, window=WINDOW, scoring=rule, interval=4), return_positions=True)
        for rule in rules]
    outputs = {}
    while engine.has_work:
      outputs |= {update.request_id: update.output for update in engine.step() if update.output}
    return outputs[own]

  alone, beside = serve(_Curious()), serve(_Curious(), FullAttention())
  assert alone.token_ids == beside.token_ids
  np.testing.assert_array_equal(alone.receipt.positions, beside.receipt.positions)


@pytest.mark.parametrize(("changes", "message"), [
    ({"queries": 0}, "queries is 0"), ({"pooling": 4}, "an odd width"), ({"pool": "sum"}, "pool is 'sum'")])
def test_rules_of_ones_own_are_checked_with_the_request(changes, message):
  own = type("Own", (KeyNorm,), {"observed": "last", "queries": 8, **changes})
  with pytest.raises(InputError, match=message):
    Compression(rate=2, scoring=own())
