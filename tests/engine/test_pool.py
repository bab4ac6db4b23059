"""How large the pool is where the caller does not say."""

import jax
import pytest

from kvc_jax.engine import pool


class _Device:
  def __init__(self, **stats):
    self._stats = stats

  def memory_stats(self):
    return self._stats or None


@pytest.mark.parametrize(("stats", "bytes_free"), [
    ({"bytes_limit": 1000, "bytes_in_use": 400}, 600),
    # The allocator holds all of the device, but the model's arrays lie scattered over it.
    ({"bytes_limit": 1000, "bytes_in_use": 400, "pool_bytes": 1000, "largest_free_block_bytes": 300}, 300),
    # It has taken half of it so far.
    ({"bytes_limit": 1000, "bytes_in_use": 400, "pool_bytes": 500, "largest_free_block_bytes": 90}, 500),
])
def test_the_pool_takes_a_share_of_one_gap(monkeypatch, stats, bytes_free):
  monkeypatch.setattr(jax, "devices", lambda: [_Device(**stats)])
  assert pool._free_memory() == int(0.9 * bytes_free)


def test_a_device_without_figures_gets_a_gibibyte(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [_Device()])
  assert pool._free_memory() == 1 << 30
