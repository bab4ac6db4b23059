"""The benchmarks' common code: lengths and caches are what they say, every timed call is made."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.cache.state import check_invariants

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def bench():
  spec = importlib.util.spec_from_file_location("bench_common", SCRIPTS / "bench_common.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look themselves up there
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


def test_lengths(bench):
  shape = {"seqs": 5, "kv_heads": 3, "low": 4, "high": 90}
  uniform = bench.DecodeShape(**shape).lengths(2)
  assert (uniform == 90).all()
  by_sequence = bench.DecodeShape(**shape, ragged_by="sequence").lengths(2)
  assert (by_sequence == by_sequence[:1, :, :1]).all()
  by_head = bench.DecodeShape(**shape, ragged_by="head").lengths(2)
  assert len(np.unique(by_head)) > 10
  for lengths in (uniform, by_sequence, by_head):
    assert lengths.shape == (2, 5, 3)
    assert lengths.min() >= 4
    assert lengths.max() <= 90


@pytest.mark.parametrize(
    ("ragged_by", "order"), [(None, "served"), ("sequence", "served"), ("sequence", "in order"), ("head", "shuffled")])
def test_a_made_cache_keeps_the_invariants(bench, ragged_by, order):
  shape = bench.DecodeShape(seqs=3, kv_heads=2, low=1, high=70, ragged_by=ragged_by)
  lengths = shape.lengths(2)
  state = bench.make_cache(lengths, head_dim=8, spare_blocks=7, max_blocks_per_head=9, order=order)
  check_invariants(state)
  np.testing.assert_array_equal(state.lengths, lengths)
  assert int(state.free_count) == 7
  assert bench.kv_bytes(state) == lengths.sum() / 2 * 2 * 8 * 2


def test_a_pool_in_use_hands_out_runs_of_blocks(bench):
  """Between a fresh pool, where all blocks of a head are neighbours, and a shuffled one, where none are."""
  blocks, rng = np.full((2, 8, 3), 160), np.random.default_rng(0)

  def neighbours(order):
    ids = bench.order_of_blocks(blocks, 100, order, rng)
    assert sorted(ids) == list(range(blocks.sum() + 100))
    return np.mean(np.abs(np.diff(ids[: blocks.sum()].reshape(-1, 160))) == 1)

  assert neighbours("in order") == 1
  assert 0.5 < neighbours("served") < 0.9
  assert neighbours("shuffled") < 0.02


def test_each_timed_call_takes_what_the_last_one_gave(bench):
  timing, last = bench.time_calls(jax.jit(lambda x: x + 1), jnp.zeros((), jnp.int32), repeats=4, rounds=3)
  assert int(last) == 3 + 4 * 3  # warm-up, then the rounds
  assert 0 < timing.least <= timing.median <= timing.most
  assert timing.per(2).median == timing.median / 2


def test_a_round_has_more_calls_where_seconds_are_asked_for(bench):
  _, calls = bench.time_calls(jax.jit(lambda x: x + 1), jnp.zeros((), jnp.int32), repeats=1, rounds=2, seconds=0.05)
  assert int(calls) > 3 + 1 + 2 * 1  # to warm up and to see how long one takes, then the rounds'


def test_results_name_the_machine(bench, tmp_path):
  path = bench.write_results("x", [{"us": 1.23456789, "bad": float("nan")}], folder=tmp_path, read_bandwidth=3.0)
  record = json.loads(path.read_text(encoding="utf-8"))
  assert record["rows"] == [{"us": 1.2346, "bad": None}]
  assert record["read_bandwidth"] == 3.0
  assert record["machine"]["jax"] == jax.__version__
