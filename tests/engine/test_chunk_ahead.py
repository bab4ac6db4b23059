"""A prompt's next chunk is dispatched before the results of the steps in front of it are read."""

import collections
import dataclasses
import gc
import pathlib
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from engine_outputs import what

from kvc_jax import Compression, Engine, FullAttention, InputError, RandomScore, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine.flight import Flight

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 7
PROMPTS = ("Once upon a time", "Tom had a big", "The sun was hot and", "Lily and Ben")
CHUNK = 32
OPTIONS = {"max_num_seqs": 4, "block_size": 4, "chunk_size": CHUNK, "max_model_len": 256, "steps_per_sync": 4,
           "rules": (WindowAttention(), FullAttention(), RandomScore())}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
WHILE_PREFILLING = Compression(max_cache_tokens=48, window=16, prefill_interval=20)

REQUESTS = [
    (LONG, GREEDY, None),
    (LONG[:300], dataclasses.replace(GREEDY, max_tokens=1), None),
    (LONG[:350], SamplingParams(temperature=1.0, seed=3, max_tokens=20, logprobs=2), None),
    ("Once upon a time", GREEDY, None),
    (LONG, GREEDY, WHILE_PREFILLING),
    (LONG[:300], GREEDY, Compression(rate=4, window=8)),
    (LONG[:320], GREEDY, Compression(rate=3, window=8, interval=5, scoring=FullAttention(), prefill_interval=50)),
]


@pytest.fixture(scope="module")
def shared():
  return Engine(STORIES, **OPTIONS)


@pytest.fixture
def engine(shared):
  yield shared
  shared.reset()


def _serve(engine):
  return {(u.request_id, u.sample): u.output for u in _updates(engine) if u.output}


def _updates(engine):
  while engine.has_work:
    yield from engine.step()


def _check_empty(engine):
  assert engine.batch.free_blocks == engine.stats().free_blocks == engine.config.num_blocks - 1
  assert engine.stats().running == engine.stats().waiting == 0
  assert len(engine.batch._free_slots) == engine.config.num_slots
  check_invariants(engine.batch.state)


@pytest.fixture(scope="module")
def alone(shared):
  """What each of REQUESTS gives when nothing is ever dispatched ahead."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("_prefill_ahead", "_decode_ahead"):
      patch.setattr(shared, name, lambda: None)
    expected = []
    for request in REQUESTS:
      shared.add(*request)
      (output,) = _serve(shared).values()
      expected.append(what(output))
  return expected


@pytest.fixture
def events(monkeypatch):
  """Names of what an engine dispatches and reads, in their order, once `watch` was called."""
  found = []

  def note(owner, name):
    call = getattr(owner, name)

    def noted(*args, **options):
      found.append(name)
      return call(*args, **options)

    monkeypatch.setattr(owner, name, noted)

  def watch(engine):
    for name in ("mixed", "decode", "usage"):
      note(engine.batch, name)
    note(Flight, "land")
    return found

  return watch


def _decode_beside(engine, compression=None, max_tokens=100):
  """Serves one request until it decodes, then adds a long prompt."""
  engine.add("Once upon a time", dataclasses.replace(GREEDY, max_tokens=max_tokens))
  while not any(s.decodes for s in engine._scheduler.running):
    engine.step()
    engine._collect()
  return engine.add(LONG, GREEDY, compression)


@pytest.mark.parametrize("compression", [None, WHILE_PREFILLING])
def test_the_next_chunk_goes_before_results_are_read(engine, events, compression):
  _decode_beside(engine, compression)
  found = events(engine)
  engine.step()
  assert found == ["mixed", "usage", "mixed"]
  for _ in range(3):
    found.clear()
    engine.step()
    assert found == ["land", "usage", "mixed"]
    (sequence,) = [s for s in engine._scheduler.running if not s.decodes]
    before, now = engine._sealed.usage, engine.batch.usage()
    if compression is None:
      assert before.held[sequence.slot] < now.held[sequence.slot] <= sequence.held_blocks
    assert engine.stats().free_blocks - engine.config.heads_per_sequence <= int(now.free)  # less the decode step's


@pytest.mark.parametrize("chunks_per_step", [1, 2])
def test_decode_steps_wait_for_no_more_chunks_than_before(engine, monkeypatch, chunks_per_step):
  monkeypatch.setattr(engine, "_chunks_per_step", chunks_per_step)
  _decode_beside(engine)
  last = engine.add(LONG, GREEDY)
  mixed, work = engine.batch.mixed, []

  def noted(sequence, count, riders, before):
    work.append(" c" if riders else "c")
    return mixed(sequence, count, riders, before)

  monkeypatch.setattr(engine.batch, "mixed", noted)
  for i in range(14):
    if i >= 4 and engine._chunks_ahead:
      engine.cancel(last)  # reads what is ahead; it still counts
    engine.step()
  assert engine.stats().cancelled
  between = "".join(work).split(" ")[1:]  # chunks from one decode step to the next
  assert len(between) > 4
  assert set(map(len, between[:-1])) == {chunks_per_step}


def test_nothing_goes_ahead_where_blocks_may_be_short(engine, events):
  """By the blocks that the decode steps in front of it could take."""
  chunk = engine.config.blocks_for(CHUNK)
  _decode_beside(engine)
  found = events(engine)
  for spare, ahead in ((-1, False), (0, True)):
    engine.step()
    engine._collect()
    engine._chunks_ahead = 0
    engine._scheduler.free_blocks = 2 * chunk + engine.config.heads_per_sequence + spare
    found.clear()
    engine._run()
    assert (found[-1] == "mixed") == ahead
    assert engine._chunks_ahead == ahead


def test_nothing_goes_ahead_of_cached_prefixes():
  engine = Engine(STORIES, prefix_caching=True, prefix_interval=32, **OPTIONS)
  engine.add(LONG, GREEDY)
  while engine.has_work:
    engine.step()
    assert not engine._chunks_ahead
    assert engine._flight is None
  assert engine.stats().finished == 1


class _Client:
  """Random operations, and how often each met a chunk ahead, and decode steps ahead."""

  def __init__(self, engine, path):
    self.engine, self.path = engine, path
    self.number, self.outputs = {}, {}
    self.met = collections.Counter()
    self.acts = {"add": self.add, "cancel": self.cancel, "give way": self.give_way, "save": self.save}

  @property
  def ahead(self):
    return "chunk" if self.engine._chunks_ahead else "steps" if self.engine._decoded_ahead else "nothing"

  def step(self):
    ahead = self.ahead
    ended = {u.request_id: u.output for u in self.engine.step() if u.output}
    self.outputs.update(ended)
    self.met["end", ahead] += bool(ended)

  def act(self, rng):
    name = rng.choice([*self.acts, "step"], p=[0.14, 0.04, 0.06, 0.06, 0.7])
    if name == "step":
      self.step()
      return
    ahead = self.ahead
    self.met[name, ahead] += bool(self.acts[name](rng))

  def add(self, rng):
    if self.engine.stats().waiting < 4:
      number = int(rng.integers(len(REQUESTS)))
      self.number[self.engine.add(*REQUESTS[number])] = number
    return True

  def cancel(self, rng):
    left = list(self.engine._requests)
    return left and self.engine.cancel(int(rng.choice(left)))

  def give_way(self, rng):
    """As if a decode step had found no block: the newest goes, which is the one with a chunk ahead."""
    if len(self.engine._scheduler.running) < 2:
      return False
    before, self.engine._stalled = self.engine.stats().preemptions, True
    make_room = self.engine._make_room

    def nothing_is_free():
      self.engine._scheduler.free_blocks, free = 0, self.engine._scheduler.free_blocks
      make_room()
      self.engine._scheduler.free_blocks += free

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(self.engine, "_make_room", nothing_is_free)
      self.step()
    return self.engine.stats().preemptions > before

  def save(self, rng):
    """A request leaves, and comes back from its file."""
    left = list(self.engine._requests)
    request_id = int(rng.choice(left)) if left else -1
    try:
      self.engine.save(request_id, self.path)
    except InputError:  # it is in its prompt, or has ended
      return False
    self.engine.cancel(request_id)
    self.number[self.engine.resume(self.path)] = self.number.pop(request_id)
    return True


def test_random_operations_with_work_ahead(engine, alone, tmp_path):
  """Texts and receipts are those of requests that were alone, and nothing leaks."""
  client, rng = _Client(engine, tmp_path / "saved"), np.random.default_rng(0)
  for number in range(900):
    client.act(rng)
    assert engine.stats().free_blocks <= engine.batch.free_blocks + sum(
        engine.config.heads_per_sequence for s in engine._scheduler.running if s.decodes) * engine.batch.steps_per_sync
    if number % 200 == 0:
      check_invariants(engine.batch.state)
      engine._collect()
      assert engine.stats().free_blocks == engine.batch.free_blocks
  while engine.has_work:
    client.step()
  for request_id, output in client.outputs.items():
    assert what(output) == alone[client.number[request_id]], REQUESTS[client.number[request_id]]
  assert len(client.outputs) > 60
  acts = {"chunk": (*client.acts, "end"), "steps": client.acts}  # nothing goes ahead of an end that is known
  assert all(client.met[name, ahead] > 0 for ahead, names in acts.items() for name in names), client.met
  _check_empty(engine)


def test_prompts_of_other_kinds_in_turn(engine):
  """A step by itself, between steps beside chunks, is what the next one beside a chunk goes on from."""
  first = Compression(rate=2, window=8, interval=50)
  second = dataclasses.replace(first, scoring=FullAttention(decode_every=1))
  kinds = [first, first, second, first]
  requests = [(prompt * 2, GREEDY, kind) for prompt, kind in zip(PROMPTS, kinds, strict=True)]
  expected = []
  for request in requests:
    engine.add(*request)
    expected += map(what, _serve(engine).values())
  engine.add(*requests[0])
  while not any(s.decodes for s in engine._scheduler.running):
    engine.step()
  for request in requests[1:]:
    engine.add(*request)
  outputs = _serve(engine)
  assert [what(outputs[key]) for key in sorted(outputs)] == expected


def test_a_request_that_ended_is_forgotten(engine):
  """At once, with the results that it was the last to read; they are on the device."""
  gc.collect()
  gc.disable()
  try:
    for request in REQUESTS:
      engine.add(*request)
    sequences = [weakref.ref(s) for s in engine._scheduler.waiting]
    _serve(engine)
    assert [ref() for ref in sequences if ref()] == []
  finally:
    gc.enable()


def test_a_receipt_does_not_wait_for_the_chunk_ahead(engine, monkeypatch):
  """It comes from the lengths that were read with the results."""
  _decode_beside(engine, max_tokens=4)
  receipts, seen = engine.batch.receipts, []

  def noted(sequences, lengths):
    if sequences:
      assert engine._chunks_ahead
      seen.append((int(lengths.max()), int(engine.batch.state.lengths.max())))
    return receipts(sequences, lengths)

  monkeypatch.setattr(engine.batch, "receipts", noted)
  while not seen:
    engine.step()
  ((read, now),) = seen
  assert now == read + CHUNK


def test_a_chunk_that_found_no_blocks_ends_its_request_alone(engine, alone, monkeypatch):
  """As a rule of infinite values can make it happen; the chunk ahead is then of no use."""
  victim, neighbour = engine.add(*REQUESTS[0]), engine.add(*REQUESTS[3])
  engine.step()
  mixed = engine.batch.mixed

  def failing(sequence, *arguments):
    found = mixed(sequence, *arguments)
    fails = sequence.request_id == victim and sequence.prefilled == 3 * CHUNK
    return dataclasses.replace(found, ok=found.ok & False) if fails else found

  monkeypatch.setattr(engine.batch, "mixed", failing)
  outputs = {i: output for (i, _), output in _serve(engine).items()}
  assert outputs[victim].finish_reason == "cache_full"
  assert outputs[victim].token_ids == []
  assert outputs[victim].receipt.tokens_seen == 4 * CHUNK == outputs[victim].receipt.kvs_kept.max()
  assert what(outputs[neighbour]) == alone[3]
  _check_empty(engine)


def test_reset_and_close_with_a_chunk_ahead():
  engine = Engine(STORIES, **OPTIONS)
  for _ in range(2):
    request_id = engine.add(LONG, GREEDY)
    engine.step()
    assert engine._chunks_ahead == 1
    engine.reset()
    assert not engine.cancel(request_id)
    assert engine.step() == []
    _check_empty(engine)
  engine.add(LONG, GREEDY)
  engine.step()
  assert engine._chunks_ahead == 1
  engine.close()
  assert all(array.is_deleted() for array in (engine.batch.state.kv, engine.batch.state.lengths))
  assert jnp.asarray(engine._sealed.usage.lengths).max() == CHUNK
