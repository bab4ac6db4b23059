"""Budgets in tokens against the oracle."""

import oracles
import pytest

from kvc_jax import Compression


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
