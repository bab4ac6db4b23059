"""FP8 blocks: how near they come to full precision, and what they save."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import poison

from kvc_jax import LLM, Compression, InputError, SamplingParams
from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import init_observation, prefill_attention
from kvc_jax.cache.alloc import allocate
from kvc_jax.cache.quantize import FP8
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.engine.calibrate import kv_scales
from kvc_jax.eviction.score_full import FullAttention

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 16
TOLERANCE = 0.04
"""Of the output's norm: e4m3 has three bits behind the leading one, so it rounds by 2.6% on the average."""


def _config(dtype):
  return CacheConfig(
      num_layers=LAYERS, num_slots=1, num_kv_heads=HEADS, head_dim=DIM, num_blocks=80, max_blocks_per_head=16,
      block_size=4, dtype=dtype, num_heads=HEADS * GROUP)


def _run(dtype, *, scales=None, spread=1.0, chunk=32):
  """Outputs of 32 prompt tokens and of 2 decoded ones, [34, H*G, D] a layer, and the cache."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(34, LAYERS, n, DIM)).astype(np.float32) for n in (HEADS * GROUP, HEADS, HEADS))
  q, k, v = q / spread, k * spread, v * spread
  state, rule = poison(init_cache(_config(dtype), scales)), FullAttention(power=1, buffer=0)
  observation = init_observation(rule, LAYERS, HEADS * GROUP, DIM, jnp.float32)
  outs = []
  for start in range(0, 32, chunk):
    out, state, observation = _chunk(state, observation, *(x[start : start + chunk] for x in (q, k, v)), rule)
    outs.append(out)
  for token in (32, 33):
    out, state = _decode(state, *(x[token : token + 1] for x in (q, k, v)), rule)
    outs.append(out)
  return np.concatenate(outs), state


@functools.partial(jax.jit, static_argnames="rule")
def _chunk(state, observation, q, k, v, rule):
  slot, count = jnp.array([0]), q.shape[0]
  state, _ = allocate(state, slot, jnp.array([count]), max_count=count)
  rows = []
  for layer in range(LAYERS):
    out, state, observation = prefill_attention(
        state, observation, jnp.int32(layer), q[:, layer], k[:, layer], v[:, layer], slot=slot[0],
        count=jnp.int32(count), scale=0.2, rule=rule)
    rows.append(out)
  return jnp.stack(rows, axis=1), state, observation


@functools.partial(jax.jit, static_argnames="rule")
def _decode(state, q, k, v, rule):
  state, _ = allocate(state, jnp.array([0]), jnp.array([1]), max_count=1)
  rows = []
  for layer in range(LAYERS):
    out, state = decode_attention(
        state, jnp.int32(layer), q[:, layer], k[:, layer], v[:, layer], active=jnp.array([True]), scale=0.2, rule=rule)
    rows.append(out)
  return jnp.stack(rows, axis=1), state


@pytest.mark.parametrize(("spread", "scale"), [(1.0, None), (1.0, 0.01), (3000.0, 30.0), (1e-3, 1e-5)])
def test_near_full_precision_whatever_the_range(spread, scale):
  scales = None if scale is None else np.full((LAYERS, HEADS, 2), scale, np.float32)
  full, full_state = _run(jnp.float32, spread=spread)
  fp8, state = _run(FP8, spread=spread, scales=scales)
  assert state.kv.dtype == FP8
  assert np.linalg.norm(fp8 - full) < TOLERANCE * np.linalg.norm(full)
  held = ~np.isnan(np.asarray(full_state.scores))
  np.testing.assert_allclose(np.asarray(state.scores)[held], np.asarray(full_state.scores)[held], rtol=0.2, atol=0.02)


def test_without_a_scale_a_wide_range_is_cut_off_but_stays_finite():
  full, _ = _run(jnp.float32, spread=3000.0)
  fp8, _ = _run(FP8, spread=3000.0)
  assert np.isfinite(fp8).all()
  assert np.linalg.norm(fp8 - full) > TOLERANCE * np.linalg.norm(full)


def test_chunks_do_not_change_what_is_attended():
  whole, _ = _run(FP8)
  parts, _ = _run(FP8, chunk=8)
  np.testing.assert_allclose(parts, whole, atol=2e-2)  # queries are rounded alike; sums differ in order


def test_calibrated_scales_put_the_range_at_half_of_e4m3():
  llm = LLM(STORIES, max_num_seqs=1)
  scales = kv_scales(llm.engine.model, jnp.arange(1, 200, dtype=jnp.int32))
  shape = llm.engine.model.config
  assert scales.shape == (shape.num_layers, shape.num_kv_heads, 2)
  seen = []

  def attend(layer, q, k, v, state):
    jax.debug.callback(lambda *x: seen.append([np.abs(a).max(axis=(0, 2)) for a in x]), k, v)
    return q * 0, state

  llm.engine.model(jnp.arange(1, 200, dtype=jnp.int32), jnp.arange(199), attend)
  jax.effects_barrier()
  np.testing.assert_allclose(scales[0], np.stack(seen[0], axis=1) * 2 / 448, rtol=1e-5)  # the first layer's inputs


def test_a_head_without_values_gets_a_scale_all_the_same():
  llm = LLM(STORIES, max_num_seqs=1)
  weights = llm.engine.model.layers.attention.v_proj.kernel
  weights[...] = weights[...].at[0].set(0.0)
  scales = np.asarray(kv_scales(llm.engine.model, jnp.arange(1, 50, dtype=jnp.int32)))
  assert (scales > 0).all()
  assert np.isfinite(scales).all()


def test_llm_with_an_fp8_cache():
  """Half the bytes of a bf16 cache, and next to the same logits: the text stays the story for a while."""
  greedy = SamplingParams(temperature=0, max_tokens=24)
  plain = LLM(STORIES, max_num_seqs=1, dtype="float32")
  small = LLM(STORIES, max_num_seqs=1, dtype="float32", kv_cache_dtype="fp8")
  per_kv = 2 * plain.config.head_dim
  assert (plain.config.bytes_per_block - small.config.bytes_per_block) == plain.config.block_size * per_kv * (4 - 1)
  (expected,), (output,) = (llm.generate("Once upon a time", greedy) for llm in (plain, small))
  same = [a == b for a, b in zip(expected.token_ids, output.token_ids, strict=True)]
  assert all(same[:8])
  (compressed,) = small.generate("Once upon a time" * 20, greedy, Compression(rate=4, window=4))
  assert compressed.receipt.rate_reached > 1.5


@pytest.mark.parametrize(("dtype", "scales", "message"), [
    (jnp.bfloat16, np.ones((2, 2, 2)), "this one is bfloat16"),
    (FP8, np.ones((2,)), "must be"),
    (FP8, np.zeros((2, 2, 2)), "positive"),
])
def test_scales_that_do_not_fit_are_refused(dtype, scales, message):
  with pytest.raises(InputError, match=message):
    init_cache(_config(dtype), scales)


def test_pools_of_other_dtypes_are_refused():
  with pytest.raises(InputError, match="dtype is int8; give one of"):
    _config(jnp.int8)
  with pytest.raises(InputError, match="3 query heads"):
    dataclasses.replace(_config(FP8), num_heads=3)


def test_unknown_cache_dtype():
  with pytest.raises(InputError, match="kv_cache_dtype is 'int4'; give 'auto' or 'fp8'"):
    LLM(STORIES, kv_cache_dtype="int4")
