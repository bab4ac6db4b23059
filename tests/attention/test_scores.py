"""Prefill in chunks, decode, and the scores of both, against the oracles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from builders import held_kvs, poison

from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import Observation, init_observation, prefill_attention, score_observed
from kvc_jax.cache.alloc import allocate, release
from kvc_jax.cache.state import CacheConfig, check_invariants, init_cache
from kvc_jax.eviction.score import HeldKVs, first_observed
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import evict

HEADS, GROUP, DIM, SCALE, SLOT = 2, 3, 8, 0.4, 1
CONFIG = CacheConfig(
    num_layers=2, num_slots=3, num_kv_heads=HEADS, head_dim=DIM, num_blocks=120, max_blocks_per_head=20,
    block_size=4, dtype=jnp.float32, num_heads=HEADS * GROUP)


@functools.partial(jax.jit, static_argnames="rule")
def _chunk(state, observation, qkv, count, rule):
  state, ok = allocate(state, jnp.array([SLOT]), count[None], max_count=qkv[0].shape[1])
  outs = []
  for layer in range(CONFIG.num_layers):
    out, state, observation = prefill_attention(
        state, observation, jnp.int32(layer), *(x[layer] for x in qkv), slot=jnp.int32(SLOT), count=count,
        scale=SCALE, rule=rule)
    outs.append(out)
  return jnp.stack(outs), ok[0], state, observation


def _prefill(qkv, chunk, rule):
  """Runs a prompt in chunks; returns outputs [L, T, H*G, D] and the scored cache."""
  tokens = qkv[0].shape[1]
  state = poison(init_cache(CONFIG))
  observation = init_observation(rule, CONFIG.num_layers, HEADS * GROUP, DIM, jnp.float32)
  outs = []
  for start in range(0, tokens, chunk):
    count = min(chunk, tokens - start)
    piece = [np.pad(x[:, start : start + count], ((0, 0), (0, chunk - count), (0, 0), (0, 0))) for x in qkv]
    out, ok, state, observation = _chunk(state, observation, piece, jnp.int32(count), rule)
    assert ok
    state = poison(state)
    outs.append(np.asarray(out)[:, :count])
  if rule is not None:
    state = _score_observed(state, observation, jnp.int32(SLOT), scale=SCALE, rule=rule)
  check_invariants(state)
  return np.concatenate(outs, axis=1), state


_allocate = jax.jit(allocate, static_argnames="max_count")
_release = jax.jit(release)
_evict = jax.jit(evict, static_argnames="rule")
_score_observed = jax.jit(score_observed, static_argnames=("scale", "rule", "in_order"))


def _random_qkv(seed, tokens):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(2, tokens, n, DIM)).astype(np.float32) for n in (HEADS * GROUP, HEADS, HEADS)]


def _scores(state):
  return np.array([[[s for _, s in head] for head in layer] for layer in held_kvs(state, SLOT)])


@pytest.mark.parametrize("chunk", [64, 16, 5])
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_output_equals_dense_attention(chunk, tokens):
  qkv = _random_qkv(tokens, tokens)
  out, _ = _prefill(qkv, chunk, None)
  where = np.arange(tokens)
  for layer in range(2):
    expected = oracles.attention(*(x[layer] for x in qkv), where, where, SCALE)
    np.testing.assert_allclose(out[layer], expected, atol=2e-6)


@pytest.mark.parametrize(("rule", "chunk"), [
    (WindowAttention(queries=8), 64), (WindowAttention(queries=8), 16), (WindowAttention(queries=8), 5),
    (WindowAttention(queries=1, pooling=1), 16), (WindowAttention(queries=64, power=1, pooling=5), 64),
    (WindowAttention(queries=64, power=1, pooling=5), 5)], ids=repr)
def test_window_scores(chunk, rule):
  """Equal to the oracle in chunks of any size: the observed queries may lie in several chunks."""
  qkv = _random_qkv(0, 37)
  _, state = _prefill(qkv, chunk, rule)
  for layer in range(2):
    expected = oracles.window_scores(
        qkv[0][layer], qkv[1][layer], queries=rule.queries, power=rule.power, pooling=rule.pooling, scale=SCALE)
    np.testing.assert_allclose(_scores(state)[layer], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("rule", "chunk"), [
    (FullAttention(), 64), (FullAttention(), 16), (FullAttention(), 5), (FullAttention(power=1, buffer=0), 5)],
    ids=repr)
def test_full_scores(chunk, rule):
  qkv = _random_qkv(1, 37)
  _, state = _prefill(qkv, chunk, rule)
  for layer in range(2):
    expected = oracles.full_scores(
        qkv[0][layer], qkv[1][layer], power=rule.power, buffer=rule.buffer, scale=SCALE)
    np.testing.assert_allclose(_scores(state)[layer], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [WindowAttention(queries=8), FullAttention()], ids=repr)
def test_scores_of_a_prompt_of_several_tiles(rule):
  """A tile of the scoring loop is 64 KVs here; 78 tokens take two."""
  qkv = _random_qkv(7, 78)
  _, state = _prefill(qkv, 64, rule)
  for layer in range(2):
    q, k = qkv[0][layer], qkv[1][layer]
    if rule.observed == "last":
      expected = oracles.window_scores(q, k, queries=8, power=2, pooling=7, scale=SCALE)
    else:
      expected = oracles.full_scores(q, k, power=2, buffer=10, scale=SCALE)
    np.testing.assert_allclose(_scores(state)[layer], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("in_order", [True, False])
def test_the_host_may_say_whether_kvs_are_in_order(in_order):
  """Nothing was evicted here, so either answer will do, and the device is not asked."""
  rule, qkv = WindowAttention(queries=8), _random_qkv(1, 37)
  _, state = _prefill(qkv, 37, None)
  observation = Observation(jnp.asarray(qkv[0][:, -8:]), jnp.zeros((2, 8, HEADS * GROUP)))
  run = functools.partial(score_observed, scale=SCALE, rule=rule)
  arguments = (state, observation, jnp.int32(SLOT))
  assert "cond[" in str(jax.make_jaxpr(run)(*arguments))
  assert "cond[" not in str(jax.make_jaxpr(functools.partial(run, in_order=in_order))(*arguments))
  found = _scores(_score_observed(*arguments, scale=SCALE, rule=rule, in_order=in_order))
  np.testing.assert_array_equal(found, _scores(_score_observed(*arguments, scale=SCALE, rule=rule)))


@pytest.mark.parametrize("in_order", [None, False])
def test_scores_behind_an_eviction_replace_the_old_and_pool_neighbours_by_position(in_order):
  """Evictions move KVs about: a neighbour is still the next position that is held."""
  rule = WindowAttention(queries=8, pooling=3)
  qkv = _random_qkv(8, 37)
  _, state = _prefill(qkv, 64, WindowAttention(queries=8))
  state, _ = _evict(state, jnp.array([SLOT]), jnp.array([15]), jnp.array([4]), jnp.array([2]), rule=rule)
  held = [[[p for p, _ in head] for head in layer] for layer in held_kvs(state, SLOT)]
  assert any(len(head) < 37 for layer in held for head in layer)
  queries, log_sums = qkv[0][:, -8:], np.zeros((2, 8, HEADS * GROUP), np.float32)
  where = np.arange(37)
  for layer in range(2):
    logits = oracles.probabilities(qkv[0][layer][-8:], qkv[1][layer], where[-8:], where, SCALE)
    q, k = (x[layer].astype(np.float64) for x in qkv[:2])
    sums = [[np.log(np.exp(SCALE * (k[: t + 1, n // GROUP] @ q[t, n])).sum()) for n in range(HEADS * GROUP)]
            for t in where[-8:]]
    log_sums[layer] = sums
    held[layer] = [(head, (logits[n * GROUP : (n + 1) * GROUP] ** 2).sum(axis=1)[:, head])
                   for n, head in enumerate(held[layer])]
  state = _score_observed(
      poison(state), Observation(jnp.asarray(queries), jnp.asarray(log_sums)), jnp.int32(SLOT), scale=SCALE, rule=rule,
      in_order=in_order)
  for layer, head in np.ndindex(2, HEADS):
    positions, sums = held[layer][head]
    expected = sum(np.array([row[max(0, i - 1) : i + 2].max() for i in range(len(row))]) for row in sums)
    found = held_kvs(state, SLOT)[layer][head]
    assert [p for p, _ in found] == positions
    np.testing.assert_allclose([s for _, s in found], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [
    FullAttention(buffer=3), FullAttention(power=1, buffer=0, decode_every=1), WindowAttention(queries=4, buffer=1),
    FullAttention(buffer=2, decode_every=3)], ids=repr)
def test_a_decode_query_is_scored_by_the_next_step(rule):
  qkv = _random_qkv(2, 20)
  _, state = _prefill(qkv, 64, FullAttention())
  before = _scores(state)
  new, newer = _random_qkv(3, CONFIG.num_slots), _random_qkv(4, CONFIG.num_slots)
  state = _decode(state, new, rule)
  for layer in range(2):
    np.testing.assert_array_equal(_scores(state)[layer], np.pad(before[layer], ((0, 0), (0, 1))))
  state = _decode(state, newer, rule)
  for layer in range(2):
    keys = np.concatenate([qkv[1][layer], new[1][layer, SLOT : SLOT + 1]]).swapaxes(0, 1)
    gain = oracles.decode_scores(
        new[0][layer, SLOT], 20, keys, [np.arange(21)] * HEADS, power=rule.power, buffer=rule.buffer, scale=SCALE)
    times = 0 if 20 % rule.decode_every else rule.decode_every  # the query stands at position 20
    expected = np.pad(np.pad(before[layer], ((0, 0), (0, 1))) + times * np.array(gain), ((0, 0), (0, 1)))
    np.testing.assert_allclose(_scores(state)[layer], expected, rtol=2e-5, atol=1e-7)


def test_a_released_or_prolonged_sequence_forgets_its_query():
  rule = FullAttention(power=1, buffer=0, decode_every=1)
  _, state = _prefill(_random_qkv(2, 20), 64, FullAttention())
  state = _decode(state, _random_qkv(3, CONFIG.num_slots), rule)
  assert np.isfinite(state.log_sums[:, SLOT]).all()
  assert np.isinf(_release(state, jnp.array([SLOT])).log_sums).all()
  longer, _ = _allocate(state, jnp.array([SLOT]), jnp.array([3]), max_count=4)
  assert np.isinf(longer.log_sums).all()


def test_a_broken_query_does_not_outlive_its_sequence():
  rule = FullAttention(power=1, buffer=0, decode_every=1)
  _, state = _prefill(_random_qkv(2, 20), 64, FullAttention())
  q, k, v = _random_qkv(3, CONFIG.num_slots)
  state = _release(_decode(state, (q * np.nan, k, v), rule), jnp.array([SLOT]))
  state, _ = _allocate(state, jnp.array([SLOT]), jnp.array([4]), max_count=4)
  state = dataclasses.replace(state, kv=jnp.zeros_like(state.kv))
  for seed in (4, 5):
    state = _decode(state, _random_qkv(seed, CONFIG.num_slots), rule)
  assert np.isfinite(_scores(state)).all()


def test_a_cache_without_query_heads_cannot_score():
  state = init_cache(dataclasses.replace(CONFIG, num_heads=None))
  with pytest.raises(ValueError, match="num_heads"):
    _decode(state, _random_qkv(3, CONFIG.num_slots), FullAttention())
  _decode(state, _random_qkv(3, CONFIG.num_slots), None)


@functools.partial(jax.jit, static_argnames="rule")
def _decode(state, qkv, rule):
  """One decode step of SLOT."""
  state, _ = allocate(state, jnp.array([SLOT]), jnp.array([1]), max_count=1)
  for layer in range(2):
    _, state = decode_attention(
        state, jnp.int32(layer), *(x[layer] for x in qkv), active=jnp.arange(3) == SLOT, scale=SCALE, rule=rule)
  return state


def test_no_rule_leaves_scores_alone():
  _, state = _prefill(_random_qkv(4, 9), 16, None)
  assert not _scores(state).any()


@pytest.mark.parametrize(
    "rule", [WindowAttention(reduction="mean"), FullAttention(reduction="mean", buffer=4)], ids=repr)
def test_mean_divides_by_queries_that_counted(rule):
  rng = np.random.default_rng(5)
  scores = rng.random((1, 2, 2, 30)).astype(np.float32)
  positions = np.broadcast_to(np.arange(30, dtype=np.int32), scores.shape)
  first = first_observed(rule, 25)  # 25 prompt tokens and 5 decoded ones
  value = rule.value(HeldKVs(scores, positions, np.array([30]), np.array([first])))
  expected = oracles.mean_normalised(scores, positions, 30, first, rule.buffer)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def _pass(seed, change):
  """Output and scores of a prompt whose q, k, v went through `change`."""
  qkv = change(*_random_qkv(seed, 37))
  out, state = _prefill(qkv, 16, FullAttention())
  return out, _scores(state)


@pytest.mark.parametrize(("name", "change", "seen_in"), [
    ("zeroed V", lambda q, k, v: (q, k, 0 * v), "output"),
    ("swapped heads", lambda q, k, v: (q, k[:, :, ::-1], v[:, :, ::-1]), "both"),
    ("shifted keys", lambda q, k, v: (q, np.roll(k, 1, axis=1), v), "both"),
    ("shifted values", lambda q, k, v: (q, k, np.roll(v, 1, axis=1)), "output"),
])
def test_tolerances_catch_mutations(name, change, seen_in):
  """Each mutation moves the result by far more than the tolerances above let through."""
  out, scores = _pass(6, lambda *qkv: qkv)
  bad_out, bad_scores = _pass(6, change)
  assert np.abs(out - bad_out).max() > 1e-2, name
  if seen_in == "both":
    assert np.abs(scores - bad_scores).max() > 1e-2, name
