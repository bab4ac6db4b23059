"""A prompt prefilled in chunks through the GPU's kernels: output and scores against the oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from builders import held_kvs, poison

from kvc_jax.attention.prefill import init_observation, prefill_attention, score_observed
from kvc_jax.cache.alloc import allocate
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_window import WindowAttention

LAYERS, HEADS, GROUP, DIM, SCALE = 2, 2, 4, 64, 0.25
CONFIG = CacheConfig(
    num_layers=LAYERS, num_slots=2, num_kv_heads=HEADS, head_dim=DIM, num_blocks=200, max_blocks_per_head=24,
    block_size=16, dtype=jnp.bfloat16)
TOKENS, CHUNK = 330, 128


@functools.partial(jax.jit, static_argnames="rule")
def _chunk(state, observation, qkv, count, rule):
  slot = jnp.int32(1)
  state, ok = allocate(state, slot[None], count[None], max_count=CHUNK)
  outs = []
  for layer in range(LAYERS):
    out, state, observation = prefill_attention(
        state, observation, jnp.int32(layer), *(x[layer] for x in qkv), slot=slot, count=count, scale=SCALE, rule=rule)
    outs.append(out)
  return jnp.stack(outs), ok[0], state, observation


def _prefill(rule):
  """Queries, keys, values [L, T, ., D]; output [L, T, H*G, D]; scores [L, H, T]."""
  rng = np.random.default_rng(0)
  qkv = [jnp.asarray(rng.normal(size=(LAYERS, TOKENS, n, DIM)), jnp.bfloat16) for n in (HEADS * GROUP, HEADS, HEADS)]
  state = poison(init_cache(CONFIG))
  observation = init_observation(rule, LAYERS, HEADS * GROUP, DIM, jnp.bfloat16)
  outs = []
  for start in range(0, TOKENS, CHUNK):
    count = min(CHUNK, TOKENS - start)
    piece = [jnp.pad(x[:, start : start + count], ((0, 0), (0, CHUNK - count), (0, 0), (0, 0))) for x in qkv]
    out, ok, state, observation = _chunk(state, observation, piece, jnp.int32(count), rule)
    assert ok
    state = poison(state)
    outs.append(np.asarray(out, np.float64)[:, :count])
  state = score_observed(state, observation, jnp.int32(1), scale=SCALE, rule=rule)
  scores = np.array([[[score for _, score in head] for head in layer] for layer in held_kvs(state, 1)])
  return [np.asarray(x, np.float64) for x in qkv], np.concatenate(outs, axis=1), scores


def _expected_scores(q, k, rule):
  if rule.observed == "last":
    return oracles.window_scores(q, k, queries=rule.queries, power=rule.power, pooling=rule.pooling, scale=SCALE)
  return oracles.full_scores(q, k, power=rule.power, buffer=rule.buffer, scale=SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rule", "other"), [
        (WindowAttention(queries=20), WindowAttention(queries=19)), (FullAttention(), FullAttention(buffer=11))],
    ids=["window", "full"])
def test_on_gpu(rule, other):
  (q, k, v), out, scores = _prefill(rule)
  where = np.arange(TOKENS)
  for layer in range(LAYERS):
    expected = oracles.attention(q[layer], k[layer], v[layer], where, where, SCALE)
    np.testing.assert_allclose(out[layer], expected, rtol=1.5e-2, atol=1.5e-2)
    # Keys and queries are rounded before, not behind, the product: the scores are exact but for f32 sums.
    expected = _expected_scores(q[layer], k[layer], rule)
    assert np.abs(scores[layer] - expected).max() < 5e-4 * expected.max()
    assert np.abs(scores[layer] - _expected_scores(q[layer], k[layer], other)).max() > 1e-3 * expected.max()
