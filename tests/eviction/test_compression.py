"""Budgets in tokens against the oracle."""

import oracles
import pytest

from kvc_jax import Compression, InputError


@pytest.mark.parametrize("rate", [1, 1.5, 2, 2.1, 3.3, 8, 64])
@pytest.mark.parametrize("window", [1, 8, 32])
def test_rate(rate, window):
  for tokens in (1, 7, 8, 9, 31, 32, 33, 53, 100, 4096, 131072):
    expected = oracles.allowed_tokens(tokens, rate=rate, window=window)
    assert Compression(rate=rate, window=window).cache_tokens(tokens) == expected


def test_size_and_both():
  assert Compression(max_cache_tokens=64).cache_tokens(1000) == 64
  assert Compression(max_cache_tokens=64).cache_tokens(10) == 10
  assert Compression(rate=2, max_cache_tokens=64, window=4).cache_tokens(100) == 52
  assert Compression(rate=2, max_cache_tokens=64, window=4).cache_tokens(1000) == 64


@pytest.mark.parametrize(("tokens", "keep", "protected"), [
    (100, [], 12),  # 4 sinks, 8 newest
    (100, [(10, 20)], 22),
    (100, [(2, 20), (10, 30)], 38),  # overlaps the sinks and itself: 0-30, 92-100
    (100, [(95, 2000)], 12),
    (100, [(200, 2000)], 12),
    (10, [(0, 100)], 10),
    (6, [], 6),
])
def test_what_stays_counts_tokens_once(tokens, keep, protected):
  assert Compression(max_cache_tokens=12, window=8, sinks=4, keep=keep).floor_tokens(tokens) == max(
      min(12, tokens), protected)


@pytest.mark.parametrize("again", [{"interval": 4}, {"prefill_interval": 64}, {"on_demand": True}])
def test_a_share_of_the_scores_is_taken_once(again):
  with pytest.raises(InputError, match="leave interval, prefill_interval and on_demand out"):
    Compression(mass=0.9, **again)
