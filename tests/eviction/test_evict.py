"""The eviction step against the NumPy oracle."""

import functools

import jax
import numpy as np
import oracles
import pytest
from builders import build_cache, held_keys_and_values, held_kvs, tag

from kvc_jax.cache.state import check_invariants
from kvc_jax.eviction.score_random import RandomScore
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import evict
from kvc_jax.kernels import backends

LAYERS, SLOTS, HEADS, MAX_TOKENS = 2, 4, 3, 48
CASES_PER_SETTING = 25
SETTINGS = [("all", 1), ("all", 4), ("all", 16), ("layer", 4), ("layer", 16), ("head", 1), ("head", 4)]


def _random_head(rng, num_tokens, ties):
  """Some of a sequence's positions, in any order, with scores."""
  kind = rng.integers(8)
  count = 0 if kind == 0 else num_tokens if kind < 4 else int(rng.integers(1, num_tokens + 1))
  positions = rng.permutation(num_tokens)[:count]
  scores = (rng.integers(0, 4, count) if ties else rng.exponential(size=count)).astype(np.float32)
  return [(int(p), float(s)) for p, s in zip(positions, scores, strict=True)]


def _random_sequence(rng):
  num_tokens, ties = int(rng.integers(1, MAX_TOKENS + 1)), rng.random() < 0.5
  heads = [[_random_head(rng, num_tokens, ties) for _ in range(HEADS)] for _ in range(LAYERS)]
  return num_tokens, heads


def _random_request(rng, num_tokens):
  """A budget in tokens, a window and sinks: from nothing protected to everything."""
  budget = int(rng.integers(1, num_tokens + 8))
  window = int(rng.choice([0, 1, 4, num_tokens // 2, num_tokens, num_tokens + 9]))
  return budget, window, int(rng.choice([0, 0, 1, 4]))


def _random_keep(rng, num_tokens):
  """Two ranges, which may be empty or overlap, or end behind the sequence."""
  starts = rng.integers(0, num_tokens + 1, 2)
  return np.stack([starts, starts + rng.choice([0, 1, 5, num_tokens], 2)], axis=1).astype(np.int32)


@functools.cache
def _jitted(allocation):
  return jax.jit(functools.partial(evict, rule=WindowAttention(), allocation=allocation))


_evict = jax.jit(evict, static_argnames=("rule", "allocation", "max_tokens"))


def _check_sequence(state, slot, sequence, request, keep, allocation, block_size, freed):
  num_tokens, heads = sequence
  budget, window, sinks = request
  kept, blocks = oracles.evict(
      heads, num_tokens=num_tokens, window=window, sinks=sinks, block_size=block_size, allowed=budget,
      allocation=allocation, keep=[] if keep is None else keep.tolist())
  assert held_kvs(state, slot) == kept
  assert freed == np.sum(blocks)
  for layer, head in np.ndindex(LAYERS, HEADS):
    positions, keys, values = held_keys_and_values(state, layer, slot, head)
    tags = np.array([tag(slot, layer, head, p) for p in positions], np.float32)[:, None]
    np.testing.assert_array_equal(keys, np.broadcast_to(tags, keys.shape))
    np.testing.assert_array_equal(values, np.broadcast_to(-tags, values.shape))


@pytest.mark.parametrize(("allocation", "block_size"), SETTINGS)
def test_equals_oracle(allocation, block_size):
  """175 random caches in all: ties, empty heads, partial blocks, all protected, budget above
  length; two sequences in one call beside one that is left alone."""
  rng = np.random.default_rng(SETTINGS.index((allocation, block_size)))
  without_ranges = (allocation, block_size) == ("layer", 4)
  _check_random_caches(rng, allocation, block_size, CASES_PER_SETTING, without_ranges=without_ranges)


def test_four_bits_a_step_find_the_same(monkeypatch):
  """The search as GPUs run it, with 15 thresholds at a time."""
  asked = []
  monkeypatch.setattr("kvc_jax.eviction.select.bits_per_step", lambda: asked.append(4) or 4)
  _check_random_caches(np.random.default_rng(7), "all", 4, 10, jitted=_jitted.__wrapped__)  # traced anew
  assert asked


@pytest.mark.gpu
@pytest.mark.parametrize(("allocation", "block_size"), [("all", 8), ("layer", 8), ("head", 8), ("all", 16)])
def test_equals_oracle_on_gpu(allocation, block_size):
  with backends.use("triton"):
    _check_random_caches(
        np.random.default_rng(block_size), allocation, block_size, 10, without_ranges=True, head_dim=64)


def _check_random_caches(rng, allocation, block_size, cases, *, without_ranges=False, jitted=_jitted, **shape):
  """Ranges to keep are given to each case, or to half of them; where they are not, another program runs."""
  max_blocks = -(-MAX_TOKENS // block_size)
  run = jitted(allocation)
  for _ in range(cases):
    slots = [int(s) for s in rng.permutation(SLOTS)[:3]]
    sequences = {slot: _random_sequence(rng) for slot in slots}
    state = build_cache(
        rng, sequences, slots=SLOTS, block_size=block_size, max_blocks=max_blocks,
        num_blocks=SLOTS * LAYERS * HEADS * max_blocks + 1, **shape)
    check_invariants(state)
    requests = [_random_request(rng, sequences[slot][0]) for slot in slots[:2]]
    rows = np.array([[s, *r] for s, r in zip(slots[:2], requests, strict=True)] + [[SLOTS, 1, 1, 0]], np.int32).T
    keep = np.stack([_random_keep(rng, sequences[slot][0]) for slot in slots])
    if rng.random() < 0.5:
      keep = None if without_ranges else 0 * keep
    new, report = run(state, *rows, keep=keep)
    check_invariants(new)
    for i, slot in enumerate(slots[:2]):
      _check_sequence(
          new, slot, sequences[slot], requests[i], None if keep is None else keep[i], allocation, block_size,
          int(report.freed_blocks[i]))
      np.testing.assert_array_equal(report.lengths[i], new.lengths[:, slot])
    assert held_kvs(new, slots[2]) == held_kvs(state, slots[2])
    assert int(report.freed_blocks[2]) == 0
    assert int(new.free_count) == int(state.free_count) + int(report.freed_blocks.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("allocation", ["all", "layer", "head"])
def test_gpu_and_xla_choose_the_same(allocation, ties):
  """Three sequences of thousands of tokens, heads of unequal lengths; every KV's position and score."""
  rng = np.random.default_rng(ties)
  sequences = {}
  for slot in range(3):
    seen = int(rng.integers(2000, 3000))
    counts = rng.integers(0, seen + 1, (LAYERS, HEADS))
    scores = rng.integers(0, 50, (LAYERS, HEADS, seen)) if ties else rng.exponential(size=(LAYERS, HEADS, seen))
    sequences[slot] = (seen, [
        [[(int(p), float(np.float32(scores[i, h, p]))) for p in rng.permutation(seen)[: counts[i, h]]]
         for h in range(HEADS)] for i in range(LAYERS)])
  state = build_cache(rng, sequences, slots=3, block_size=16, max_blocks=200, num_blocks=3700, head_dim=64)
  rows = np.array([[0, 300, 32, 4], [1, 100, 0, 0], [2, 700, 64, 0]], np.int32).T
  held = []
  for backend in ("triton", "xla"):
    with backends.use(backend):
      new, _ = _jitted(allocation)(state, *rows)
    check_invariants(new)
    held.append([held_kvs(new, slot) for slot in range(3)])
  assert held[0] == held[1]


def test_a_bound_of_the_lengths_changes_nothing():
  rng = np.random.default_rng(3)
  sequences = {0: _random_sequence(rng), 2: _random_sequence(rng)}
  state = build_cache(rng, sequences, slots=3, block_size=4, max_blocks=20, num_blocks=200)
  rows = np.array([[2, 5, 1, 0], [0, 3, 0, 0]], np.int32).T
  whole = _evict(state, *rows, rule=WindowAttention())
  bounded = _evict(state, *rows, rule=WindowAttention(), max_tokens=MAX_TOKENS)
  for slot in (0, 2):
    assert held_kvs(whole[0], slot) == held_kvs(bounded[0], slot) != held_kvs(state, slot)
  check_invariants(bounded[0])
  np.testing.assert_array_equal(whole[1].lengths, bounded[1].lengths)


def test_hand_worked():
  """Two heads of 4 KVs in blocks of 2; two of the four blocks may stay; position 3 is protected.

  Head 0, scores 5 1 4 (9): its first block costs its 2nd smallest, 4; a second one
  would need four evictable KVs. Head 1, scores 3 2 8 (8): its first costs 3. Both
  are freed: head 0 loses scores 1 and 4, head 1 loses 2 and 3.
  """
  heads = [[[(0, 5.0), (1, 1.0), (2, 4.0), (3, 9.0)], [(0, 3.0), (1, 2.0), (2, 8.0), (3, 8.0)]]]
  state = build_cache(
      np.random.default_rng(0), {0: (4, heads)}, slots=1, block_size=2, max_blocks=2, num_blocks=5)
  new, report = _evict(
      state, np.array([0]), np.array([2]), np.array([1]), np.array([0]), rule=WindowAttention())
  assert held_kvs(new, 0) == [[[(0, 5.0), (3, 9.0)], [(2, 8.0), (3, 8.0)]]]
  assert report.freed_blocks.tolist() == [2]


def test_ties_take_the_oldest_and_the_first_head():
  heads = [[[(3, 1.0), (0, 1.0), (2, 1.0), (1, 1.0)], [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]]]
  state = build_cache(
      np.random.default_rng(0), {0: (9, heads)}, slots=1, block_size=2, max_blocks=2, num_blocks=5)
  three_blocks = np.array([3])  # ceil(3 / 2) = 2 a head: nothing to do
  same, _ = _evict(state, np.array([0]), three_blocks, np.array([1]), np.array([0]), rule=WindowAttention())
  assert held_kvs(same, 0) == held_kvs(state, 0)
  new, _ = _evict(state, np.array([0]), np.array([2]), np.array([1]), np.array([0]), rule=WindowAttention())
  # Two blocks go, both of equal cost: head 0 pays both, for it comes first.
  assert [len(h) for h in held_kvs(new, 0)[0]] == [0, 4]
  one_each, _ = _evict(
      state, np.array([0]), np.array([2]), np.array([1]), np.array([0]), rule=WindowAttention(), allocation="head")
  assert [[p for p, _ in h] for h in held_kvs(one_each, 0)[0]] == [[2, 3], [2, 3]]


def test_negative_scores_are_ordered():
  """A rule of one's own may value KVs below zero."""
  heads = [[[(0, 0.0), (1, -2.0), (2, 3.0), (3, -1.0)], [(0, -5.0), (1, -4.0), (2, -3.0), (3, -6.0)]]]
  state = build_cache(
      np.random.default_rng(0), {0: (9, heads)}, slots=1, block_size=2, max_blocks=2, num_blocks=5)
  # A second block of head 1 would cost -3, the first of head 0 costs -1.
  new, _ = _evict(state, np.array([0]), np.array([2]), np.array([1]), np.array([0]), rule=WindowAttention())
  assert [[p for p, _ in head] for head in held_kvs(new, 0)[0]] == [[0, 1, 2, 3], []]
  new, _ = _evict(
      state, np.array([0]), np.array([2]), np.array([1]), np.array([0]), rule=WindowAttention(), allocation="head")
  assert [[p for p, _ in head] for head in held_kvs(new, 0)[0]] == [[0, 2], [1, 2]]


def test_random_score_ignores_storage_order_and_slot():
  """The same positions go wherever and in whatever order they are stored."""
  rng = np.random.default_rng(0)
  kept = []
  for slot in (0, 2):
    heads = [[[(int(p), 0.0) for p in rng.permutation(32)] for _ in range(HEADS)] for _ in range(LAYERS)]
    state = build_cache(rng, {slot: (32, heads)}, slots=3, block_size=4, max_blocks=8, num_blocks=60)
    new, _ = _evict(
        state, np.array([slot]), np.array([12]), np.array([4]), np.array([0]), rule=RandomScore(seed=3))
    check_invariants(new)
    kept.append(held_kvs(new, slot))
  assert kept[0] == kept[1]
  assert kept[0][0][0] != kept[0][0][1]


def test_unknown_allocation_is_refused():
  held = {0: (1, [[[(0, 0.0)]]])}
  state = build_cache(np.random.default_rng(0), held, slots=1, block_size=2, max_blocks=2, num_blocks=3)
  one = np.array([0])
  with pytest.raises(ValueError, match="give one of all, layer, head"):
    evict(state, one, one, one, one, rule=WindowAttention(), allocation="heads")
