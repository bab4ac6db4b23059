"""The Pallas Mosaic GPU decode kernel, interpreted on the CPU; on a GPU it runs in test_paged_decode_triton.py."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
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

from kvc_jax.kernels import paged_decode_mosaic

SCALE = 0.2
SMALL = paged_decode_mosaic.Config(stages=2, ctas=3)
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3}


def _problem(group, head_dim, block_size, dtype, max_tokens=128):
  return make_problem(
      group, group=group, head_dim=head_dim, block_size=block_size, max_blocks=max_tokens // block_size + 1,
      dtype=dtype)


_decode = jax.jit(
    functools.partial(paged_decode_mosaic.paged_decode, scale=SCALE, interpret=True),
    static_argnames=("config", "power", "buffer", "every"))


def _interpret(problem, layer, *observed, config=SMALL, **options):
  return _decode(*problem.attention, jnp.int32(layer), *observed, config=config, **options)


@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "dtype"),
    [(4, 128, 16, jnp.bfloat16), (1, 64, 8, jnp.float16), (9, 64, 32, jnp.bfloat16), (3, 256, 64, jnp.float16)])
def test_equals_dense_attention(group, head_dim, block_size, dtype):
  problem = _problem(group, head_dim, block_size, dtype)
  out, observed = _interpret(problem, 0)
  assert observed is None
  assert out.dtype == dtype
  assert output_error(out, expected_output(problem, 0, SCALE)) < TOLERANCES[jnp.dtype(dtype).name]


@pytest.mark.parametrize(
    ("power", "buffer", "every", "group"), [(2, 0, 1, 4), (1, 60, 1, 3), (2, 0, 3, 2), (2, 0, 1, 7)])
def test_scores(power, buffer, every, group):
  problem = _problem(group, 64, 16, jnp.float16)
  out, observed = _interpret(problem, 0, problem.observed, power=power, buffer=buffer, every=every)
  assert output_error(out, expected_output(problem, 0, SCALE)) < TOLERANCES["float16"]
  assert score_error(problem, observed, expected_scores(problem, 0, SCALE, power, buffer, every)) < 1e-4
  assert output_error(observed.log_sums[0], expected_log_sums(problem, 0, SCALE)) < 1e-4


@pytest.mark.parametrize(("group", "block_size"), [(4, 16), (1, 8)])
def test_fp8_pool(group, block_size):
  problem = make_problem(
      7, group=group, head_dim=128, block_size=block_size, max_blocks=128 // block_size + 1,
      dtype=jnp.float8_e4m3fn, query_dtype=jnp.bfloat16)
  out, observed = _interpret(problem, 0, problem.observed)
  assert out.dtype == jnp.bfloat16
  assert output_error(out, expected_output(problem, 0, SCALE)) < TOLERANCES["bfloat16"]
  assert score_error(problem, observed, expected_scores(problem, 0, SCALE, 2, 0)) < 1e-5


def test_tiles_of_128_and_uneven_shares():
  problem = _problem(2, 64, 16, jnp.bfloat16, max_tokens=256)
  config = paged_decode_mosaic.Config(tile=128, stages=3, ctas=5)
  out, _ = _interpret(problem, 1, config=config)
  assert output_error(out, expected_output(problem, 1, SCALE)) < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_tolerance_catches(mutation):
  problem = _problem(2, 64, 16, jnp.bfloat16, max_tokens=64)
  out, _ = _interpret(mutate(problem, mutation), 0)
  assert output_error(out, expected_output(problem, 0, SCALE)) > 2 * TOLERANCES["bfloat16"]


# ------------------------------------------------------------------------------------ on a GPU

LAUNCHES = """
import jax
import jax.numpy as jnp
from kvc_jax.kernels import paged_decode_mosaic

SEQS, HEADS, BLOCKS = 64, 8, 128
keys = jax.random.split(jax.random.key(0))
kv = jax.random.normal(keys[0], (SEQS * HEADS * BLOCKS + 1, 2, 16, 128), jnp.bfloat16)
q = jax.random.normal(keys[1], (SEQS, 32, 128), jnp.bfloat16)
tables = 1 + jnp.arange(SEQS * HEADS * BLOCKS, dtype=jnp.int32).reshape(1, SEQS, HEADS, BLOCKS)
lengths = jnp.full((1, SEQS, HEADS), BLOCKS * 16, jnp.int32)

def decode(q, kv, tables, lengths):
  return paged_decode_mosaic.paged_decode(q, kv, tables, lengths, jnp.int32(0), scale=0.1)[0]

@jax.jit
def differences(first, kv, tables, lengths, q):
  def again(i, carry):
    found, last = carry
    out = decode(q + 0 * last, kv, tables, lengths)  # it may not start before the last one's end
    return found + jnp.sum(out != first), out
  return jax.lax.fori_loop(0, 1000, again, (jnp.int32(0), first))[0]

first = jax.jit(decode)(q, kv, tables, lengths)
for _ in range(12):
  assert differences(first, kv, tables, lengths, q) == 0
"""
"""12,000 launches, each of some 0.2 ms where the process has the GPU for itself."""


@pytest.mark.gpu
def test_ends_where_processes_share_the_gpu():
  """The GPU stops kernels halfway to let another process on; their warps may go on at different times."""
  command = [sys.executable, "-W", "ignore", "-c", LAUNCHES]
  processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(5)]
  try:
    for process in processes:
      _, errors = process.communicate(timeout=120)
      assert process.returncode == 0, errors
  finally:
    for process in processes:
      process.kill()
