"""`warm_up` and the queue: nothing compiles while serving, and what may wait is bounded."""

import dataclasses
import pathlib

import jax
import pytest

from kvc_jax import Compression, Engine, FullAttention, QueueFull, SamplingParams, WindowAttention
from kvc_jax.cache.state import check_invariants

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 5
GREEDY = SamplingParams(temperature=0, max_tokens=24)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=20, logprobs=2)
REQUESTS = [
    ("Once upon a time", GREEDY), (LONG, GREEDY), (LONG, DRAWN), (LONG, GREEDY), (LONG, GREEDY), (LONG, DRAWN),
    (LONG, GREEDY), (LONG, dataclasses.replace(GREEDY, max_tokens=12)),
    ("The dog", dataclasses.replace(GREEDY, stop="."))]


RULES = (WindowAttention(queries=7), FullAttention(buffer=3))


def _engine(**options):
  """All of one shape, so that only the first of them compiles."""
  return Engine(
      STORIES, max_num_seqs=4, block_size=4, chunk_size=24, max_model_len=256, num_blocks=621, rules=RULES,
      allocations=("all", "layer"), steps_per_sync=5, **options)


def _serve(engine):
  """The outputs of all that is left to serve."""
  outputs = []
  while engine.has_work:
    outputs += [update.output for update in engine.step() if update.output]
  return outputs


def test_kinds_are_all_that_is_compiled_and_enough(compiled, caplog):
  """Compressed once, by a share of the scores, and not at all; no steps that keep scores."""
  kinds = [None, Compression(rate=3, scoring=RULES[0]), Compression(mass=0.5, scoring=RULES[0])]
  engine = _engine()
  engine.warm_up(kinds=kinds)
  compiled.clear()
  for kind in kinds:
    engine.add(LONG[:150], GREEDY, kind)
  outputs = _serve(engine)
  assert compiled == []
  assert not caplog.records
  assert sum(output.receipt is not None and output.receipt.compressions for output in outputs) == 2
  engine.add(LONG[:150], GREEDY, dataclasses.replace(kinds[1], allocation="layer"))
  _serve(engine)
  assert compiled
  assert "compile while serving" in caplog.text


def test_nothing_compiles_after_warm_up(compiled):
  """Counted by JAX itself, under a load of all kinds in a pool that is too small for it."""
  jax.clear_caches()  # another test may have compiled what warm_up forgets
  engine = _engine()
  engine.warm_up()
  assert compiled
  assert engine.stats() == dataclasses.replace(engine.stats(), prompt_tokens=0, generated_tokens=0, compressions=0)
  compiled.clear()
  for rule in RULES:
    for i, allocation in enumerate(("all", "layer")):
      compression = Compression(
          rate=3, window=4 + i, interval=3 + i, scoring=rule, allocation=allocation, keep=[(1, 5)] * i, sinks=i)
      engine.add(LONG[: 100 + 40 * i], dataclasses.replace(DRAWN, n=1 + i), compression, return_positions=bool(i))
  for i, (prompt, params) in enumerate(REQUESTS):
    engine.add(prompt[: 60 + i], params, Compression(rate=2, scoring=RULES[0], prefill_interval=9) if i % 2 else None)
    engine.step()
  cancelled = engine.add("", GREEDY)
  engine.step()
  assert engine.cancel(cancelled)
  _serve(engine)
  assert engine.stats().swaps
  assert engine.kvs_kept().sum() == 0
  assert compiled == []
  assert engine.batch.free_blocks == engine.stats().free_blocks == engine.config.num_blocks - 1
  check_invariants(engine.batch.state)


def test_a_full_queue_refuses():
  """Free slots are there for as many beside those that may wait; a slot that is taken is not."""
  engine = _engine(max_waiting=1)
  refused = pytest.raises(QueueFull, match="may wait beside them; try again later")
  with refused:
    engine.add("a", SamplingParams(n=6))
  engine.add("a", SamplingParams(n=5))
  with refused:
    engine.add("b")
  while engine.stats().running < 4:
    engine.step()
  assert engine.stats().waiting == 1
  with refused:
    engine.add("b")


def test_an_engine_without_a_queue_fills_its_slots():
  engine = _engine(max_waiting=0)
  engine.warm_up()
  params = dataclasses.replace(GREEDY, max_tokens=2)
  for _ in range(2):
    for prompt in "abcd":
      engine.add(prompt, params)
    with pytest.raises(QueueFull):
      engine.add("e", params)
    assert len(_serve(engine)) == 4
