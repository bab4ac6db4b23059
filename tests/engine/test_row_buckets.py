"""Decode steps have rows for the first slots, as many as their sequences need and a program is there for."""

import pathlib

import numpy as np
import pytest

from kvc_jax import Compression, Engine, SamplingParams
from kvc_jax.engine import batch as engine_batch
from kvc_jax.engine.batch import row_buckets
from kvc_jax.engine.sequence import Sequence

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
PROMPTS = ("Once upon a time", "Tom had a big", "The sun was hot and", "Lily and Ben")
AS_IT_GOES = Compression(rate=2, window=8, interval=10)
REQUESTS = [
    (PROMPTS[i % 4], SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=6 + 5 * i, ignore_eos=True),
     AS_IT_GOES if i % 2 else None)
    for i in range(8)]


@pytest.mark.parametrize(("slots", "buckets"), [
    (1, (1,)), (64, (64,)), (65, (64, 65)), (128, (64, 128)), (300, (64, 128, 256, 300))])
def test_buckets_double_from_where_rows_cost_time(slots, buckets):
  assert row_buckets(slots) == buckets


@pytest.fixture(scope="module")
def engine():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine_batch, "_FEWEST_ROWS", 2)
    return Engine(STORIES, max_num_seqs=8, block_size=4, chunk_size=32, max_model_len=256, steps_per_sync=4)


def _serve(engine):
  """What came of REQUESTS, and for each call its rows, and those that its sequences need."""
  outputs, rows = {}, []
  bucket = engine.batch._bucket

  def noted(sequences):
    rows.append((bucket(sequences), max((s.slot + 1 for s in sequences), default=0)))
    return bucket(sequences)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine.batch, "_bucket", noted)
    ids = [engine.add(*request) for request in REQUESTS]
    while engine.has_work:
      outputs |= {u.request_id: u.output for u in engine.step() if u.output}
  found = [outputs[i] for i in ids]
  return [(o.token_ids, o.text, o.receipt.kvs_kept.tolist(), o.receipt.compressions) for o in found], rows


def test_texts_do_not_depend_on_rows_and_nothing_compiles_behind_warm_up(engine, compiled, monkeypatch):
  assert engine.batch._buckets == (2, 4, 8)
  engine.warm_up(kinds=[None, AS_IT_GOES])
  assert compiled
  compiled.clear()
  found, rows = _serve(engine)
  assert compiled == []
  assert {bucket for bucket, _ in rows} == {2, 4, 8}
  assert all(bucket == next(b for b in (2, 4, 8) if b >= needed) for bucket, needed in rows)
  monkeypatch.setattr(engine.batch, "_buckets", (8,))
  expected, rows = _serve(engine)
  assert {bucket for bucket, _ in rows} == {8}
  assert found == expected


def test_the_first_slots_are_used_first(engine):
  """Else a few sequences in late slots would need all rows."""
  sequences = [Sequence(request_id=i, prompt=[], params=REQUESTS[0][1], compression=None, output=None)
               for i in range(5)]
  for sequence in sequences:
    engine.batch.take_slot(sequence)
  assert [s.slot for s in sequences] == [0, 1, 2, 3, 4]
  for at in (3, 1):
    engine.batch.release(sequences[at])
  engine.batch.take_slot(sequences[3])
  assert sequences[3].slot == 1
  assert engine.batch._bucket([sequences[0], sequences[3]]) == 2
  assert engine.batch._bucket(sequences) == 8
  assert engine.batch._bucket([]) == 2
  engine.reset()


def test_one_eviction_call_takes_many(engine):
  for _ in range(8):
    engine.add(PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
               Compression(max_cache_tokens=8, window=4, interval=100))
  while engine.stats().running < 8 or any(s.tokens_seen < 20 for s in engine._scheduler.running):
    engine.step()
  engine._collect()
  ((sequences, freed),) = engine.batch.compress(list(engine._scheduler.running))
  assert len(sequences) == 8
  assert (np.asarray(freed) > 0).all()
  engine.reset()


def test_an_eviction_leaves_alone_who_has_not_seen_its_tokens(engine):
  """Such as one that stopped before the steps that it was to take."""
  engine.add(PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
             Compression(max_cache_tokens=8, window=4, interval=100))
  while not engine._scheduler.running or engine._scheduler.running[0].tokens_seen < 20:
    engine.step()
  engine._collect()
  (sequence,) = engine._scheduler.running
  lengths = np.asarray(engine.batch.state.lengths)
  sequence.ahead += 1
  ((_, freed),) = engine.batch.compress([sequence])
  assert np.asarray(freed).tolist() == [-1] * 8
  assert (np.asarray(engine.batch.state.lengths) == lengths).all()
  sequence.ahead -= 1
  ((_, freed),) = engine.batch.compress([sequence])
  assert freed[0] > 0
  engine.reset()
