"""Ten thousand random operations on an engine whose pool is nearly full.

Nothing leaks, nobody starves, all end, and what a request says is what it says when it is alone.
"""

import collections

import numpy as np
import pytest
from hf_folders import hf_config, hf_tensors, write_folder

from kvc_jax import Compression, Engine, InputError, QueueFull, RandomScore, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine import footprint

OPERATIONS = 10_000
RULES = (WindowAttention(queries=4, pooling=3), RandomScore())
LONGEST_WAIT = 250  # steps; a request decodes for 14 at most


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
  config = hf_config(num_hidden_layers=1, max_position_embeddings=64)
  folder = write_folder(tmp_path_factory.mktemp("tiny") / "model", config, hf_tensors(config))
  return Engine(
      folder, max_num_seqs=4, block_size=2, chunk_size=8, num_blocks=2 * 16 + 1, max_waiting=10, steps_per_sync=2,
      swap_bytes=3000, rules=RULES, allocations=("all", "head"))


def _random_request(rng):
  compression = None
  if rng.random() < 0.7:
    compression = Compression(
        rate=float(rng.choice([2, 4])), max_cache_tokens=int(rng.choice([6, 10])), window=int(rng.integers(1, 4)),
        sinks=int(rng.integers(0, 2)), scoring=RULES[rng.integers(2)], allocation=("all", "head")[rng.integers(2)],
        interval=[None, 1, 3][rng.integers(3)], on_demand=bool(rng.integers(2)),
        keep=[(2, 4)] * int(rng.integers(2)), prefill_interval=[None, 5][rng.integers(2)])
  params = SamplingParams(
      temperature=float(rng.integers(2)), seed=int(rng.integers(99)), max_tokens=int(rng.integers(1, 15)),
      n=1 + int(rng.random() < 0.1), ignore_eos=bool(rng.integers(2)))
  size = int(rng.choice([1, 3, 9, 17, 40]))
  return rng.integers(3, 40, size).tolist(), params, compression


class _Client:
  """Arrivals, cancellations and what became of them."""

  def __init__(self, engine):
    self.engine, self.steps = engine, 0
    self.left = {}  # request id -> (samples to come, step of its arrival)
    self.asked, self.said = {}, {}  # of requests that are not compressed on demand
    self.ended = collections.Counter()

  def arrive(self, rng):
    try:
      prompt, params, compression = _random_request(rng)
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
    self.engine._collect()  # the engine itself compresses what is due before anybody gives way
    running = [s for s in self.engine._scheduler.running if not s.finish_reason and not s.is_due]
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


def test_random_operations(engine):
  rng, client = np.random.default_rng(0), _Client(engine)
  acts = (client.arrive, client.cancel, client.preempt, client.compress, client.step)
  tightest = engine.config.num_blocks
  for number in range(OPERATIONS):
    acts[rng.choice(5, p=[0.22, 0.03, 0.03, 0.04, 0.68])](rng)
    if number % 100 == 0:
      engine._collect()
      assert engine.stats().free_blocks == engine.batch.free_blocks
      orders = [s.order for s in engine._scheduler.waiting]
      assert orders == sorted(orders)  # first come, first served, whoever gave way in front
      tightest = min(tightest, engine.stats().free_blocks)
    if number % 1000 == 0:
      check_invariants(engine.batch.state)
  for _ in range(LONGEST_WAIT):
    client.step()
  assert not client.left
  assert not engine.has_work
  assert engine.batch.free_blocks == engine.stats().free_blocks == engine.config.num_blocks - 1
  assert len(engine.batch._free_slots) == 4
  check_invariants(engine.batch.state)
  _check_against_alone(engine, client)
  _check_that_it_was_hard(engine.stats(), client.ended, tightest)


def _check_against_alone(engine, client):
  finished = [i for i in client.asked if (i, 0) in client.said]
  for request_id in finished[:: max(len(finished) // 80, 1)]:
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
  assert stats.preemptions - stats.swaps > 50  # those that started over
  assert stats.compressions > 1000
  assert stats.finished > 500
