"""The next call of decode steps is dispatched before the results of the last one are read."""

import collections
import dataclasses
import itertools
import pathlib

import pytest
from engine_outputs import what

from kvc_jax import Compression, Engine, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine.flight import Flight

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
PROMPTS = ("Once upon a time", "Tom had a big", "The sun was hot and", "Lily and Ben")
OPTIONS = {"max_num_seqs": 4, "block_size": 4, "chunk_size": 32, "max_model_len": 256, "steps_per_sync": 4,
           "rules": (WindowAttention(),)}
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
AS_IT_GOES = Compression(rate=2, window=8, interval=10)


@pytest.fixture(scope="module")
def shared():
  return Engine(STORIES, **OPTIONS)


@pytest.fixture
def engine(shared):
  yield shared
  shared.reset()


def _serve(engine):
  outputs = {}
  while engine.has_work:
    outputs |= {u.request_id: u.output for u in engine.step() if u.output}
  assert engine.batch.free_blocks == engine.stats().free_blocks == engine.config.num_blocks - 1
  check_invariants(engine.batch.state)
  return [outputs[i] for i in sorted(outputs)]


def _without(engine, requests):
  """What each request gives alone, with nothing dispatched ahead."""
  found = []
  with pytest.MonkeyPatch.context() as patch:
    for name in ("_prefill_ahead", "_decode_ahead"):
      patch.setattr(engine, name, lambda: None)
    for request in requests:
      engine.add(*request)
      found += map(what, _serve(engine))
  return found


@pytest.fixture
def events(engine, monkeypatch):
  """Names of what the engine dispatches and reads, in their order."""
  found = []

  def note(owner, name):
    call = getattr(owner, name)

    def noted(*args):
      found.append(name)
      return call(*args)

    monkeypatch.setattr(owner, name, noted)

  for name in ("mixed", "decode", "usage", "compress"):
    note(engine.batch, name)
  note(Flight, "land")
  return found


def _until_it_decodes(engine):
  while not engine._decoded_ahead:
    engine.step()


def test_the_next_steps_go_before_results_are_read(engine, events):
  for prompt in PROMPTS[:2]:
    engine.add(prompt, GREEDY)
  _until_it_decodes(engine)
  for _ in range(3):
    events.clear()
    engine.step()
    assert events == ["land", "usage", "decode"]


def test_a_chunk_goes_behind_the_steps_ahead_with_a_step_of_its_own(engine, events):
  requests = [(prompt, GREEDY) for prompt in PROMPTS[:3]]
  expected = _without(engine, requests)
  for request in requests[:2]:
    engine.add(*request)
  _until_it_decodes(engine)
  engine.add(*requests[2])
  before = engine._newest
  events.clear()
  engine.step()
  assert events[:2] == ["land", "mixed"]
  assert "decode" not in events
  assert engine._newest is not before
  assert engine._newest.sequences == before.sequences
  assert [what(output) for output in _serve(engine)] == expected


def test_nothing_goes_ahead_of_the_last_end(engine):
  engine.add(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=10))
  engine.step()
  engine._collect()
  for steps in (2, 2, 1, 0):  # of 9, behind the first call's 4
    engine.step()
    assert engine._decoded_ahead == bool(steps)
    assert (engine._newest.limits if steps else [0]) == [steps]


def test_compressions_that_are_due_go_ahead(engine, events):
  request = (PROMPTS[0], GREEDY, AS_IT_GOES)
  expected = _without(engine, [request])
  events.clear()
  engine.add(*request)
  assert list(map(what, _serve(engine))) == expected
  assert " ".join(events).count("usage compress usage decode land") >= 2  # behind a flight, before it is read
  assert engine.stats().compressions == 2 * expected[0][5]  # alone, and now


def test_who_ends_where_a_compression_is_due_was_not_compressed(engine, events):
  """The device did so before anybody saw the stop."""
  ((tokens, *_),) = _without(engine, [(PROMPTS[0], GREEDY, AS_IT_GOES)])
  at = next(n for n in (10, 20) if tokens[n] not in tokens[:n])  # drawn by the step that one is due behind
  requests = [(PROMPTS[0], dataclasses.replace(GREEDY, stop_token_ids=(tokens[at],)), AS_IT_GOES)]
  expected = _without(engine, requests)
  events.clear()
  engine.add(*requests[0])
  assert list(map(what, _serve(engine))) == expected
  assert "usage compress usage decode land" in " ".join(events)


def test_few_that_sit_out_do_not_keep_many_from_going_on(engine, monkeypatch):
  """Nobody sits out of call after call: who was at rest when one went ahead joins the next."""
  monkeypatch.setattr("kvc_jax.engine.engine.SYNC_STEPS", 100.0)  # four are never many
  requests = [(prompt, dataclasses.replace(GREEDY, max_tokens=12 + 5 * i), AS_IT_GOES if i % 2 else None)
              for i, prompt in enumerate(PROMPTS * 2)]
  expected = _without(engine, requests)
  for request in requests:
    engine.add(*request)
  rested = collections.Counter()
  outputs = {}
  while engine.has_work:
    outputs |= {u.request_id: u.output for u in engine.step() if u.output}
    if engine._decoded_ahead:
      for sequence in engine._scheduler.running:
        goes = sequence in engine._newest.sequences
        rested[sequence.order] = 0 if goes else rested[sequence.order] + 1
        assert rested[sequence.order] <= 2 or not sequence.decodes
  assert [what(outputs[i]) for i in sorted(outputs)] == expected


def test_who_can_be_compressed_for_others_rests_while_others_wait(engine):
  for prompt in PROMPTS:
    engine.add(prompt, GREEDY, Compression(rate=2, window=8, on_demand=True))
  _until_it_decodes(engine)
  engine.add(PROMPTS[0], GREEDY)
  engine.step()
  assert engine.stats().waiting == 1
  assert not engine._decoded_ahead


def test_steps_ahead_take_no_more_than_a_block_of_each_head_while_others_wait(engine, monkeypatch):
  monkeypatch.setattr(engine.batch, "steps_per_sync", 16)
  for number in range(5):
    engine.add(PROMPTS[number % 4], GREEDY)
  _until_it_decodes(engine)
  assert engine.stats().waiting == 1
  assert set(engine._newest.limits) == {engine.config.block_size}


def test_nothing_goes_ahead_of_cached_prefixes():
  engine = Engine(STORIES, prefix_caching=True, **OPTIONS)
  engine.add(PROMPTS[0], GREEDY)
  while engine.has_work:
    engine.step()
    assert not engine._decoded_ahead


@pytest.mark.parametrize("params", [
    {"stop": (" to play",)}, {"stop_token_ids": "seventh"}, {"temperature": 1.0, "seed": 5, "logprobs": 2}],
    ids=["on the host", "on the device", "sampled"])
def test_who_ends_in_the_middle_takes_nothing_from_what_goes_ahead(engine, params):
  """Its further steps are for nothing; its slot serves the next."""
  if params.get("stop_token_ids") == "seventh":
    ((tokens, *_),) = _without(engine, [(PROMPTS[0], GREEDY)])
    params = {"stop_token_ids": (tokens[6],), "ignore_eos": True}
  ends = dataclasses.replace(GREEDY, **params)
  requests = [(PROMPTS[0], ends), *((prompt, GREEDY) for prompt in PROMPTS[1:]), (PROMPTS[0], GREEDY, AS_IT_GOES)]
  expected = _without(engine, requests)
  for request in requests:
    engine.add(*request)
  found = [what(output) for output in _serve(engine)]
  if "stop" in params:  # what the host sees late costs steps, and how many depends on what else is served
    found[0], expected[0] = found[0][:4], expected[0][:4]
  assert found == expected
  if "temperature" not in params:
    assert expected[0][2] == "stop"


def test_a_cancelled_request_leaves_nothing_behind(engine):
  numbers = [engine.add(prompt, GREEDY) for prompt in PROMPTS[:2]]
  expected = _without(Engine(STORIES, **OPTIONS), [(PROMPTS[1], GREEDY)])
  _until_it_decodes(engine)
  assert engine.cancel(numbers[0])
  assert not engine._decoded_ahead
  assert [what(output) for output in _serve(engine)] == expected


def test_cancelling_another_leaves_the_receipt_of_who_stopped_at_a_boundary(engine):
  """Both calls are read at once then, the compression between them too."""
  ((tokens, *_),) = _without(engine, [(PROMPTS[0], GREEDY, AS_IT_GOES)])
  at = next(n for n in (10, 20) if tokens[n] not in tokens[:n])
  request = (PROMPTS[0], dataclasses.replace(GREEDY, stop_token_ids=(tokens[at],)), AS_IT_GOES)
  (expected,) = _without(engine, [request])
  met = 0
  for steps in range(2, 12):
    other = engine.add(PROMPTS[1], GREEDY)
    mine = engine.add(*request)
    outputs = {}
    for number in itertools.count(1):
      if not engine.has_work:
        break
      outputs |= {u.request_id: u.output for u in engine.step() if u.output}
      if number == steps:
        met += any(s.request_id == mine and s.ahead and s.compressed_at > s.tokens_seen
                   for s in engine._scheduler.running)
        engine.cancel(other)
    assert what(outputs[mine]) == expected
  assert met


@pytest.fixture(scope="module")
def tight():
  """One request of 60 tokens needs 321 of the blocks."""
  return Engine(STORIES, num_blocks=341, **OPTIONS | {"steps_per_sync": 8})


@pytest.mark.parametrize("at", [17, 26, 30])
def test_who_finds_no_block_behind_somebody_that_stopped_goes_on(tight, at):
  """The blocks of who stopped come back behind the steps ahead."""
  tight.reset()
  longer = dataclasses.replace(GREEDY, max_tokens=60)
  ((tokens, *_),) = _without(tight, [(PROMPTS[1], longer)])
  requests = [(PROMPTS[0], longer), (PROMPTS[1], dataclasses.replace(longer, stop_token_ids=(tokens[at],)))]
  expected = _without(tight, requests)
  assert expected[0][2] == "length"
  for request in requests:
    tight.add(*request)
  assert list(map(what, _serve(tight))) == expected


def test_a_pool_that_fills_at_a_boundary_keeps_nobody_for_good(tight):
  """The steps from one compression to the next are one call, which may get no block at its first."""
  tight.reset()
  params = dataclasses.replace(GREEDY, max_tokens=50)
  requests = [(prompt, params, Compression(rate=1.1, window=8, interval=interval))
              for prompt, interval in zip(PROMPTS, (4, 8, 4, 8), strict=True)]
  expected = _without(tight, requests)
  for request in requests:
    tight.add(*request)
  outputs, before = {}, tight.stats().preemptions
  for _ in range(600):
    outputs |= {u.request_id: u.output for u in tight.step() if u.output}
  assert not tight.has_work
  assert tight.stats().preemptions > before
  found = [what(outputs[i]) for i in sorted(outputs)]
  assert found == expected
