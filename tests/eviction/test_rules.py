"""Each scoring rule against its NumPy oracle: numbers, and what an eviction keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from builders import held_kvs, poison

from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import init_observation, prefill_attention, score_observed
from kvc_jax.cache.alloc import allocate
from kvc_jax.cache.state import CacheConfig, check_invariants, init_cache
from kvc_jax.engine.batch import prefill_rule
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.look import layer_kvs, look_at
from kvc_jax.eviction.names import SCORINGS
from kvc_jax.eviction.rules import RULES
from kvc_jax.eviction.score import HeldKVs, check_rule, first_observed
from kvc_jax.eviction.score_critical import CriticalKV
from kvc_jax.eviction.score_expected import ExpectedAttention
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_h2o import H2O
from kvc_jax.eviction.score_key_norm import KeyNorm
from kvc_jax.eviction.score_keydiff import KeyDiff
from kvc_jax.eviction.score_snapkv import SnapKV
from kvc_jax.eviction.score_streaming import StreamingLLM
from kvc_jax.eviction.score_tova import TOVA
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import evict

LAYERS, HEADS, GROUP, DIM, WIDTH, SLOT, TOKENS = 2, 2, 3, 8, 5, 1, 37
SCALE = DIM**-0.5
FREQUENCIES = (1 / 100 ** (np.arange(0, DIM, 2) / DIM)).astype(np.float32)
OUTPUT = np.random.default_rng(9).normal(size=(LAYERS, HEADS * GROUP, DIM, WIDTH)).astype(np.float32)
# One more KV per block than a head keeps can be told apart: with blocks of one KV budgets are exact.
CONFIG = CacheConfig(
    num_layers=LAYERS, num_slots=3, num_kv_heads=HEADS, head_dim=DIM, num_blocks=3 * LAYERS * HEADS * 40 + 1,
    max_blocks_per_head=40, block_size=1, dtype=jnp.float32, num_heads=HEADS * GROUP)


def _random_prompt(seed, tokens=TOKENS):
  """Queries before RoPE, queries after it, keys and values, each [L, T, heads, D]."""
  rng = np.random.default_rng(seed)
  plain, k, v = (
      rng.normal(size=(LAYERS, tokens, n, DIM)).astype(np.float32) for n in (HEADS * GROUP, HEADS, HEADS))
  plain += rng.normal(size=(LAYERS, 1, HEADS * GROUP, DIM)).astype(np.float32)  # queries have a direction
  turns = np.stack([oracles.rotation(t, FREQUENCIES) for t in range(tokens)])
  return plain, np.einsum("tde,ltne->ltnd", turns, plain).astype(np.float32), k, v


_evict = jax.jit(evict, static_argnames=("rule", "allocation"))
_score_observed = jax.jit(score_observed, static_argnames=("scale", "rule"))


@functools.partial(jax.jit, static_argnames="rule")
def _chunk(state, observation, qkv, count, rule):
  state, _ = allocate(state, jnp.array([SLOT]), count[None], max_count=qkv[0].shape[1])
  for layer in range(LAYERS):
    _, state, observation = prefill_attention(
        state, observation, jnp.int32(layer), *(x[layer] for x in qkv), slot=jnp.int32(SLOT), count=count,
        scale=SCALE, rule=rule)
  return state, observation


def _prefilled(qkv, rule, chunk=20):
  tokens = qkv[0].shape[1]
  state = poison(init_cache(CONFIG))
  observed = prefill_rule(Compression(rate=2, scoring=rule))  # as in the engine: one program for many rules
  observation = init_observation(observed, LAYERS, HEADS * GROUP, DIM, jnp.float32, FREQUENCIES)
  for start in range(0, tokens, chunk):
    count = min(chunk, tokens - start)
    padding = ((0, 0), (0, chunk - count), (0, 0), (0, 0))
    piece = [np.pad(x[:, start : start + count], padding, constant_values=np.nan) for x in qkv]
    state, observation = _chunk(state, observation, piece, jnp.int32(count), observed)
    state = poison(state)
  if rule.observed in ("last", "moments"):
    state = _score_observed(state, observation, jnp.int32(SLOT), scale=SCALE, rule=rule)
  check_invariants(state)
  return state


@functools.partial(jax.jit, static_argnames="rule")
def _decoded(state, qkv, rule):
  state, _ = allocate(state, jnp.array([SLOT]), jnp.array([1]), max_count=1)
  for layer in range(LAYERS):
    _, state = decode_attention(
        state, jnp.int32(layer), *(x[layer] for x in qkv), active=jnp.arange(3) == SLOT, scale=SCALE, rule=rule)
  return state


def _looked(state, rule):
  """What the rule's `look` says, [L][H] of arrays in the order of positions."""
  tables = state.tables[:, SLOT][None]
  lengths = state.lengths[:, SLOT][None]
  found = np.asarray(look_at(
      state, rule, jnp.array([SLOT]), tables, lengths, state.num_tokens[SLOT][None], scale=SCALE,
      output=jnp.asarray(OUTPUT)))[0]
  positions = np.asarray(state.positions)[np.asarray(tables[0])].reshape(found.shape)
  count = np.asarray(lengths[0])
  return [[found[i, h, : count[i, h]][np.argsort(positions[i, h, : count[i, h]])] for h in range(HEADS)]
          for i in range(LAYERS)]


def _stored(state, rule):
  """The value of each KV of an unevicted prompt, [L, H, T]."""
  scores = np.array([[[s for _, s in head] for head in layer] for layer in held_kvs(state, SLOT)], np.float32)
  positions = np.broadcast_to(np.arange(scores.shape[-1], dtype=np.int32), scores.shape)
  tokens = scores.shape[-1]
  return np.asarray(rule.value(HeldKVs(
      scores[None], positions[None], np.array([tokens]), np.array([first_observed(rule, tokens)]))))[0]


def _values(rule, prompt):
  """[L, H, T] of a prompt's KVs, by the code under test."""
  state = _prefilled(prompt[1:], rule)
  return np.array(_looked(state, rule)) if hasattr(rule, "look") else _stored(state, rule)


def _expected(rule, prompt):
  """The same by the oracles."""
  plain, q, k, v = (x.astype(np.float64) for x in prompt)
  if isinstance(rule, SnapKV):
    options = {"queries": rule.queries, "pooling": rule.pooling, "pool": rule.pool, "scale": SCALE}
    return np.stack([oracles.snapkv_scores(q[i], k[i], **options) for i in range(LAYERS)])
  if isinstance(rule, H2O):
    return np.stack([oracles.full_scores(q[i], k[i], power=1, buffer=0, scale=SCALE) for i in range(LAYERS)])
  if isinstance(rule, TOVA):
    return np.stack([
        oracles.tova_scores(q[i, -1], k[i].swapaxes(0, 1), [np.arange(TOKENS)] * HEADS, SCALE) for i in range(LAYERS)])
  if isinstance(rule, StreamingLLM):
    order = [TOKENS + t if t < rule.sinks else t for t in range(TOKENS)]
    return np.broadcast_to(np.argsort(np.argsort(order)), (LAYERS, HEADS, TOKENS))
  if isinstance(rule, KeyNorm):
    return -np.linalg.norm(k, axis=-1).swapaxes(1, 2)
  if isinstance(rule, KeyDiff):
    return np.stack([[oracles.keydiff_scores(k[i, :, h]) for h in range(HEADS)] for i in range(LAYERS)])
  if isinstance(rule, ExpectedAttention):
    options = {n: getattr(rule, n) for n in ("future", "sinks", "covariance", "value_norm", "epsilon")}
    return np.stack([oracles.expected_scores(plain[i], k[i], v[i], FREQUENCIES, **options) for i in range(LAYERS)])
  assert isinstance(rule, CriticalKV)
  attention = np.stack([
      oracles.snapkv_scores(q[i], k[i], queries=rule.queries, pooling=rule.pooling, pool="max", scale=SCALE) / GROUP
      for i in range(LAYERS)])
  weights = np.stack([oracles.critical_weights(v[i], OUTPUT[i]) for i in range(LAYERS)])
  return (attention + rule.epsilon) * weights


CASES = [
    SnapKV(queries=6), SnapKV(queries=8, pooling=5, pool="mean"), SnapKV(queries=3, pooling=1), H2O(), TOVA(),
    KeyNorm(), KeyDiff(), ExpectedAttention(future=16),
    ExpectedAttention(future=5, sinks=2, covariance=False, epsilon=0.02),
    ExpectedAttention(future=9, value_norm=False), CriticalKV(queries=6)]


def _compared(rule):
  """Which keys the oracle speaks of: those of the observed window are always protected for the last."""
  first = {ExpectedAttention: getattr(rule, "sinks", 0)}.get(type(rule), 0)
  return slice(first, TOKENS - rule.queries if isinstance(rule, CriticalKV) else TOKENS)


@pytest.mark.parametrize("rule", CASES, ids=repr)
def test_values_equal_the_oracle(rule):
  prompt = _random_prompt(0)
  where = _compared(rule)
  found, expected = _values(rule, prompt), _expected(rule, prompt)
  np.testing.assert_allclose(found[..., where], expected[..., where], rtol=2e-4, atol=1e-6)


MUTATIONS = {
    "zeroed V": lambda q, k, v: (q, k, 0 * v),
    "swapped heads": lambda q, k, v: (q, k[:, :, ::-1], v[:, :, ::-1]),
    "shifted keys": lambda q, k, v: (q, np.roll(k, 1, axis=1), v),
    "shifted values": lambda q, k, v: (q, k, np.roll(v, 1, axis=1)),
    "shifted queries": lambda q, k, v: (np.roll(q, 1, axis=1), k, v),
}
SEES = {  # which mutations a rule must notice
    SnapKV: "swapped heads, shifted keys, shifted queries", H2O: "swapped heads, shifted keys, shifted queries",
    TOVA: "swapped heads, shifted keys, shifted queries", KeyNorm: "swapped heads, shifted keys",
    KeyDiff: "swapped heads, shifted keys",
    ExpectedAttention: "zeroed V, swapped heads, shifted keys, shifted values, shifted queries",
    CriticalKV: "zeroed V, swapped heads, shifted keys, shifted values, shifted queries"}


@pytest.mark.parametrize("rule", [CASES[0], *CASES[3:8], CASES[10]], ids=repr)
def test_the_tolerance_catches_mutations(rule):
  prompt = _random_prompt(0)
  expected, where = _expected(rule, prompt), _compared(rule)
  for name in SEES[type(rule)].split(", "):
    found = _values(rule, (prompt[0], *MUTATIONS[name](*prompt[1:])))
    wrong = ~np.isclose(found[..., where], expected[..., where], rtol=2e-2, atol=1e-4)
    assert wrong.mean() > 0.1, name


@pytest.mark.parametrize(("rule", "allocation"), [
    (CASES[0], "all"), (CASES[1], "head"), (TOVA(), "all"), (TOVA(), "head"), (StreamingLLM(sinks=3), "all"),
    (StreamingLLM(sinks=3), "head"), (KeyNorm(), "all"), (KeyDiff(), "head"), (CASES[7], "all")], ids=repr)
def test_an_eviction_keeps_what_the_oracle_keeps(rule, allocation):
  prompt = _random_prompt(1)
  state = _prefilled(prompt[1:], rule)
  one = np.array([SLOT])
  state, _ = _evict(
      state, one, np.array([14]), np.array([8]), np.array([4]), np.array([first_observed(rule, TOKENS)]), rule=rule,
      allocation=allocation)
  check_invariants(state)
  heads = [[list(enumerate(row.tolist())) for row in layer] for layer in _expected(rule, prompt)]
  kept, _ = oracles.evict(
      heads, num_tokens=TOKENS, window=8, sinks=4, block_size=1, allowed=14, allocation=allocation)
  assert [[[p for p, _ in head] for head in layer] for layer in held_kvs(state, SLOT)] == [
      [[p for p, _ in head] for head in layer] for layer in kept]


@pytest.mark.parametrize("first_share", [0.0, 0.5, 0.75, 1.0])
def test_critical_kv_chooses_in_two_stages(first_share):
  rule, prompt = CriticalKV(queries=6, first_share=first_share), _random_prompt(2)
  state = _prefilled(prompt[1:], rule)
  state, _ = _evict(
      state, np.array([SLOT]), np.array([20]), np.array([6]), np.array([1]), rule=rule, allocation="head",
      output=[jnp.asarray(layer) for layer in OUTPUT])
  for layer, head in np.ndindex(LAYERS, HEADS):
    attention = oracles.snapkv_scores(
        prompt[1][layer], prompt[2][layer], queries=6, pooling=7, pool="max", scale=SCALE)[head] / GROUP
    expected = oracles.critical_choice(
        attention, oracles.critical_weights(prompt[3][layer], OUTPUT[layer])[head], budget=20, first_share=first_share,
        epsilon=rule.epsilon, protected=[0, *range(TOKENS - 6, TOKENS)])
    assert {p for p, _ in held_kvs(state, SLOT)[layer][head]} == expected


def test_critical_kv_needs_the_output_projection():
  state = _prefilled(_random_prompt(2)[1:], CriticalKV(queries=6))
  one = np.array([SLOT])
  with pytest.raises(ValueError, match="give output="):
    evict(state, one, np.array([20]), one, one, rule=CriticalKV(queries=6))


def test_expected_attention_needs_frequencies():
  with pytest.raises(ValueError, match="give frequencies"):
    init_observation(ExpectedAttention(), LAYERS, HEADS * GROUP, DIM, jnp.float32)


@pytest.mark.parametrize("allocation", ["all", "head"])
def test_tova_behind_the_prompt_goes_by_the_last_decoded_token(allocation):
  """Also where heads hold different tokens."""
  rule, prompt = TOVA(), _random_prompt(3)
  state = _prefilled(prompt[1:], rule)
  one = np.array([SLOT])
  state, _ = _evict(
      state, one, np.array([14]), np.array([2]), np.array([0]), rule=KeyNorm() if allocation == "all" else rule,
      allocation=allocation)
  decoded = [_random_prompt(seed, CONFIG.num_slots)[1:] for seed in (4, 5)]
  for qkv in decoded:
    state = _decoded(state, qkv, rule)
  check_invariants(state)
  for layer in range(LAYERS):
    keys = np.concatenate([prompt[2][layer], *(qkv[1][layer, SLOT : SLOT + 1] for qkv in decoded)])
    positions = [[p for p, _ in head] for head in held_kvs(state, SLOT)[layer]]
    assert (positions[0] == positions[1]) == (allocation == "head")
    expected = oracles.tova_scores(
        decoded[1][0][layer, SLOT], [keys[p, h] for h, p in enumerate(positions)], positions, SCALE)
    for found, row in zip(_looked(poison(state), rule)[layer], expected, strict=True):
      np.testing.assert_allclose(found, row, rtol=2e-4, atol=1e-6)


def test_expected_attention_does_not_depend_on_chunks():
  prompt = _random_prompt(6)
  rule = ExpectedAttention(future=16)
  whole, pieces = (_stored(_prefilled(prompt[1:], rule, chunk), rule) for chunk in (20, 5))
  np.testing.assert_allclose(pieces[..., 4:], whole[..., 4:], rtol=1e-4)


def test_rules_see_keys_and_values_in_their_own_unit():
  """An FP8 pool stores them divided by a scale of their head; a waiting query is in the unit of the stored keys."""
  prompt, decoded = _random_prompt(7), _random_prompt(8, CONFIG.num_slots)
  scales = np.random.default_rng(9).uniform(0.5, 2, (LAYERS, HEADS, 2)).astype(np.float32)
  state = _decoded(_prefilled(prompt[1:], TOVA()), decoded[1:], TOVA())
  by_query_head = np.repeat(scales[..., 0], GROUP, axis=1)[:, None, :, None]
  scaled = dataclasses.replace(state, kv_scales=jnp.asarray(scales), queries=state.queries * by_query_head)
  for rule, factor in ((KeyNorm(), scales[..., 0, None]), (CriticalKV(epsilon=1.0), None)):
    plain, found = (np.array(_looked(s, rule)) for s in (state, scaled))
    expected = plain * (scales[..., 1, None] if factor is None else factor)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
  for s, unit in ((state, 1.0), (scaled, scales[0, :, 0, None, None])):
    kvs = layer_kvs(s, 0, SLOT, s.tables[0, SLOT], s.lengths[0, SLOT], s.num_tokens[SLOT], scale=SCALE)
    dots = np.einsum("hgd,hkd->hgk", np.asarray(kvs.queries).reshape(HEADS, GROUP, DIM), np.asarray(kvs.keys))
    keys = np.concatenate([prompt[2][0], decoded[2][0, SLOT : SLOT + 1]])
    expected = SCALE * np.einsum("hgd,khd->hgk", decoded[1][0, SLOT].reshape(HEADS, GROUP, DIM), keys)
    np.testing.assert_allclose(dots[..., : TOKENS + 1], unit * expected, rtol=1e-3, atol=1e-5)


def test_streaming_keeps_sinks_and_the_newest():
  state = _prefilled(_random_prompt(0)[1:], StreamingLLM(sinks=3))
  state, _ = _evict(state, np.array([SLOT]), np.array([10]), np.array([1]), np.array([0]), rule=StreamingLLM(sinks=3),
                   allocation="head")
  assert [p for p, _ in held_kvs(state, SLOT)[0][0]] == [0, 1, 2, *range(TOKENS - 7, TOKENS)]


def test_every_name_makes_a_rule():
  assert list(RULES) == list(SCORINGS)
  for rule in RULES.values():
    check_rule(rule())
    assert hash(rule()) == hash(rule())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SnapKV(pool="min"), "pool is 'min'"),
    (lambda: SnapKV(pooling=4), "an odd width"),
    (lambda: StreamingLLM(sinks=-1), "sinks is -1"),
    (lambda: ExpectedAttention(future=0), "future is 0"),
    (lambda: ExpectedAttention(covariance=1), "covariance is 1"),
    (lambda: ExpectedAttention(epsilon=-1), "epsilon is -1"),
    (lambda: CriticalKV(first_share=1.5), "first_share is 1.5"),
    (lambda: CriticalKV(queries=0), "queries is 0"),
])
def test_numbers_out_of_range_are_refused(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_presets_are_what_their_papers_say():
  """SnapKV's LongBench settings; H2O sums plain attention of every query."""
  assert (SnapKV().queries, SnapKV().pooling, SnapKV().pool, SnapKV().power) == (32, 7, "max", 1)
  assert (H2O().power, H2O().buffer, H2O().decode_every) == (1, 0, 1)
  assert isinstance(H2O(), FullAttention)
  assert WindowAttention().power == 2
