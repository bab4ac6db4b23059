"""Hand-worked cases for the oracles. A key of ln(w), against a query of 1, weighs w."""

import math

import numpy as np
import oracles
import pytest


def _keys(*weights_per_head):
  """Keys [Tk, H, 1] that weigh as given, one tuple of weights per KV head."""
  return np.log(np.array(weights_per_head, np.float64)).T[:, :, None]


def _ones(tokens, query_heads=1):
  return np.ones((tokens, query_heads, 1))


# --- Attention -------------------------------------------------------------------------------


def test_probabilities_causal():
  # Weights 1, 2, 4: the first query sees one key, the second two (sum 3), the third all (sum 7).
  got = oracles.probabilities(_ones(3), _keys((1, 2, 4)), [0, 1, 2], [0, 1, 2], 1.0)
  np.testing.assert_allclose(got, [[[1, 0, 0], [1 / 3, 2 / 3, 0], [1 / 7, 2 / 7, 4 / 7]]])


def test_probabilities_map_query_heads_to_kv_heads():
  # H = 2, G = 2. Query heads 0, 1 use weights (1, 2, 4), query heads 2, 3 use (1, 1, 1).
  # A query of 2 squares the weights (1, 4, 16: sum 21); a query of 0 makes them equal.
  q = np.array([1.0, 2.0, 1.0, 0.0]).reshape(1, 4, 1)
  got = oracles.probabilities(q, _keys((1, 2, 4), (1, 1, 1)), [2], [0, 1, 2], 1.0)
  third = [1 / 3] * 3
  np.testing.assert_allclose(got[:, 0], [[1 / 7, 2 / 7, 4 / 7], [1 / 21, 4 / 21, 16 / 21], third, third])


def test_probabilities_scale():
  # A query of 2 at scale 1/2 is a query of 1.
  got = oracles.probabilities(2 * _ones(1), _keys((1, 3)), [1], [0, 1], 0.5)
  np.testing.assert_allclose(got, [[[1 / 4, 3 / 4]]])


def test_probabilities_go_by_position_not_by_order():
  # Keys at 5, 2 and 9; the query at 5 sees the first two (weights 1, 3), the one at 1 sees none.
  got = oracles.probabilities(_ones(2), _keys((1, 3, 100)), [5, 1], [5, 2, 9], 1.0)
  np.testing.assert_allclose(got, [[[1 / 4, 3 / 4, 0], [0, 0, 0]]])


def test_probabilities_of_large_logits_are_finite():
  got = oracles.probabilities(_ones(1), np.array([[[1e4]], [[1e4]]]), [1], [0, 1], 1.0)
  np.testing.assert_allclose(got, [[[0.5, 0.5]]])


def test_attention():
  # Weights 1, 2, 4 and values 7, 14, 21: 7; (7 + 28) / 3; (7 + 28 + 84) / 7 = 17.
  v = np.array([7.0, 14.0, 21.0]).reshape(3, 1, 1)
  got = oracles.attention(_ones(3), _keys((1, 2, 4)), v, [0, 1, 2], [0, 1, 2], 1.0)
  np.testing.assert_allclose(got[:, 0, 0], [7, 35 / 3, 17])


def test_attention_of_a_group_reads_its_own_head():
  # One key per head, so each query head returns its KV head's value: heads 0, 0, 1, 1.
  v = np.array([[[10.0], [20.0]]])
  got = oracles.attention(_ones(1, 4), _keys((1,), (1,)), v, [0], [0], 1.0)
  np.testing.assert_allclose(got[0, :, 0], [10, 10, 20, 20])


def test_attention_ragged_with_an_empty_head():
  # Head 0 holds nothing; head 1 holds weights 1, 3 with values 8, 16: (8 + 48) / 4 = 14.
  ks = [np.zeros((0, 1)), np.log([[1.0], [3.0]])]
  vs = [np.zeros((0, 1)), np.array([[8.0], [16.0]])]
  np.testing.assert_allclose(oracles.attention_ragged(np.ones((2, 1)), ks, vs, 1.0), [[0], [14]])


def test_attention_ragged_equals_attention_on_equal_heads():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(1, 6, 4)), rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 4))
  dense = oracles.attention(q, k, v, [4], range(5), 0.5)
  ragged = oracles.attention_ragged(q[0], list(k.swapaxes(0, 1)), list(v.swapaxes(0, 1)), 0.5)
  np.testing.assert_allclose(ragged, dense[0])


# --- Scores ----------------------------------------------------------------------------------

# Weights 1, 2, 4, 1. Query 2 gives (1, 2, 4, 0) / 7, query 3 gives (1, 2, 4, 1) / 8.
_FOUR = _keys((1, 2, 4, 1))


def test_window_scores_sum_of_last_queries():
  # (1/7 + 1/8, 2/7 + 2/8, 4/7 + 4/8, 0 + 1/8) = (15, 30, 60, 7) / 56
  got = oracles.window_scores(_ones(4), _FOUR, queries=2, power=1, pooling=1, scale=1.0)
  np.testing.assert_allclose(got, np.array([[15, 30, 60, 7]]) / 56)


def test_window_scores_squared():
  # 1/49 + 1/64 = 113/3136, times 1, 4, 16; the last key is seen by query 3 alone: 1/64.
  got = oracles.window_scores(_ones(4), _FOUR, queries=2, power=2, pooling=1, scale=1.0)
  np.testing.assert_allclose(got, [[113 / 3136, 452 / 3136, 1808 / 3136, 1 / 64]])


def test_window_scores_pooled():
  # (15, 30, 60, 7): each the largest of itself and its neighbours; nothing wraps at the ends.
  got = oracles.window_scores(_ones(4), _FOUR, queries=2, power=1, pooling=3, scale=1.0)
  np.testing.assert_allclose(got, np.array([[30, 60, 60, 60]]) / 56)
  got = oracles.window_scores(_ones(4), _FOUR, queries=2, power=1, pooling=7, scale=1.0)
  np.testing.assert_allclose(got, np.array([[60, 60, 60, 60]]) / 56)


def test_window_scores_of_a_prompt_shorter_than_the_window():
  # Only 2 tokens: queries 0 and 1 give (1, 0) and (1, 2) / 3.
  got = oracles.window_scores(_ones(2), _keys((1, 2)), queries=3, power=1, pooling=1, scale=1.0)
  np.testing.assert_allclose(got, [[4 / 3, 2 / 3]])


def test_window_scores_pool_before_summing_the_group():
  # Keys weigh (4, 1, 1, 1). Queries of 1 and -1: (4, 1, 1, 1) / 7 and (1, 4, 4, 4) / 13.
  # Pooled by 3: (4, 4, 1, 1) / 7 and (4, 4, 4, 4) / 13; then summed.
  q = np.tile(np.array([[1.0], [-1.0]]), (4, 1, 1))
  got = oracles.window_scores(q, _keys((4, 1, 1, 1)), queries=1, power=1, pooling=3, scale=1.0)
  a, b = 4 / 7 + 4 / 13, 1 / 7 + 4 / 13
  np.testing.assert_allclose(got, [[a, a, b, b]])


def test_full_scores():
  # Weights 1, 2, 4; rows (1, 0, 0), (1, 2, 0) / 3, (1, 2, 4) / 7. With buffer 1 the diagonal is
  # out: key 0 gets 1/3 + 1/7, key 1 gets 2/7, key 2 nothing. With buffer 0 it is in.
  args = (_ones(3), _keys((1, 2, 4)))
  got = oracles.full_scores(*args, power=1, buffer=1, scale=1.0)
  np.testing.assert_allclose(got, [[10 / 21, 2 / 7, 0]])
  got = oracles.full_scores(*args, power=1, buffer=0, scale=1.0)
  np.testing.assert_allclose(got, [[1 + 10 / 21, 2 / 3 + 2 / 7, 4 / 7]])
  got = oracles.full_scores(*args, power=2, buffer=1, scale=1.0)
  np.testing.assert_allclose(got, [[1 / 9 + 1 / 49, 4 / 49, 0]])
  got = oracles.full_scores(*args, power=2, buffer=3, scale=1.0)
  np.testing.assert_allclose(got, [[0, 0, 0]])


def test_full_scores_sum_over_the_group():
  # A second query head of 0 sees all alike: rows (1, 0), (1, 1) / 2. Buffer 0: 3/2, 1/2.
  # The first (weights 1, 2): 1 + 1/3, 2/3.
  q = np.tile(np.array([[1.0], [0.0]]), (2, 1, 1))
  got = oracles.full_scores(q, _keys((1, 2)), power=1, buffer=0, scale=1.0)
  np.testing.assert_allclose(got, [[4 / 3 + 3 / 2, 2 / 3 + 1 / 2]])


def test_decode_scores():
  # Head 0 weighs (1, 2, 1) for query head 0: (1, 2, 1) / 4; query head 1 is 0: thirds. Squared and
  # summed: 1/16 + 1/9, 4/16 + 1/9, 1/16 + 1/9. Buffer 2, query at 5: the key at 5 does not count.
  # Head 1 holds nothing.
  q = np.array([[1.0], [0.0], [1.0], [1.0]])
  ks = [np.log([[1.0], [2.0], [1.0]]), np.zeros((0, 1))]
  got = oracles.decode_scores(q, 5, ks, [[0, 3, 5], []], power=2, buffer=2, scale=1.0)
  assert [len(x) for x in got] == [3, 0]
  np.testing.assert_allclose(got[0], [1 / 16 + 1 / 9, 1 / 4 + 1 / 9, 0])
  got = oracles.decode_scores(q, 5, ks, [[0, 3, 5], []], power=1, buffer=0, scale=1.0)
  np.testing.assert_allclose(got[0], [1 / 4 + 1 / 3, 1 / 2 + 1 / 3, 1 / 4 + 1 / 3])


def test_decode_scores_are_the_last_row_of_full_scores():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(6, 4, 3)), rng.normal(size=(6, 2, 3))
  options = {"power": 2, "buffer": 2, "scale": 0.7}
  before = np.pad(oracles.full_scores(q[:5], k[:5], **options), ((0, 0), (0, 1)))
  step = oracles.decode_scores(q[5], 5, list(k.swapaxes(0, 1)), [np.arange(6)] * 2, **options)
  np.testing.assert_allclose(before + np.stack(step), oracles.full_scores(q, k, **options))


def test_mean_normalised():
  # Queries 6..9, buffer 2: a query counts for keys up to 4, 5, 6, 7. Keys 0 and 4 have 4
  # queries, 5 has 3, 7 has 1, and 8 and 9 have none, so that they are divided by 1.
  got = oracles.mean_normalised(np.full((2, 6), 12.0), [0, 4, 5, 7, 8, 9], 10, 6, 2)
  np.testing.assert_allclose(got, [[3, 3, 4, 12, 12, 12]] * 2)
  # Buffer 0: key 8 is seen by queries 8 and 9, key 9 by query 9.
  got = oracles.mean_normalised([12.0, 12.0], [8, 9], 10, 6, 0)
  np.testing.assert_allclose(got, [6, 12])


# --- Budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "rate", "expected"), [
    (100, 4, 8 + 23),    # 92 / 4 = 23
    (101, 4, 8 + 24),    # 93 / 4 = 23.25, rounded up
    (100, 1, 100),
    (5, 64, 5),          # shorter than the window
    (9, 64, 9),          # one KV outside it: 1/64 of it is rounded up to 1
    (100, 1.5, 8 + 62),  # 92 / 1.5 = 61.3
])
def test_allowed_tokens_by_rate(num_tokens, rate, expected):
  assert oracles.allowed_tokens(num_tokens, rate=rate, window=8) == expected


def test_allowed_tokens_by_size():
  assert oracles.allowed_tokens(100, max_cache_tokens=30, window=8) == 30
  assert oracles.allowed_tokens(100, max_cache_tokens=300, window=8) == 300
  with pytest.raises(ValueError, match="exactly one"):
    oracles.allowed_tokens(100, window=8)
  with pytest.raises(ValueError, match="exactly one"):
    oracles.allowed_tokens(100, rate=2, max_cache_tokens=30, window=8)


def test_allowed_blocks():
  assert oracles.allowed_blocks(30, block_size=16, num_heads=6) == 12  # ceil(30 / 16) = 2
  assert oracles.allowed_blocks(32, block_size=16, num_heads=6) == 12
  assert oracles.allowed_blocks(33, block_size=16, num_heads=6) == 18


# --- Eviction --------------------------------------------------------------------------------


def _held(scores, positions=None):
  return list(zip(range(len(scores)) if positions is None else positions, scores, strict=True))


def _evict(heads, **changed):
  """Evicts with P = 2, the newest token protected, and C = 4 (two blocks per head)."""
  options = {"num_tokens": 5, "window": 1, "sinks": 0, "block_size": 2, "allowed": 4, "allocation": "all"}
  kept, freed = oracles.evict(heads, **(options | changed))
  return [[[position for position, _ in held] for held in layer] for layer in kept], freed


# Five KVs in blocks of 2: three blocks, the last holds h = 1. The newest (score 9) is protected.
# A: ascending 1, 2, 4, 5 at positions 1, 3, 2, 0. Block 0 costs the 0th (1), block 1 the 2nd (4),
# block 2 would need 5 evictable KVs of 4.
_A = _held([5, 1, 4, 2, 9])
_B = _held([3, 3, 3, 3, 9])  # costs 3 and 3


def test_evict_cheapest_blocks():
  # 6 blocks held, 4 allowed: E = 2: A's at 1, then B's at 3. Of B's equal scores position 0 goes.
  kept, freed = _evict([[_A, _B]])
  assert freed == [[1, 1]]
  assert kept == [[[0, 2, 3, 4], [1, 2, 3, 4]]]


def test_evict_second_blocks_cost_p_more():
  # C = 2: 2 blocks allowed, E = 4: everything that can be freed, 3 KVs of each head.
  kept, freed = _evict([[_A, _B]], allowed=2)
  assert freed == [[2, 2]]
  assert kept == [[[0, 4], [3, 4]]]


def test_evict_fewer_are_freeable_than_asked():
  # C = 0 asks for 6 blocks, but each head's last block holds the protected KV.
  kept, freed = _evict([[_A, _B]], allowed=0)
  assert freed == [[2, 2]]
  assert kept == [[[0, 4], [3, 4]]]


def test_evict_keeps_scores():
  kept, _ = oracles.evict([[_A]], num_tokens=5, window=1, sinks=0, block_size=2, allowed=4, allocation="all")
  assert kept == [[[(0, 5), (2, 4), (3, 2), (4, 9)]]]


def test_evict_order_of_the_input_does_not_matter():
  assert _evict([[_A[::-1], _B[::-1]]]) == _evict([[_A, _B]])


_LOW, _HIGH = _held([1, 1, 1, 1, 9]), _held([5, 6, 7, 8, 9])


@pytest.mark.parametrize(("heads", "allocation", "expected"), [
    ([[_LOW, _HIGH]], "all", [[2, 0]]),      # costs 1, 1 against 5, 7
    ([[_LOW, _HIGH]], "layer", [[2, 0]]),
    ([[_LOW, _HIGH]], "head", [[1, 1]]),
    ([[_LOW], [_HIGH]], "all", [[2], [0]]),
    ([[_LOW], [_HIGH]], "layer", [[1], [1]]),
    ([[_LOW], [_HIGH]], "head", [[1], [1]]),
])
def test_evict_allocation(heads, allocation, expected):
  assert _evict(heads, allocation=allocation)[1] == expected


def test_evict_unknown_allocation():
  with pytest.raises(ValueError, match="'pyramid'"):
    _evict([[_A]], allocation="pyramid")


# Three KVs at cost 3 in two blocks: h = 1, so one block at 3; the second would need 3 evictable.
_SHORT = _held([3, 3, 9], [0, 1, 4])


@pytest.mark.parametrize(("heads", "expected"), [
    ([[_B, _B]], [[2, 0]]),                        # E = 2: head order goes before j
    ([[_B, _B], [_B, _B]], [[2, 2], [0, 0]]),      # E = 4: row-major
    ([[_SHORT, _B]], [[1, 0]]),                    # 2 + 3 blocks, 4 allowed: E = 1
    ([[_B, _SHORT]], [[1, 0]]),
    ([[_SHORT, _B], [_B, _B]], [[1, 2], [0, 0]]),  # 2 + 3 + 3 + 3 blocks, 8 allowed: E = 3
])
def test_evict_equal_costs_go_in_head_order(heads, expected):
  assert _evict(heads)[1] == expected


def test_evict_full_last_block():
  # n = 4, P = 2: h = 2, so the first block costs the 1st smallest of 1, 2, 3: 2.
  # The other head (n = 3, h = 1) costs its 0th smallest, 1.5. Blocks 2 + 2, allowed 1 + 1: E = 2.
  heads = [[_held([1, 2, 3, 9]), _held([1.5, 4, 9], [0, 1, 3])]]
  kept, freed = _evict(heads, num_tokens=4, allowed=2)
  assert freed == [[1, 1]]
  assert kept == [[[2, 3], [1, 3]]]


def test_evict_partial_block_is_the_cheaper():
  # One block too many, by an empty third head: the partial block's 1.5 beats the full one's 2.
  heads = [[_held([1, 2, 3, 9]), _held([1.5, 4, 9], [0, 1, 3]), []]]
  kept, freed = _evict(heads, num_tokens=4, allowed=2)
  assert freed == [[0, 1, 0]]
  assert kept == [[[0, 1, 2, 3], [1, 3], []]]


def test_evict_empty_heads():
  # An empty head holds no block and frees none, but its share of the budget counts.
  assert _evict([[[], _A]], allowed=2) == ([[[], [0, 2, 3, 4]]], [[0, 1]])
  assert _evict([[[], []]], allowed=0) == ([[[], []]], [[0, 0]])


def test_evict_whole_head():
  # Nothing protected: all 4 KVs go, and with them both blocks.
  assert _evict([[_held([1, 2, 3, 4])]], num_tokens=9, window=1, allowed=0) == ([[[]]], [[2]])


def test_evict_all_protected():
  assert _evict([[_A, _B]], window=5, allowed=0) == ([[[0, 1, 2, 3, 4]] * 2], [[0, 0]])
  assert _evict([[_A, _B]], window=2, sinks=3, allowed=0) == ([[[0, 1, 2, 3, 4]] * 2], [[0, 0]])


def test_evict_sinks():
  # Positions 0 and 1 are sinks, 4 the window: A's 2 (score 4) and 3 (score 2) are left, h = 1.
  assert _evict([[_A]], sinks=2) == ([[[0, 1, 2, 4]]], [[1]])


def test_evict_window_counts_from_the_true_length():
  # After an earlier compression: 3 KVs held of 10 tokens. Window 2 protects 8 and 9, so of
  # scores 7, 6, 5 at 0, 3, 9 the evictable minimum is 6.
  heads = [[_held([7, 6, 5], [0, 3, 9])]]
  assert _evict(heads, num_tokens=10, window=2, allowed=2) == ([[[0, 9]]], [[1]])


def test_evict_budget_not_below_the_length_changes_nothing():
  for allowed in (5, 6, 100):  # 5 tokens round up to the 3 blocks held
    assert _evict([[_A, _B]], allowed=allowed) == ([[[0, 1, 2, 3, 4]] * 2], [[0, 0]])


@pytest.mark.parametrize("allocation", ["all", "layer", "head"])
@pytest.mark.parametrize("seed", range(10))
def test_evict_random(seed, allocation):
  """Against a second formulation (sort all blocks once), and what must hold in any case."""
  rng = np.random.default_rng(seed)
  num_layers, kv_heads, size, num_tokens = 2, 3, 4, 30
  heads = [[_held(rng.integers(0, 4, n := rng.integers(0, num_tokens + 1)).tolist(),
                  sorted(rng.permutation(num_tokens)[:n].tolist()))
            for _ in range(kv_heads)] for _ in range(num_layers)]
  allowed = int(rng.integers(0, num_tokens))
  options = {"num_tokens": num_tokens, "window": int(rng.integers(0, 6)), "sinks": int(rng.integers(0, 3))}
  kept, freed = oracles.evict(heads, block_size=size, allowed=allowed, allocation=allocation, **options)

  def group(layer, head):
    return {"all": 0, "layer": layer, "head": (layer, head)}[allocation]

  offers, excess = {}, {}
  for layer in range(num_layers):
    for head in range(kv_heads):
      held = heads[layer][head]
      key = group(layer, head)
      excess[key] = excess.get(key, 0) + -(-len(held) // size) - -(-allowed // size)
      scores = sorted(s for p, s in held if options["sinks"] <= p < num_tokens - options["window"])
      occupancy = len(held) % size or size
      costs = scores[occupancy - 1::size] if held else []
      offers.setdefault(key, []).extend((cost, layer, head) for cost in costs)
  expected = [[0] * kv_heads for _ in range(num_layers)]
  for key, blocks in offers.items():
    for _, layer, head in sorted(blocks)[:max(0, excess[key])]:
      expected[layer][head] += 1
  assert freed == expected

  for layer in range(num_layers):
    for head in range(kv_heads):
      held, left, blocks = heads[layer][head], kept[layer][head], freed[layer][head]
      assert set(left) <= set(held)
      assert math.ceil(len(left) / size) == math.ceil(len(held) / size) - blocks
      if blocks:
        assert len(left) % size == 0
      else:
        assert left == held
      gone = set(held) - set(left)
      assert all(options["sinks"] <= p < num_tokens - options["window"] for p, _ in gone)


# --- The cache -------------------------------------------------------------------------------


def _cache(**changed):
  """Two layers of two heads, blocks of 4: 20 blocks, at most 3 a head (12 KVs)."""
  options = {"num_layers": 2, "kv_heads": 2, "block_size": 4, "total_blocks": 20, "max_blocks": 3}
  return oracles.CacheModel(**(options | changed))


def test_cache_allocates_by_whole_blocks():
  cache = _cache()
  assert cache.allocate(0, 4)      # 4 heads, one full block each
  assert cache.blocks_in_use == 4
  assert cache.allocate(0, 1)      # a second block each
  assert cache.blocks_in_use == 8
  assert cache.allocate(0, 3)      # fills it
  assert (cache.blocks_in_use, cache.blocks_free) == (8, 12)
  assert cache.lengths(0) == [[8, 8], [8, 8]]
  assert cache.num_tokens == {0: 8}
  cache.check_invariants()


def test_cache_refuses_what_does_not_fit():
  cache = _cache()
  assert not cache.allocate(0, 13)     # 4 blocks a head, at most 3
  assert cache.allocate(0, 12)         # 12 blocks
  assert not cache.allocate(0, 1)
  assert not cache.allocate(1, 9)      # 12 more: only 8 are free
  assert 1 not in cache.positions
  assert cache.allocate(1, 8)
  assert cache.blocks_free == 0
  assert not cache.allocate(2, 1)
  cache.check_invariants()


def test_cache_evicts_and_fills_the_holes():
  cache = _cache()
  cache.allocate(0, 9)                                              # 3 blocks each: 12
  kept = [[[0, 8], [8, 7, 6, 5]], [[], list(range(9))]]             # blocks 1 + 1 + 0 + 3
  assert cache.evict(0, kept) == 12 - 5
  assert cache.positions[0] == [[[0, 8], [5, 6, 7, 8]], [[], list(range(9))]]
  assert cache.num_tokens == {0: 9}
  assert cache.allocate(0, 2)                                       # lengths 4, 6, 2, 11: one and one more
  assert cache.positions[0] == [[[0, 8, 9, 10], [5, 6, 7, 8, 9, 10]], [[9, 10], list(range(11))]]
  assert cache.blocks(0) == 1 + 2 + 1 + 3
  cache.check_invariants()


def test_cache_refuses_kept_positions_that_are_not_held():
  cache = _cache()
  cache.allocate(0, 3)
  everything = [0, 1, 2]
  for wrong in ([3], [0, 0]):
    with pytest.raises(ValueError, match="not a subset"):
      cache.evict(0, [[everything, everything], [everything, wrong]])
  assert cache.lengths(0) == [[3, 3], [3, 3]]


def test_cache_releases():
  cache = _cache()
  cache.allocate(0, 5)
  cache.allocate(1, 1)
  assert cache.release(0) == 8
  assert cache.release(0) == 0
  assert cache.blocks_in_use == 4
  assert cache.lengths(0) == [[0, 0], [0, 0]]
  assert cache.allocate(0, 1)
  assert cache.positions[0][0][0] == [0]  # a new sequence starts at position 0
  cache.check_invariants()
