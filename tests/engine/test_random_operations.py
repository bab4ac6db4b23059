"""Ten thousand random operations on an engine whose pool is nearly full, and some thousand with cached prefixes.

Nothing leaks, nobody starves, all end, and what a request says is what it says when it is alone.
"""

import collections
import dataclasses

import numpy as np
import pytest
from hf_folders import hf_config, hf_tensors, write_folder

from kvc_jax import TOVA, Compression, Engine, InputError, QueueFull, RandomScore, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine import footprint

OPERATIONS, WITH_PREFIXES = 10_000, 2_500
RULES = (WindowAttention(queries=4, pooling=3), RandomScore(), TOVA())
ALLOCATIONS = ("all", "head", "pyramid")
LONGEST_WAIT = 250  # steps; a request decodes for 14 at most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  config = hf_config(num_hidden_layers=1, max_position_embeddings=64)
  return write_folder(tmp_path_factory.mktemp("tiny") / "model", config, hf_tensors(config))


def _engine(folder, **options):
  return Engine(
      folder, max_num_seqs=4, block_size=2, chunk_size=8, num_blocks=2 * 16 + 1, max_waiting=10, steps_per_sync=2,
      swap_bytes=3000, rules=RULES, allocations=ALLOCATIONS, **options)


def _random_request(rng):
  compression = None
  if rng.random() < 0.7:
    compression = Compression(
        rate=float(rng.choice([2, 4])), max_cache_tokens=int(rng.choice([6, 10])), window=int(rng.integers(1, 4)),
        sinks=int(rng.integers(0, 2)), scoring=RULES[rng.integers(3)], allocation=ALLOCATIONS[rng.integers(3)],
        interval=[None, 1, 3][rng.integers(3)], on_demand=bool(rng.integers(2)),
        keep=[(2, 4)] * int(rng.integers(2)), prefill_interval=[None, 5][rng.integers(2)])
    if rng.random() < 0.2 and compression.scoring.observed != "none":
      compression = dataclasses.replace(
          compression, mass=0.9, interval=None, prefill_interval=None, on_demand=False)
  params = SamplingParams(
      temperature=float(rng.integers(2)), seed=int(rng.integers(99)), max_tokens=int(rng.integers(1, 15)),
      n=1 + int(rng.random() < 0.1), ignore_eos=bool(rng.integers(2)))
  size = int(rng.choice([1, 3, 9, 17, 40]))
  return rng.integers(3, 40, size).tolist(), params, compression


def _request_like_others(rng):
  """A prompt that begins as others do, under one of few settings."""
  _, params, compression = _random_request(rng)
  size = int(rng.choice([5, 9, 14, 17]))
  same = int(rng.integers(size + 1))
  prompt = [*range(3, 3 + same), *rng.integers(3, 40, size - same).tolist()]
  if compression is not None:
    compression = dataclasses.replace(
        compression, rate=4, max_cache_tokens=(6, 10)[rng.integers(2)], window=2, sinks=0, keep=(), allocation="all")
  return prompt, params, compression


class _Client:
  """Arrivals, cancellations and what became of them."""

  def __init__(self, engine, draw=_random_request):
    self.engine, self.steps, self.draw = engine, 0, draw
    self.left = {}  # request id -> (samples to come, step of its arrival)
    self.asked, self.said = {}, {}  # of requests that are not compressed on demand
    self.ended = collections.Counter()

  def arrive(self, rng):
    try:
      prompt, params, compression = self.draw(rng)
      request_id = self.engine.add(prompt, params, compression)
      self.left[request_id] = (params.n, self.steps)
      if compression is None or not compression.on_demand:
        self.asked[request_id] = prompt, params, compression
    except QueueFull:
      self.ended["refused"] += 1
    except InputError:
      self.ended["too large"] += 1

  def cancel(self, rng):
    if self.left:
      victim = int(rng.choice(list(self.left)))
      assert self.engine.cancel(victim)
      del self.left[victim]
      self.ended["cancelled"] += 1

  def preempt(self, rng):
    self.engine._collect()
    running = [s for s in self.engine._scheduler.running if not s.finish_reason]
    if running:
      self.engine._preempt(running[rng.integers(len(running))])

  def compress(self, rng):
    self.engine._collect()
    found = [s for s in self.engine._scheduler.running if s.decodes and s.compression and s.compression.on_demand]
    self.engine._compress([s for s in found if footprint.excess_blocks(self.engine.config, s)][:1])

  def step(self, rng=None):
    self.steps += 1
    for update in self.engine.step():
      samples, arrived = self.left[update.request_id]
      if update.output is None:
        continue
      self.ended[update.output.finish_reason] += 1
      self.said[update.request_id, update.sample] = update.output.token_ids
      assert self.steps - arrived < LONGEST_WAIT
      if samples > 1:
        self.left[update.request_id] = (samples - 1, arrived)
      else:
        del self.left[update.request_id]


def _held(engine):
  return engine._prefixes.held if engine._prefixes else ()


def _operate(engine, client, operations, check_every):
  """Random operations until all has ended; returns the fewest free blocks that were seen."""
  rng = np.random.default_rng(0)
  acts = (client.arrive, client.cancel, client.preempt, client.compress, client.step)
  tightest = engine.config.num_blocks
  for number in range(operations):
    acts[rng.choice(5, p=[0.22, 0.03, 0.03, 0.04, 0.68])](rng)
    if number % 100 == 0:
      engine._collect()
      if engine.config.sharing:
        assert engine._free_now <= engine.batch.free_blocks
      else:
        assert engine.stats().free_blocks == engine.batch.free_blocks
      orders = [s.order for s in engine._scheduler.waiting]
      assert orders == sorted(orders)  # first come, first served, whoever gave way in front
      tightest = min(tightest, engine.batch.free_blocks)
    if number % check_every == 0:
      check_invariants(engine.batch.state, _held(engine))
  for _ in range(LONGEST_WAIT):
    client.step()
  assert not client.left
  assert not engine.has_work
  assert engine.stats().free_blocks == engine.config.num_blocks - 1
  assert len(engine.batch._free_slots) == 4
  check_invariants(engine.batch.state, _held(engine))
  return tightest


def test_random_operations(folder):
  engine = _engine(folder)
  client = _Client(engine)
  tightest = _operate(engine, client, OPERATIONS, check_every=1000)
  assert engine.batch.free_blocks == engine.config.num_blocks - 1
  _check_against_alone(engine, client)
  _check_that_it_was_hard(engine.stats(), client.ended, tightest)


def test_random_operations_with_cached_prefixes(folder):
  """What was said stays the same without cached prefixes, and no block is lost."""
  engine = _engine(folder, prefix_caching=True, prefix_interval=4)
  client = _Client(engine, _request_like_others)
  tightest = _operate(engine, client, WITH_PREFIXES, check_every=50)
  _check_against_alone(_engine(folder), client, most=50)
  stats = engine.stats()
  assert set(client.ended) <= {"length", "stop", "cancelled", "refused", "too large"}
  assert tightest <= 1
  assert stats.prefix_hits > 50
  assert stats.preemptions > 40
  while engine._prefixes.drop_oldest():
    pass
  assert engine.batch.free_blocks == engine.config.num_blocks - 1
  check_invariants(engine.batch.state)


def _check_against_alone(engine, client, most=80):
  finished = [i for i in client.asked if (i, 0) in client.said]
  for request_id in finished[:: max(len(finished) // most, 1)]:
    engine.add(*client.asked[request_id])
    while engine.has_work:
      for update in engine.step():
        said = client.said.get((request_id, update.sample))
        if update.output and said is not None:  # one sample may have ended before the others were cancelled
          assert update.output.token_ids == said


def _check_that_it_was_hard(stats, ended, tightest):
  assert tightest <= 1
  # Each of them fits the pool when it is alone, so none may end because the pool is full.
  assert set(ended) == {"length", "stop", "cancelled", "refused", "too large"}
  assert stats.swaps > 100
  assert stats.preemptions - stats.swaps > 30  # those that started over
  assert stats.compressions > 1000
  assert stats.finished > 500
