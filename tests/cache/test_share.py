"""Blocks with several holders: hand-worked cases, and copy on write seen from attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import held_kvs, poison

from kvc_jax import InputError
from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import init_observation, prefill_attention, score_observed
from kvc_jax.cache import share
from kvc_jax.cache.alloc import allocate, release
from kvc_jax.cache.snapshot import export_sequence, import_sequence
from kvc_jax.cache.state import CacheConfig, check_invariants, init_cache
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import evict

CONFIG = CacheConfig(
    num_layers=2, num_slots=3, num_kv_heads=2, head_dim=4, num_blocks=41, max_blocks_per_head=5, block_size=4,
    dtype=jnp.float32, num_heads=4, sharing=True)
RULE = WindowAttention(queries=4, pooling=3)
hold, adopt, unshare, drop = (jax.jit(f) for f in (share.hold, share.adopt, share.unshare, share.drop))
LET_GO = jax.jit(release)
_allocate = jax.jit(allocate, static_argnames="max_count")


@functools.partial(jax.jit, static_argnames="count")
def _prefill(state, slot, seed, *, count):
  keys = jax.random.split(jax.random.key(seed), 3)
  q, k, v = (jax.random.normal(key, (2, count, heads, 4)) for key, heads in zip(keys, (4, 2, 2), strict=True))
  state, _ = allocate(state, slot[None], jnp.full(1, count), max_count=count)
  observation = init_observation(RULE, 2, 4, 4, jnp.float32)
  for layer in range(2):
    _, state, observation = prefill_attention(
        state, observation, layer, q[layer], k[layer], v[layer], slot=slot, count=jnp.int32(count), scale=0.5,
        rule=RULE)
  return state, observation


@jax.jit
def _decode(state, active):
  """One step with the same queries and KVs for all slots."""
  state, ok = allocate(state, jnp.arange(3), active.astype(jnp.int32), max_count=1)
  q, k, v = (jax.random.normal(jax.random.key(heads), (1, heads, 4)).repeat(3, 0) for heads in (4, 2, 2))
  outs = []
  for layer in range(2):
    out, state = decode_attention(state, layer, q, k, v, active=active & ok, scale=0.5)
    outs.append(out)
  return jnp.stack(outs), state


_score = jax.jit(functools.partial(score_observed, scale=0.5, rule=RULE))
_evict = jax.jit(functools.partial(evict, rule=RULE))


def _filled(tokens=10):
  """Slot 0 with 10 tokens: each of 4 heads has two full blocks and two KVs in a third."""
  state, observation = _prefill(init_cache(CONFIG), jnp.int32(0), 7, count=tokens)
  return state, observation


def test_full_blocks_are_shared_and_the_last_one_is_copied():
  state, _ = _filled()
  assert int(state.free_count) == 40 - 12
  state, held = hold(state, 0)
  state, ok = adopt(state, held, 2)
  assert ok
  assert int(state.free_count) == 40 - 12 - 4  # one copy for each head
  assert (state.tables[:, 2, :, :2] == state.tables[:, 0, :, :2]).all()
  assert not np.isin(state.tables[:, 2, :, 2], state.tables[:, 0]).any()
  assert sorted(np.asarray(state.extra_refs).tolist()) == [0] * 29 + [1] * 4 + [2] * 8
  assert held_kvs(state, 2) == held_kvs(state, 0)
  check_invariants(state, [held])


def test_a_block_is_free_when_the_last_holder_lets_go():
  state, _ = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 2)
  state = LET_GO(state, jnp.array([0]))
  check_invariants(state, [held])
  assert int(state.free_count) == 40 - 16
  state = drop(state, held)
  check_invariants(state)
  assert int(state.free_count) == 40 - 12  # those of slot 2
  state = LET_GO(state, jnp.array([2]))
  assert int(state.free_count) == 40
  assert not np.asarray(state.extra_refs).any()


def test_sharers_that_end_in_one_call_free_each_block_once():
  state, _ = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  state, _ = adopt(state, held, 2)
  state = LET_GO(drop(state, held), jnp.array([2, 3, 0]))  # 3 is to be ignored
  check_invariants(state)
  assert int(state.free_count) == 40 - 12
  state, held = hold(state, 1)
  state, _ = adopt(state, held, 0)
  state = LET_GO(drop(state, held), jnp.array([1, 3, 0]))  # both name 8 blocks that nobody else holds
  check_invariants(state)
  assert int(state.free_count) == 40


def test_whoever_appends_leaves_the_others_alone():
  """Both go on from one prefix; each sees what it would have seen alone, bit for bit."""
  alone, _ = _filled()
  expected, _ = _decode(poison(alone), jnp.array([True, False, False]))
  state, _ = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  for active in ([True, False, False], [True, False, False], [True, False, False], [False, True, False]):
    out, state = _decode(poison(state, [held]), jnp.array(active))
    check_invariants(state, [held])
  np.testing.assert_array_equal(out[:, 1], expected[:, 0])
  state, _ = adopt(LET_GO(state, jnp.array([0])), held, 2)  # what is held has not changed either
  out, _ = _decode(poison(state, [held]), jnp.array([False, False, True]))
  np.testing.assert_array_equal(out[:, 2], expected[:, 0])


def test_whoever_evicts_leaves_the_others_alone():
  alone, _ = _filled()
  expected, _ = _decode(poison(alone), jnp.array([True, False, False]))
  state, observation = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  state, ok = unshare(state, 0)
  assert ok
  assert int(state.free_count) == 40 - 12 - 4 - 12
  state = _score(poison(state, [held]), observation, jnp.int32(0))
  state, eviction = _evict(state, jnp.array([0]), jnp.array([3]), jnp.array([1]), jnp.array([0]))
  assert int(eviction.freed_blocks[0]) == 8
  check_invariants(state, [held])
  out, state = _decode(poison(state, [held]), jnp.array([False, True, False]))
  np.testing.assert_array_equal(out[:, 1], expected[:, 0])
  scores = [score for layer in held_kvs(state, 1) for head in layer for _, score in head]
  assert not np.any(scores)  # the other's scores went to its own copies


def test_what_was_compressed_is_shared_head_by_head():
  """Heads of different lengths: only the last blocks that are partly filled are copied."""
  state, observation = _filled(18)
  state = _score(state, observation, jnp.int32(0))
  state, _ = _evict(state, jnp.array([0]), jnp.array([9]), jnp.array([2]), jnp.array([0]))
  lengths = np.asarray(state.lengths[:, 0])
  assert len(set(lengths.ravel())) > 1
  state, held = hold(state, 0)
  free = int(state.free_count)
  state, ok = adopt(state, held, 1)
  assert ok
  assert free - int(state.free_count) == (lengths % 4 > 0).sum()
  assert held_kvs(state, 1) == held_kvs(state, 0)
  check_invariants(state, [held])


def test_too_few_blocks_change_nothing():
  state, _ = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  state, ok = _allocate(state, jnp.array([2]), jnp.array([20]), max_count=20)
  assert ok
  assert int(state.free_count) == 4
  for refused, why in ((unshare(state, 0), "12 copies"), (adopt(state, held, 1), "taken"), (adopt(state, held, 3), "-"),
                       (adopt(state, held, -1), "-")):
    assert not refused[1], why
    jax.tree.map(np.testing.assert_array_equal, refused[0], state)


def test_a_waiting_query_is_held_too():
  state, _ = _filled()
  state = dataclasses.replace(state, queries=state.queries.at[:, 0].set(3.0), log_sums=state.log_sums.at[:, 0].set(1.0))
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  assert (state.log_sums[:, 1] == 1).all()
  np.testing.assert_array_equal(state.queries[:, 1], state.queries[:, 0])
  np.testing.assert_array_equal(state.log_sums[:, 1], state.log_sums[:, 0])


def test_a_sequence_that_leaves_comes_back_unshared():
  state, _ = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  snapshot, before = export_sequence(state, 1), held_kvs(state, 1)
  state = LET_GO(state, jnp.array([1]))
  state, ok = import_sequence(state, 2, snapshot)
  assert ok
  assert held_kvs(state, 2) == before
  assert not np.isin(state.tables[:, 2, :, :3], state.tables[:, 0, :, :3]).any()
  check_invariants(state, [held])


def test_a_cache_without_sharing_says_so():
  state = init_cache(dataclasses.replace(CONFIG, sharing=False))
  for step in (share.hold, share.unshare):
    with pytest.raises(InputError, match=r"CacheConfig\(sharing=True\)"):
      step(state, jnp.int32(0))


@pytest.mark.parametrize("damage", [
    lambda s: dataclasses.replace(s, extra_refs=s.extra_refs.at[1].add(1)),
    lambda s: dataclasses.replace(s, extra_refs=s.extra_refs * 0),
    lambda s: dataclasses.replace(s, free_count=s.free_count - 1),
    lambda s: dataclasses.replace(s, tables=s.tables.at[:, 1].set(s.tables[:, 0])),  # both append to one block
])
def test_check_invariants_sees_damage(damage):
  state, _ = _filled()
  state, held = hold(state, 0)
  state, _ = adopt(state, held, 1)
  check_invariants(state, [held])
  with pytest.raises(AssertionError):
    check_invariants(damage(state), [held])
  with pytest.raises(AssertionError):
    check_invariants(state)  # a Held was forgotten
