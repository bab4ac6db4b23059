"""The decode op against dense attention: ragged heads, empty heads, poisoned padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_problems import (
    MUTATIONS,
    expected_log_sums,
    expected_output,
    expected_scores,
    make_problem,
    mutate,
    output_error,
    score_error,
)

from kvc_jax.kernels.kv_write import kv_write
from kvc_jax.kernels.paged_decode import paged_decode

_decode = jax.jit(paged_decode, static_argnames=("scale", "power", "buffer", "every"))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
def test_equals_dense_attention(layer, dtype, tolerance):
  problem = make_problem(layer, dtype=dtype)
  out, observed = _decode(*problem.attention, jnp.int32(layer), scale=0.5)
  assert observed is None
  assert out.dtype == dtype
  assert output_error(out, expected_output(problem, layer, 0.5)) < tolerance


@pytest.mark.parametrize(("power", "buffer", "every"), [(2, 0, 1), (1, 60, 1), (2, 0, 3)])
def test_scores(power, buffer, every):
  problem = make_problem(9)
  _, observed = _decode(
      *problem.attention, jnp.int32(1), problem.observed, scale=0.5, power=power, buffer=buffer, every=every)
  assert score_error(problem, observed, expected_scores(problem, 1, 0.5, power, buffer, every)) < 1e-5
  np.testing.assert_array_equal(observed.queries[1], problem.q)
  np.testing.assert_array_equal(observed.queries[0], problem.observed.queries[0])
  assert output_error(observed.log_sums[1], expected_log_sums(problem, 1, 0.5)) < 2e-6


@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(1, 64, 16), (4, 80, 8), (16, 10, 1)])
def test_shapes(group, head_dim, block_size):
  problem = make_problem(3, group=group, head_dim=head_dim, block_size=block_size, max_blocks=20)
  out, _ = _decode(*problem.attention, jnp.int32(0), scale=0.1)
  assert output_error(out, expected_output(problem, 0, 0.1)) < 3e-6


@pytest.mark.parametrize("mutation", [*MUTATIONS, "other layer", "other scale"])
def test_tolerance_catches(mutation):
  problem = make_problem(5, dtype=jnp.bfloat16)
  expected = expected_output(problem, 0, 0.5)
  mutated = mutate(problem, mutation) if mutation in MUTATIONS else problem
  out, _ = _decode(
      *mutated.attention, jnp.int32(mutation == "other layer"), scale=0.6 if mutation == "other scale" else 0.5)
  assert output_error(out, expected) > 2 * 1e-2


def test_mismatched_shapes_are_refused():
  q, kv, tables, lengths = make_problem(6, max_blocks=2).attention
  layer = jnp.int32(0)
  with pytest.raises(ValueError, match="do not match"):
    paged_decode(q[:2], kv, tables, lengths, layer, scale=1.0)
  with pytest.raises(ValueError, match="fits neither"):
    paged_decode(q[:, :3], kv, tables, lengths, layer, scale=1.0)
  observed = make_problem(6, layers=1, max_blocks=2).observed
  with pytest.raises(ValueError, match="observed queries"):
    paged_decode(q, kv, tables, lengths, layer, observed, scale=1.0)


def test_kv_write_touches_its_targets_alone():
  rng = np.random.default_rng(0)
  kv = rng.normal(size=(6, 2, 4, 3)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 2, 3)).astype(np.float32)
  blocks, offsets = np.array([[1, 2], [6, 5]]), np.array([[3, 0], [1, 2]])
  expected = kv.copy()
  for t, h in [(0, 0), (0, 1), (1, 1)]:  # block 6 is behind the pool: dropped
    expected[blocks[t, h], :, offsets[t, h]] = k[t, h], v[t, h]
  np.testing.assert_array_equal(kv_write(jnp.asarray(kv), k, v, blocks, offsets), expected)
  with pytest.raises(ValueError, match="head_dim"):
    kv_write(jnp.asarray(kv), k[..., :2], v[..., :2], blocks, offsets)
