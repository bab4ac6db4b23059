"""The engine's thread: nothing hangs, whatever the engine does."""

import asyncio
import threading
import time

import numpy as np
import pytest

from kvc_jax.engine.request import EngineStats, SamplingParams, Update
from kvc_jax.errors import InputError, QueueFull
from kvc_jax.serving.engine_thread import EngineFailed, EngineStopping, EngineThread, Submission

SECONDS = 20


class FakeEngine:
  """Gives each request one token a step, `tokens` in all; fails where it is told to."""

  def __init__(self, tokens=3, max_waiting=10):
    self.tokens, self.max_waiting = tokens, max_waiting
    self.requests, self.cancelled, self.added = {}, [], 0
    self.fails, self.gate, self.blocked = None, threading.Event(), threading.Event()
    self.gate.set()

  @property
  def has_work(self):
    return bool(self.requests)

  def add(self, prompt, params=None, compression=None):
    if not prompt:
      raise InputError("the prompt has no tokens; give some")
    if len(self.requests) >= self.max_waiting:
      raise QueueFull
    self.added += 1
    self.requests[self.added] = 0
    return self.added

  def cancel(self, request_id):
    self.cancelled.append(request_id)
    return self.requests.pop(request_id, None) is not None

  def step(self):
    if not self.gate.is_set():
      self.blocked.set()
      assert self.gate.wait(SECONDS)
    time.sleep(0.001)  # the loop would drown in updates
    if self.fails:
      raise self.fails
    updates = []
    for request_id in list(self.requests):
      self.requests[request_id] += 1
      ended = self.requests[request_id] == self.tokens
      updates.append(Update(
          request_id=request_id, sample=0, text="x", token_ids=[5], logprobs=None,
          finish_reason="length" if ended else None, output=None))
      if ended:
        del self.requests[request_id]
    return updates

  def stats(self):
    return EngineStats(running=len(self.requests), waiting=0, free_blocks=1, num_blocks=2)

  def kvs_kept(self):
    return np.full((2, 3), len(self.requests), np.int32)


class Clock:
  def __init__(self):
    self.first, self.next = [], []

  def first_token(self, seconds):
    self.first.append(seconds)

  def next_tokens(self, seconds, count):
    self.next.append(count)


def _submission(*ids):
  return Submission(prompt=list(ids), params=SamplingParams(), compression=None)


async def _to_the_end(generation):
  while True:
    await generation.next()


async def _block(engine):
  """Holds the engine's thread in a step until the gate is open again."""
  engine.gate.clear()
  while not engine.blocked.is_set():
    await asyncio.sleep(0.001)


def _run(scenario, engine, clock=None):
  """Runs a scenario on an event loop, within a bounded time, and stops the thread."""

  async def run():
    thread = EngineThread(engine, clock or Clock())
    thread.start()
    try:
      await scenario(thread)
    finally:
      engine.gate.set()
      await thread.stop(0.2)
    assert threading.active_count() < 20

  asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_updates_come_in_order_and_are_timed():
  clock = Clock()

  async def scenario(thread):
    generation = await thread.submit([_submission(1), _submission(2)])
    found = [await generation.next() for _ in range(6)]
    for prompt in (0, 1):
      assert [e.update.finish_reason for e in found if e.prompt == prompt] == [None, None, "length"]
    assert thread.stats.running == 0 or await thread.kvs_kept(SECONDS) is not None
    assert thread.state == "ok"

  _run(scenario, FakeEngine(), clock)
  assert (len(clock.first), clock.next) == (2, [1, 1, 1, 1])


def test_all_prompts_of_a_call_or_none():
  engine = FakeEngine(tokens=10**9, max_waiting=2)

  async def scenario(thread):
    with pytest.raises(InputError, match="no tokens"):
      await thread.submit([_submission(1), _submission()])
    assert engine.cancelled == [1]
    await (await thread.submit([_submission(1)])).next()
    with pytest.raises(QueueFull):
      await thread.submit([_submission(1), _submission(2)])
    assert engine.cancelled == [1, 3]

  _run(scenario, engine)


def test_a_call_that_could_never_be_queued_is_refused_for_good():
  async def scenario(thread):
    with pytest.raises(InputError, match="ask for fewer"):
      await thread.submit([_submission(1), _submission(2)])

  _run(scenario, FakeEngine(max_waiting=1))


def test_an_exception_of_the_engine_ends_every_request(caplog):
  engine = FakeEngine(tokens=10**9)

  async def scenario(thread):
    one, two = await thread.submit([_submission(1)]), await thread.submit([_submission(2)])
    await one.next()
    engine.fails = RuntimeError("the device is lost")
    for generation in (one, two):
      with pytest.raises(EngineFailed, match="restart the server"):
        await _to_the_end(generation)
    with pytest.raises(EngineFailed):
      await thread.submit([_submission(3)])
    thread.cancel(one)
    assert thread.state == "failed"
    assert thread.failure is engine.fails
    assert await thread.kvs_kept(SECONDS) is None

  _run(scenario, engine)
  assert "the device is lost" in caplog.text


def test_a_cancelled_call_is_taken_back():
  engine = FakeEngine(tokens=10**9)

  async def scenario(thread):
    generation = await thread.submit([_submission(1), _submission(2)])
    await generation.next()
    thread.cancel(generation)
    thread.cancel(generation)
    await thread.kvs_kept(SECONDS)
    assert engine.cancelled == [1, 2]
    assert not engine.requests
    assert thread.stats.running == 0

  _run(scenario, engine)


def test_a_call_that_is_cancelled_before_it_is_accepted():
  """The caller goes away while the engine is in a long step."""
  engine = FakeEngine(tokens=10**9)

  async def scenario(thread):
    first = await thread.submit([_submission(1)])
    await first.next()
    await _block(engine)
    task = asyncio.create_task(thread.submit([_submission(2)]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    engine.gate.set()
    thread.cancel(first)
    while engine.requests:
      await asyncio.sleep(0.01)
    assert engine.added == 1

  _run(scenario, engine)


def test_stopping_drains():
  engine = FakeEngine(tokens=50)

  async def run():
    thread = EngineThread(engine, Clock())
    thread.start()
    generation = await thread.submit([_submission(1)])
    await thread.stop(SECONDS)
    assert thread.state == "stopping"
    found = [await generation.next() for _ in range(50)]
    assert found[-1].update.finish_reason == "length"
    with pytest.raises(EngineFailed):
      await thread.submit([_submission(2)])
    thread.cancel(generation)

  asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_what_does_not_drain_in_time_is_failed():
  engine = FakeEngine(tokens=10**9)

  async def run():
    thread = EngineThread(engine, Clock())
    thread.start()
    generation = await thread.submit([_submission(1)])
    await thread.stop(0.1)
    with pytest.raises(EngineFailed, match="stopping"):
      await _to_the_end(generation)

  asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_stopping_again_is_harmless():
  """Whether it comes at the same time, when the thread is about to end, or long after."""

  async def run():
    for engine in [FakeEngine(tokens=10**9), *(FakeEngine(tokens=1) for _ in range(50))]:
      thread = EngineThread(engine, Clock())
      thread.start()
      generation = await thread.submit([_submission(1)])
      await asyncio.gather(*(thread.stop(0.0) for _ in range(3)))
      await thread.stop(0.0)
      thread.cancel(generation)
      assert thread.state == "stopping"
      with pytest.raises(EngineStopping):
        await thread.submit([_submission(2)])

  asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_while_it_drains_others_are_refused():
  engine = FakeEngine(tokens=10**9)

  async def run():
    thread = EngineThread(engine, Clock())
    thread.start()
    generation = await thread.submit([_submission(1)])
    stopping = asyncio.create_task(thread.stop(SECONDS))
    await asyncio.sleep(0)
    with pytest.raises(EngineStopping):
      await thread.submit([_submission(2)])
    assert (await thread.kvs_kept(SECONDS)).sum() == 6  # it can be watched still
    stopping.cancel()
    await thread.stop(0.0)
    with pytest.raises(EngineStopping):
      await _to_the_end(generation)

  asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_busy_engine_does_not_hold_up_the_status():
  engine = FakeEngine(tokens=10**9)

  async def scenario(thread):
    await thread.submit([_submission(1)])
    await _block(engine)
    assert await thread.kvs_kept(0.05) is None
    assert thread.stats.num_blocks == 2

  _run(scenario, engine)
