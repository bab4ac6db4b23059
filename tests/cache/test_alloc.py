"""Allocation and release: hand-worked cases where the pool or a table runs out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.cache.alloc import allocate, release
from kvc_jax.cache.state import CacheConfig, check_invariants, init_cache

CONFIG = CacheConfig(
    num_layers=2, num_slots=4, num_kv_heads=1, head_dim=2, num_blocks=9, max_blocks_per_head=3, block_size=4,
    dtype=jnp.float32)


_allocated = jax.jit(allocate, static_argnames="max_count")
_release = jax.jit(release)


def _allocate(state, slots, counts):
  state, ok = _allocated(state, jnp.array(slots), jnp.array(counts), max_count=12)
  check_invariants(state)
  return state, ok.tolist()


def test_blocks_go_in_order_until_they_run_out():
  """8 blocks, 2 heads a sequence: slots 2 and 0 take 4 and 2; slot 3 wants 4 and gets none."""
  state, ok = _allocate(init_cache(CONFIG), [2, 0, 3], [5, 1, 8])
  assert ok == [True, True, False]
  assert state.lengths[:, :, 0].tolist() == [[1, 0, 5, 0]] * 2
  assert state.num_tokens.tolist() == [1, 0, 5, 0]
  assert int(state.free_count) == 2
  assert not np.asarray(state.tables[:, 3]).any()


def test_who_needs_no_block_is_served_behind_a_refusal():
  """Slot 0 has room in its blocks; slot 1 does not fit, and nor does slot 2 behind it, though it alone would."""
  state, _ = _allocate(init_cache(CONFIG), [0], [9])  # 6 of 8 blocks
  state, ok = _allocate(state, [1, 0, 2], [8, 3, 4])
  assert ok == [False, True, False]
  assert state.num_tokens.tolist() == [12, 0, 0, 0]
  assert int(state.free_count) == 2


def test_a_head_never_passes_its_table():
  state, ok = _allocate(init_cache(CONFIG), [0, 1], [12, 4])
  assert ok == [True, True]
  state = _release(state, jnp.array([1]))
  state, ok = _allocate(state, [0, 1], [1, 4])  # a 13th KV would be in block 3 of 0..2
  assert ok == [False, True]
  assert state.num_tokens.tolist() == [12, 4, 0, 0]


def test_slot_number_s_is_ignored():
  state, ok = _allocate(init_cache(CONFIG), [4, 1], [4, 4])
  assert ok == [False, True]
  assert int(state.free_count) == 6
  state = _release(state, jnp.array([4, 1]))
  check_invariants(state)
  assert int(state.free_count) == 8


def test_a_negative_slot_is_not_the_last_one():
  state, ok = _allocate(init_cache(CONFIG), [3, -1], [4, 4])
  assert ok == [True, False]
  assert state.num_tokens.tolist() == [0, 0, 0, 4]
  state = _release(state, jnp.array([-1]))
  check_invariants(state)
  assert int(state.free_count) == 6


def test_positions_and_scores_of_new_kvs():
  state, _ = _allocate(init_cache(CONFIG), [1], [3])
  state = dataclasses.replace(state, scores=state.scores + 7.0)
  state, _ = _allocate(state, [1], [3])
  for layer in range(2):
    blocks = state.tables[layer, 1, 0]
    assert state.positions[blocks].reshape(-1)[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert state.scores[blocks].reshape(-1)[:6].tolist() == [7, 7, 7, 0, 0, 0]


def test_every_block_can_be_used_and_comes_back():
  state = init_cache(CONFIG)
  for _ in range(3):
    state, ok = _allocate(state, [0, 1, 2, 3], [4, 4, 4, 4])
    assert ok == [True] * 4
    assert int(state.free_count) == 0
    assert sorted(np.asarray(state.tables)[..., 0].ravel().tolist()) == list(range(1, 9))
    state = _release(state, jnp.array([3, 0, 2, 1]))
    check_invariants(state)
    assert int(state.free_count) == 8


@pytest.mark.parametrize("damage", [
    lambda s: dataclasses.replace(s, free_count=s.free_count - 1),
    lambda s: dataclasses.replace(s, lengths=s.lengths.at[0, 0, 0].set(9)),
    lambda s: dataclasses.replace(s, tables=s.tables.at[0, 0, 0, 0].set(s.tables[1, 0, 0, 0])),
    lambda s: dataclasses.replace(s, tables=s.tables.at[0, 0, 0, 2].set(5)),
    lambda s: dataclasses.replace(s, num_tokens=s.num_tokens.at[0].set(1)),
    lambda s: dataclasses.replace(s, positions=s.positions * 0),
    lambda s: dataclasses.replace(s, scores=s.scores - 1),
    lambda s: dataclasses.replace(s, scores=s.scores + jnp.nan),
])
def test_check_invariants_sees_damage(damage):
  state, _ = _allocate(init_cache(CONFIG), [0], [5])
  with pytest.raises(AssertionError):
    check_invariants(damage(state))
