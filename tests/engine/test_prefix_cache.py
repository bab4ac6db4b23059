"""Cached prefixes: the text is the same with and without them, and what is cached is not prefilled again."""

import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvc_jax import Compression, Engine, FullAttention, InputError, RandomScore, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine.prefix_cache import PrefixCache
from kvc_jax.engine.sequence import Sequence

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3
RULES = (WindowAttention(queries=8), FullAttention(), RandomScore())
GREEDY = SamplingParams(temperature=0, max_tokens=12)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=8, n=2)
AT_THE_END = Compression(rate=3, window=8, scoring=RULES[0])
WHILE_PREFILLING = Compression(max_cache_tokens=24, window=8, prefill_interval=24, scoring=RULES[0])
SCORED_BY_ALL = 6  # of the requests below
INTERVAL = 16  # of the prefixes; block_size is 4, chunks are of 24 and of 7 tokens


def _engine(**options):
  options = {"max_num_seqs": 4, "chunk_size": 24, "prefix_interval": INTERVAL, "rules": RULES, **options}
  return Engine(STORIES, block_size=4, max_model_len=160, **options)


@pytest.fixture(scope="module")
def off():
  return _engine()


@pytest.fixture(scope="module")
def on():
  return _engine(prefix_caching=True)


@pytest.fixture(scope="module")
def tight():
  """Warmed up. Its pool holds one of the longer prompts and little more; its prefixes end within blocks."""
  engine = _engine(prefix_caching=True, prefix_interval=10, chunk_size=7, num_blocks=561, steps_per_sync=3,
                   rules=(RULES[0], RULES[2]))
  engine.warm_up()
  assert not engine._prefixes.held
  return engine


@pytest.fixture(scope="module")
def requests(off):
  ids = off.tokenizer.encode(LONG)
  other = off.tokenizer.encode("The dog saw a big red ball and ran to it. He was very happy and sang a song.")
  assert len(ids) > 90
  assert len(other) > 20
  return [
      (ids[:90], GREEDY, None), (ids[:70] + other[:9], GREEDY, None), (ids[:40] + other, DRAWN, None),
      (ids[:90], GREEDY, AT_THE_END), (ids[:50] + other[:15], GREEDY, AT_THE_END),
      (ids[:66], GREEDY, dataclasses.replace(AT_THE_END, interval=4, scoring=RandomScore(), on_demand=False)),
      (ids[:80], GREEDY, Compression(rate=4, window=8, scoring=FullAttention())),
      (ids[:90], GREEDY, WHILE_PREFILLING), (ids[:80] + other[:20], GREEDY, WHILE_PREFILLING),
      (ids[:80] + other[:9], GREEDY, Compression(rate=4, window=8, prefill_interval=20, scoring=RandomScore())),
  ]


def _serve(engine):
  outputs = {}
  while engine.has_work:
    for update in engine.step():
      if update.output:
        outputs[update.request_id, update.sample] = update.output
  return outputs


def _what(output):
  return output.token_ids, output.text, output.finish_reason, output.receipt.kvs_kept.tolist()


@pytest.fixture(scope="module")
def without(off, requests):
  """What each request says, by sample, without cached prefixes and alone."""
  said = []
  for request in requests:
    off.add(*request)
    said.append({sample: _what(output) for (_, sample), output in _serve(off).items()})
  assert off.stats().prefix_queries == 0
  return said


def _empty(engine):
  """Drops all prefixes; nothing else may hold a block."""
  check_invariants(engine.batch.state, engine._prefixes.held)
  assert engine.stats().free_blocks == engine.config.num_blocks - 1
  while engine._prefixes.drop_oldest():
    pass
  assert engine.batch.free_blocks == engine.config.num_blocks - 1
  check_invariants(engine.batch.state)


def test_steps_beside_chunks_count_among_the_blocks_taken(on, requests, monkeypatch):
  """What is known to be free goes by them, or a prefix is not dropped where it has to be."""
  prefill, spare = on._prefill, []

  def noted(*arguments):
    prefill(*arguments)
    spare.append(on.batch.free_blocks - on._free_now)

  monkeypatch.setattr(on, "_prefill", noted)
  for request in requests:
    on.add(*request)
  _serve(on)
  assert len(spare) > 10
  assert min(spare) >= 0


def test_each_request_twice_alone(on, requests, without):
  """The second time its prefix is cached; also what a request has left serves others."""
  _empty(on)
  for request, said in zip(requests, without, strict=True):
    for again in range(2):
      before = on.stats()
      on.add(*request)
      assert {sample: _what(output) for (_, sample), output in _serve(on).items()} == said, request
      now = on.stats()
      samples, tokens = request[1].n, now.prefix_tokens - before.prefix_tokens
      assert now.prompt_tokens - before.prompt_tokens == samples * len(request[0]) - tokens
      rule = request[2].scoring if request[2] else None
      if isinstance(rule, FullAttention):
        assert now.prefix_queries == before.prefix_queries
      elif again:
        assert now.prefix_hits - before.prefix_hits == samples
        needed = rule.queries if isinstance(rule, WindowAttention) else 1
        last = (len(request[0]) - needed) // INTERVAL * INTERVAL
        if request[2] is None or request[2].prefill_interval is None:
          assert tokens == samples * last
        else:
          assert tokens > 0
    check_invariants(on.batch.state, on._prefixes.held)
  _empty(on)


ACTS = st.one_of(st.integers(0, 9), st.sampled_from(["step", "step", "step", "step", "preempt", "cancel", "drop"]))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(crowded=st.booleans(), acts=st.lists(ACTS, min_size=4, max_size=20))
def test_text_is_the_same_with_and_without(on, tight, requests, without, crowded, acts):
  """In any order of arrival, with others cancelled, preempted and swapped, in a roomy pool and in a full one."""
  engine = tight if crowded else on
  number, outputs = {}, {}
  for act in acts:
    if isinstance(act, int):
      act = 0 if crowded and act == SCORED_BY_ALL else act  # another rule would compile
      number[engine.add(*requests[act])] = act
    elif act == "cancel" and number:
      engine.cancel(max(number))
    elif act == "drop":
      engine._prefixes.drop_oldest()
    elif act == "preempt":
      engine._collect()
      running = [s for s in engine._scheduler.running if not s.finish_reason]
      if running:
        engine._preempt(running[-1])
    else:
      outputs.update({(u.request_id, u.sample): u.output for u in engine.step() if u.output})
      check_invariants(engine.batch.state, engine._prefixes.held)
  outputs.update(_serve(engine))
  for (request_id, sample), output in outputs.items():
    assert _what(output) == without[number[request_id]][sample], requests[number[request_id]]
  _empty(engine)


def test_two_plain_requests_share_memory(on, requests):
  _empty(on)
  prompt = requests[0][0]
  held = []
  for count in (1, 2):
    for _ in range(count):
      on.add(prompt, dataclasses.replace(GREEDY, max_tokens=40, ignore_eos=True))
    while sum(s.decodes for s in on._scheduler.running) < count:
      on.step()
    on._collect()
    held.append(on.config.num_blocks - 1 - on.batch.free_blocks)
    assert sum(s.held_blocks for s in on._scheduler.running) >= count * on.config.blocks_for(len(prompt))
    _serve(on)
    _empty(on)
  own = on.config.blocks_for(len(prompt) - len(prompt) // INTERVAL * INTERVAL + 40)
  assert held[0] < held[1] <= held[0] + own < 2 * held[0]


def test_settings_that_matter_are_part_of_the_key(requests):
  """A prefix is found by requests whose KVs at the boundary are the same, and by no others."""
  ids = requests[0][0]

  def sequence(prompt, compression=None, prefill_interval=None):
    return Sequence(request_id=0, prompt=prompt, params=GREEDY, compression=compression, output=None,
                    prefill_interval=prefill_interval, prefilled=INTERVAL)

  cache = PrefixCache(INTERVAL, lambda held: None)
  cache.keep(sequence(ids), "plain")
  cache.keep(sequence(ids, WHILE_PREFILLING, 24), "compressed")
  assert cache.find(sequence(ids[:30])) == (INTERVAL, "plain")
  assert cache.find(sequence(ids[:30], AT_THE_END)) == (INTERVAL, "plain")
  assert cache.find(sequence(ids[:INTERVAL])) is None  # one token at least is run
  assert cache.find(sequence(ids[:INTERVAL + 7], AT_THE_END)) is None  # its 8 queries begin in the prefix
  assert cache.find(sequence([1, *ids[:30]])) is None
  assert cache.find(sequence(ids, dataclasses.replace(WHILE_PREFILLING, interval=3), 24)) == (INTERVAL, "compressed")
  same_budget = dataclasses.replace(WHILE_PREFILLING, max_cache_tokens=None, rate=(90 - 8) / (24 - 8))
  assert cache.find(sequence(ids[:90], same_budget, 24)) == (INTERVAL, "compressed")
  for change in ({"max_cache_tokens": 25}, {"window": 9}, {"sinks": 1}, {"keep": ((0, 2),)}, {"allocation": "head"},
                 {"scoring": WindowAttention(queries=8, power=1)}):
    assert cache.find(sequence(ids, dataclasses.replace(WHILE_PREFILLING, **change), 24)) is None
  assert cache.find(sequence(ids, WHILE_PREFILLING, 12)) is None
  assert not cache.serves(sequence(ids, Compression(rate=2, scoring=FullAttention())))


def test_prefixes_give_way_before_anybody_waits(tight, requests):
  """They fill the pool when nothing runs, and keep no request from starting."""
  _empty(tight)
  before = tight.stats()
  prompt = requests[0][0]
  for first in range(3, 9):
    tight.add([first, *prompt[1:]], GREEDY)
    _serve(tight)
  assert tight.batch.free_blocks < tight.config.blocks_for(len(prompt))
  assert tight.stats().preemptions == before.preemptions
  assert tight.stats().free_blocks == tight.config.num_blocks - 1
  _empty(tight)


def test_nothing_compiles_after_warm_up(tight, requests, compiled):
  before = tight.stats()
  compiled.clear()
  for _ in range(2):
    for i in (0, 1, 3, 4, 7, 8, 9):
      tight.add(*requests[i])
    _serve(tight)
  assert compiled == []
  assert tight.stats().prefix_hits - before.prefix_hits > 3
  _empty(tight)


def test_a_request_leaves_and_comes_back_from_a_file(on, requests, without, tmp_path):
  _empty(on)
  for _ in range(2):
    number = on.add(*requests[0])
    while not any(s.decodes for s in on._scheduler.running):
      on.step()
    on.step()
  on.save(number, tmp_path / "saved")
  _serve(on)
  resumed = on.resume(tmp_path / "saved")
  assert _what(_serve(on)[resumed, 0]) == without[0][0]
  on.reset()
  assert not on._prefixes.held
  _empty(on)


def test_a_wrong_interval_is_refused():
  with pytest.raises(InputError, match="prefix_interval"):
    Engine(STORIES, prefix_interval=0)


def test_counts_of_a_hit(on, requests):
  _empty(on)
  before = on.stats()
  for _ in range(2):
    on.add(*requests[0])
    _serve(on)
  now = on.stats()
  gained = {name: getattr(now, name) - getattr(before, name) for name in ("prefix_queries", "prefix_hits",
                                                                          "prefix_tokens", "prompt_tokens")}
  assert gained == {"prefix_queries": 2, "prefix_hits": 1, "prefix_tokens": 80, "prompt_tokens": 90 + 10}
  assert np.asarray(on.kvs_kept()).sum() == 0
