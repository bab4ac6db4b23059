"""Writing keys and values of new tokens: where they go, and that no two share a place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.cache import alloc, write
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.kernels.kv_write import kv_write

SLOTS, HEADS, BLOCK_SIZE = 3, 2, 4
_allocate = jax.jit(alloc.allocate, static_argnames="max_count")


@pytest.fixture
def targets(monkeypatch):
  """What each call of `kv_write` was told: rows of (block, offset)."""
  calls = []

  def noted(kv, k, v, blocks, offsets):
    calls.append(np.stack([np.asarray(blocks).ravel(), np.asarray(offsets).ravel()], axis=1))
    return kv_write(kv, k, v, blocks, offsets)

  monkeypatch.setattr(write, "kv_write", noted)
  return calls


@pytest.mark.parametrize("valid", [[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
@pytest.mark.parametrize("chunk", [True, False])
def test_rows_that_are_not_valid_are_dropped_each_at_a_place_of_its_own(targets, valid, chunk):
  """All of them on one place is right too, but there a GPU writes them one by one."""
  state = init_cache(CacheConfig(
      num_layers=1, num_slots=SLOTS, num_kv_heads=HEADS, head_dim=2, num_blocks=20, max_blocks_per_head=3,
      block_size=BLOCK_SIZE, dtype=jnp.float32))
  valid = np.array(valid, bool)
  if chunk:
    valid = np.sort(valid)[::-1]  # padding is behind
    slots, positions = np.full(3, 1), 1 + np.arange(3)
    state, _ = _allocate(state, jnp.array([1]), jnp.array([1 + valid.sum()]), max_count=4)
  else:
    slots, positions = np.arange(3), np.zeros(3, int)
    state, _ = _allocate(state, jnp.arange(3), jnp.asarray(valid, jnp.int32), max_count=1)
  k = jnp.arange(1.0, 13).reshape(3, HEADS, 2)
  after = write.write(
      state, jnp.int32(0), jnp.asarray(slots), jnp.asarray(positions), k, -k, jnp.asarray(valid))
  (rows,) = targets
  assert len(np.unique(rows, axis=0)) == len(rows)
  np.testing.assert_array_equal(rows[:, 0] < state.num_blocks, np.repeat(valid, HEADS))
  expected = np.array(state.kv)
  for (block, offset), key in zip(rows, np.asarray(k).reshape(-1, 2), strict=True):
    if block < state.num_blocks:
      expected[block, :, offset] = key, -key
  np.testing.assert_array_equal(after.kv, expected)
