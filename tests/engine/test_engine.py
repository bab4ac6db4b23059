"""`Engine` on the shipped model: the text does not depend on the load."""

import collections
import dataclasses
import logging
import pathlib

import jax
import numpy as np
import pytest
import stepwise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvc_jax import (
  Compression,
  Engine,
  FullAttention,
  InputError,
  RandomScore,
  SamplingParams,
  WindowAttention,
)
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.flight import worthwhile_steps
from kvc_jax.engine.kinds import kind_of
from kvc_jax.engine.sequence import Sequence

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 5
RULES = (WindowAttention(), FullAttention(), RandomScore())
GREEDY = SamplingParams(temperature=0, max_tokens=24)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=20, logprobs=2)

REQUESTS = [
    ("Once upon a time", GREEDY, None),
    (LONG[:150], GREEDY, None),
    (LONG[:150], DRAWN, None),
    (LONG[:120], GREEDY, Compression(rate=4, window=8)),
    (LONG[:200], GREEDY, Compression(rate=3, window=8, interval=5, scoring=FullAttention(), keep=[(2, 9)])),
    (LONG[:90], DRAWN, Compression(max_cache_tokens=24, window=8, sinks=2, interval=3)),
    (LONG[:130], GREEDY, Compression(rate=4, window=4, interval=4, scoring=RandomScore())),
    (LONG, dataclasses.replace(GREEDY, max_tokens=12), Compression(
        max_cache_tokens=48, window=16, prefill_interval=20)),
    ("The dog", dataclasses.replace(GREEDY, stop="."), None),
]


@pytest.fixture(scope="module")
def roomy():
  return Engine(STORIES, max_num_seqs=4, block_size=4, chunk_size=32, max_model_len=256, rules=RULES)


@pytest.fixture(scope="module")
def tight():
  """A pool that holds no two of the longer requests, small chunks, few steps at a time."""
  return Engine(STORIES, max_num_seqs=5, block_size=4, chunk_size=7, max_model_len=256, num_blocks=601, rules=RULES,
                steps_per_sync=3)


def _serve(engine, updates=None):
  """Steps until all is done; returns {(request id, sample): output}."""
  outputs = {}
  while engine.has_work:
    for update in engine.step():
      if updates is not None:
        updates.append(update)
      if update.output:
        outputs[update.request_id, update.sample] = update.output
  return outputs


def _what(output):
  return output.token_ids, output.text, output.finish_reason


@pytest.fixture(scope="module")
def alone(roomy):
  """What each of REQUESTS gives when nothing else is served."""
  expected = []
  for request in REQUESTS:
    roomy.add(*request)
    (output,) = _serve(roomy).values()
    expected.append(_what(output))
  return expected


def _check_empty(engine):
  assert engine.batch.free_blocks == engine.stats().free_blocks == engine.config.num_blocks - 1
  assert engine.stats().running == engine.stats().waiting == 0
  check_invariants(engine.batch.state)


ACTS = st.one_of(
    st.integers(0, len(REQUESTS) - 1), st.sampled_from(["step", "step", "step", "step", "preempt", "cancel"]))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(crowded=st.booleans(), acts=st.lists(ACTS, min_size=4, max_size=24))
def test_text_is_the_same_whatever_else_is_served(roomy, tight, alone, crowded, acts):
  """Alone, in any batch and order, in chunks of 32 and of 7, with others cancelled, after preemption by swap."""
  engine = tight if crowded else roomy
  number = {}
  outputs = {}
  for act in acts:
    if isinstance(act, int):
      number[engine.add(*REQUESTS[act])] = act
    elif act == "cancel" and number:
      last = max(number)
      assert engine.cancel(last) == (last not in {i for i, _ in outputs})
    elif act == "preempt":
      engine._collect()
      decoding = [s for s in engine._scheduler.running if s.decodes]
      if decoding:
        engine._preempt(decoding[0])
    else:
      outputs.update({(u.request_id, u.sample): u.output for u in engine.step() if u.output})
  outputs.update(_serve(engine))
  for (request_id, _), output in outputs.items():
    assert _what(output) == alone[number[request_id]], REQUESTS[number[request_id]]
  _check_empty(engine)


def test_a_crowd_swaps_and_starts_over_and_loses_nothing(tight, alone, monkeypatch):
  for swap_bytes in (4 << 30, 0):
    monkeypatch.setattr(tight, "_swap_bytes", swap_bytes)
    before = tight.stats()
    ids = {tight.add(*request): i for i, request in enumerate(REQUESTS) for _ in range(2)}
    updates = []
    outputs = _serve(tight, updates)
    assert all(_what(output) == alone[ids[i]] for (i, _), output in outputs.items())
    assert len(outputs) == 2 * len(REQUESTS)
    now = tight.stats()
    assert now.preemptions > before.preemptions
    assert (now.swaps > before.swaps) == (swap_bytes > 0)
    pieces = collections.defaultdict(str)
    for update in updates:
      pieces[update.request_id] += update.text
    assert all(pieces[i] == output.text for (i, _), output in outputs.items())
    _check_empty(tight)


def test_another_rule_compiles_when_it_comes_and_says_so_once(roomy, caplog, monkeypatch):
  kinds = {kind_of(kind) for kind in roomy.default_kinds() if kind}
  monkeypatch.setattr(roomy, "_compiled", kinds)  # as behind warm_up
  with caplog.at_level(logging.WARNING, logger="kvc_jax"):
    roomy.add("Once", GREEDY, Compression(rate=2))
    assert not caplog.messages
    for _ in range(2):
      roomy.add("Once", GREEDY, Compression(rate=2, scoring=WindowAttention(queries=3)))
  assert len(caplog.messages) == 1
  assert "compile while serving; give them to Engine" in caplog.text
  assert len(_serve(roomy)) == 3


def test_a_prompt_eight_times_larger_than_the_pool_is_answered():
  """In chunks of any size it gives the same text and keeps the same KVs."""
  pool_tokens = 6 * 4
  found = collections.defaultdict(list)
  for chunk_size in (5, 64):
    engine = Engine(
        STORIES, max_num_seqs=2, block_size=4, chunk_size=chunk_size, num_blocks=6 * 20 + 1, rules=RULES)
    prompt = engine.tokenizer.encode(LONG * 2)[: 8 * pool_tokens + 1]
    assert len(prompt) > 8 * pool_tokens
    for compression in (Compression(max_cache_tokens=12, window=4),
                        Compression(rate=16, window=4, scoring=FullAttention(), interval=4)):
      request = engine.add(prompt, dataclasses.replace(GREEDY, max_tokens=8), compression, return_positions=True)
      engine.add("A", dataclasses.replace(GREEDY, max_tokens=4))  # it waits, and is served as well
      outputs = _serve(engine)
      first = outputs[request, 0]
      assert len(outputs) == 2
      assert (first.finish_reason, len(first.token_ids)) == ("length", 8)
      assert first.receipt.compressions > 8
      found[chunk_size].append((first.token_ids, first.receipt.positions.tolist()))
    _check_empty(engine)
  assert found[5] == found[64]


def test_memory_while_prefilling_stays_below_the_budget_and_one_interval(roomy):
  """A pool with room for all of it: what is held follows from the request."""
  compression = Compression(max_cache_tokens=24, window=8, prefill_interval=16)
  roomy.add(LONG, GREEDY, compression)
  most = 0
  while roomy.has_work:
    roomy.step()
    roomy._collect()
    most = max(most, roomy.config.num_blocks - 1 - roomy.batch.free_blocks)
  # 24 generated tokens come on top of the budget, but not on top of an interval.
  assert roomy.config.blocks_for(40) * 0.6 < most <= roomy.config.blocks_for(24 + 24)


def test_a_request_that_cannot_fit_is_refused_with_the_remedy(tight):
  with pytest.raises(InputError, match=r"the prompt needs 1280 blocks, but the pool has 600.*compress it"):
    tight.add([5] * 255)
  with pytest.raises(InputError, match="even when it is compressed"):
    tight.add([5] * 255, None, Compression(rate=1.2))
  with pytest.raises(InputError, match="sampling_params must be"):
    tight.add("a", {"n": 2})
  assert not tight.has_work


def test_keep_protects_its_ranges(roomy):
  roomy.add(LONG, GREEDY, Compression(
      max_cache_tokens=24, window=4, interval=6, keep=[(10, 16), (30, 33)], scoring=FullAttention()),
      return_positions=True)
  (output,) = _serve(roomy).values()
  kept = {*range(10, 16), *range(30, 33)}
  for head in output.receipt.positions.reshape(-1, output.receipt.positions.shape[-1]):
    assert kept <= set(head.tolist())
  assert output.receipt.kvs_kept.max() < 60


def test_samples_of_one_prompt(roomy):
  roomy.add("Once", dataclasses.replace(DRAWN, n=3))
  outputs = _serve(roomy)
  assert [sample for _, sample in sorted(outputs)] == [0, 1, 2]
  assert len({tuple(o.token_ids) for o in outputs.values()}) == 3
  roomy.add("Once", DRAWN)
  (single,) = _serve(roomy).values()
  assert single.token_ids == next(o for (_, sample), o in outputs.items() if sample == 0).token_ids


def test_logprobs_are_those_of_the_logits(roomy):
  roomy.add("Once upon a time", dataclasses.replace(GREEDY, logprobs=3, max_tokens=12))
  updates = []
  (output,) = _serve(roomy, updates).values()
  batch = Batch(roomy.model, roomy.config, 32)
  sequence = Sequence(request_id=0, prompt=output.prompt_token_ids, params=GREEDY, compression=None, output=None)
  logits = stepwise.prefill(batch, sequence)
  for found, token in zip(output.logprobs, output.token_ids, strict=True):
    expected = np.asarray(jax.nn.log_softmax(logits))
    best = np.argsort(-expected)[:3]
    assert found.token_id == token == best[0]
    assert [i for i, _ in found.top] == best.tolist()
    np.testing.assert_allclose([p for _, p in found.top], expected[best], atol=1e-5)
    assert found.logprob == found.top[0][1]
    sequence.token_ids.append(token)
    step, _ = stepwise.decode(batch, [sequence])
    logits = step[sequence.slot]
  assert sum((u.logprobs for u in updates), ()) == output.logprobs


def test_cancel_frees_at_once(roomy):
  first = roomy.add(LONG, dataclasses.replace(DRAWN, n=2, max_tokens=100))
  for _ in range(4):
    roomy.step()
  second = roomy.add(LONG, GREEDY)
  assert roomy.stats().running
  assert roomy.kvs_kept().sum() > 0
  assert roomy.cancel(first)
  assert roomy.cancel(second)
  assert not roomy.cancel(first)
  assert not roomy.cancel(10**6)
  _check_empty(roomy)
  assert not roomy.has_work
  assert roomy.step() == []


def test_compression_on_demand_lets_others_start(tight):
  """A request that grew beyond its budget shrinks when the next one lacks just those blocks."""
  params = dataclasses.replace(GREEDY, max_tokens=90, ignore_eos=True)
  for on_demand in (False, True):
    tight.add(LONG[:60], params, Compression(max_cache_tokens=16, window=4, on_demand=on_demand))
    while tight.stats().free_blocks > 210:
      tight.step()
    tight.add(LONG[:120], GREEDY)
    for _ in range(4):
      tight.step()
    assert tight.stats().running == 1 + on_demand
    _serve(tight)
  _check_empty(tight)


def test_memory_pressure_compresses_those_that_allow_it_first(tight):
  """Where nobody allows it, the newest gives way; where all do, nobody has to."""
  params = dataclasses.replace(GREEDY, max_tokens=90, ignore_eos=True)
  for on_demand in (False, True):
    before = tight.stats()
    for _ in range(3):
      tight.add("Once upon a time", params, Compression(max_cache_tokens=16, window=4, on_demand=on_demand))
    outputs = _serve(tight)
    assert all(len(o.token_ids) == 90 for o in outputs.values())
    now = tight.stats()
    assert (now.preemptions > before.preemptions) == (not on_demand)
    assert (now.freed_blocks > before.freed_blocks) == on_demand
    _check_empty(tight)


def test_planning_ahead_spares_everybody_from_giving_way(tight, monkeypatch):
  """The same texts, no preemption, and requests with short outputs still run together."""
  params = dataclasses.replace(GREEDY, max_tokens=90, ignore_eos=True)
  texts = []
  for share in (0.0, 1.0):
    monkeypatch.setattr(tight._scheduler, "_plan_ahead", share)
    before, most = tight.stats().preemptions, 0
    for _ in range(4):
      tight.add("Once upon a time", params)
    outputs = {}
    while tight.has_work:
      outputs |= {u.request_id: u.output.token_ids for u in tight.step() if u.output}
      most = max(most, tight.stats().running)
    texts.append(list(outputs.values()))
    assert (tight.stats().preemptions > before) == (share == 0.0)
    assert most > 1
  assert sorted(texts[0]) == sorted(texts[1])
  with pytest.raises(InputError, match="plan_ahead"):
    Engine(STORIES, plan_ahead=1.5)


@pytest.mark.parametrize(("limits", "steps"), [
    ([], 0), ([16], 16), ([8, 8], 8), ([16, 3, 3, 3], 3),
    ([16, 16, 3], 3),  # 9 tokens in 3.5 steps' time, or 35 in 16.5
    ([*[16] * 39, 15], 16),  # 639 in 16.5, or 600 in 15.5
])
def test_a_loop_is_as_long_as_is_worthwhile(limits, steps):
  assert worthwhile_steps(limits) == steps


def test_a_compression_that_is_due_is_not_lost_on_the_way(roomy, alone):
  """A sequence that gives way between a step and the compression behind it is compressed when it is back."""
  number = roomy.add(*REQUESTS[5])
  (sequence,) = roomy._requests[number]
  while not (sequence.slot >= 0 and sequence.is_due):
    roomy.step()
    roomy._collect()
  roomy._preempt(sequence)
  (output,) = _serve(roomy).values()
  assert _what(output) == alone[5]
