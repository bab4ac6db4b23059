"""Decode steps have rows for the first slots, as many as their sequences need and a program is there for."""

import pathlib

import jax
import numpy as np
import pytest

from kvc_jax import Compression, Engine, SamplingParams
from kvc_jax.engine import batch as engine_batch
from kvc_jax.engine.batch import row_buckets

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
PROMPTS = ("Once upon a time", "Tom had a big", "The sun was hot and", "Lily and Ben")
REQUESTS = [
    (PROMPTS[i % 4], SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=6 + 5 * i, ignore_eos=True),
     Compression(rate=2, window=8, interval=10) if i % 2 else None)
    for i in range(8)]


@pytest.mark.parametrize(("slots", "buckets"), [
    (1, (1,)), (64, (64,)), (65, (64, 65)), (128, (64, 128)), (300, (64, 128, 256, 300))])
def test_buckets_double_from_where_rows_cost_time(slots, buckets):
  assert row_buckets(slots) == buckets


def _engine(monkeypatch, fewest):
  monkeypatch.setattr(engine_batch, "_FEWEST_ROWS", fewest)
  return Engine(STORIES, max_num_seqs=8, block_size=4, chunk_size=32, max_model_len=256, steps_per_sync=4)


def _serve(engine, requests):
  """Each request's text and receipt, and the rows of all calls with the sequences that ran."""
  outputs, rows = {}, []
  bucket = engine.batch._bucket

  def noted(sequences):
    rows.append((bucket(sequences), len(engine._scheduler.running)))
    return bucket(sequences)

  engine.batch._bucket = noted
  ids = [engine.add(*request) for request in requests]
  while engine.has_work:
    outputs |= {u.request_id: u.output for u in engine.step() if u.output}
  found = [outputs[i] for i in ids]
  return [(o.token_ids, o.text, o.receipt.kvs_kept.tolist(), o.receipt.compressions) for o in found], rows


def test_texts_do_not_depend_on_rows_and_nothing_compiles_behind_warm_up(monkeypatch):
  expected, rows = _serve(_engine(monkeypatch, 64), REQUESTS)
  assert {bucket for bucket, _ in rows} == {8}
  engine = _engine(monkeypatch, 2)
  engine.warm_up()
  compiled = []

  def on_event(name, seconds, **_):
    if name == "/jax/core/compile/backend_compile_duration":
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(on_event)
  found, rows = _serve(engine, REQUESTS)
  jax.monitoring.unregister_event_duration_listener(on_event)
  assert found == expected
  assert compiled == []
  assert {bucket for bucket, _ in rows} == {2, 4, 8}
  assert all(bucket >= running // 2 for bucket, running in rows)


def test_the_first_slots_are_used_first(monkeypatch):
  """Else a few sequences in late slots would need all rows."""
  batch = _engine(monkeypatch, 2).batch
  sequences = [type("Sequence", (), {"slot": -1})() for _ in range(5)]
  for sequence in sequences:
    batch.take_slot(sequence)
  assert [s.slot for s in sequences] == [0, 1, 2, 3, 4]
  for at in (3, 1):
    batch.release(sequences[at])
  batch.take_slot(sequences[3])
  assert sequences[3].slot == 1
  assert batch._bucket(sequences[:1] + sequences[3:4]) == 2
  assert batch._bucket(sequences) == 8
  assert batch._bucket([]) == 2


def test_one_eviction_call_takes_many():
  engine = Engine(STORIES, max_num_seqs=8, block_size=4, chunk_size=32, max_model_len=64)
  for _ in range(8):
    engine.add(PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
               Compression(max_cache_tokens=8, window=4, interval=100))
  while any(s.tokens_seen < 20 for s in engine._scheduler.running) or engine.stats().running < 8:
    engine.step()
  engine._collect()
  ((sequences, freed),) = engine.batch.compress(list(engine._scheduler.running))
  assert len(sequences) == 8
  assert (np.asarray(freed) > 0).all()
