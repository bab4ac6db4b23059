"""The throughput benchmark's own arithmetic: a run that was cut short, and parts of the time."""

import collections
import importlib
import pathlib
import sys
import types

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def bench():
  sys.path.insert(0, str(SCRIPTS))
  yield importlib.import_module("bench_throughput")
  sys.path.remove(str(SCRIPTS))
  for name in ("bench_throughput", "bench_common"):
    sys.modules.pop(name, None)


def _served(bench, first_tokens, seconds, largest_batch):
  served = object.__new__(bench._Served)
  served._start, served.seconds, served.largest_batch = 100.0, seconds, largest_batch
  served.prompts = len(first_tokens)
  served._times = {i: [(100.0 + at, 1)] for i, at in enumerate(first_tokens)}
  return served


def test_the_rest_goes_at_the_rate_of_steady_state(bench):
  """Three fill the batch in no time; then one starts every 2 s, some in bursts of two; the drain takes 5 s."""
  starts = [0.1, 0.2, 0.3] + [2.0 * i for i in range(1, 13)]
  served = _served(bench, starts, 29.0, largest_batch=3)
  assert served.seconds_for(15) == pytest.approx(29.0)
  assert served.seconds_for(256) == pytest.approx(29.0 + 241 * 2.0)
  bursts = [0.1, 0.2, 0.3] + [4.0 * (i // 2 + 1) for i in range(12)]
  assert _served(bench, bursts, 29.0, 3).seconds_for(256) == pytest.approx(29.0 + 241 * 2.0, rel=0.05)


def test_too_few_prompts_count_their_ramp_up(bench):
  served = _served(bench, [0.1, 0.2, 0.3, 2.0], 9.0, largest_batch=3)
  assert served.seconds_for(8) == pytest.approx(18.0)


def test_parts_scale_the_sample_by_its_units(bench):
  parts = object.__new__(bench._Parts)
  parts._units = collections.Counter({"prefill": 10, "decode": 100, "eviction": 4, "eviction, scores": 4})
  parts._timed = collections.Counter({"prefill": 2, "decode": 10, "eviction": 1, "eviction, scores": 2})
  parts._seconds = {"prefill": 0.2, "decode": 0.05, "eviction": 0.01, "eviction, scores": 0.01}
  found = parts.seconds(2.0)
  assert found["prefill_s"] == pytest.approx(1.0)
  assert found["decode_s"] == pytest.approx(0.5)
  assert found["eviction_s"] == pytest.approx(0.04 + 0.02)
  assert found["other_s"] == pytest.approx(2.0 - 1.56)


def test_only_sampled_calls_are_timed(bench):
  batch = types.SimpleNamespace(
      state=(), mixed=lambda *_: "logits", decode=lambda *_: "found", score=lambda *_: None,
      compress=lambda *_: [1, 2])
  parts = bench._Parts(batch)
  batch.decode([], [3, 16], 16)
  parts.sampling = True
  batch.decode([], [1, 2], 16)
  assert batch.compress([]) == [1, 2]
  assert parts._units == {"decode": 18, "eviction": 2}
  assert parts._timed == {"decode": 2, "eviction": 2}
