"""The column sums against dense probabilities: on XLA, interpreted, and on a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefill_problems import expected_sums, make_problem, mutate, sums_error

from kvc_jax.kernels import backends, column_scores_triton
from kvc_jax.kernels.column_scores import column_scores

SCALE = 0.3
_scores = jax.jit(column_scores, static_argnames=("scale", "power", "buffer"))


def _interpreted(tile, rows):
  config = column_scores_triton.Config(tile=tile, rows=rows)
  return jax.jit(
      functools.partial(column_scores_triton.column_scores, config=config, interpret=True),
      static_argnames=("scale", "power", "buffer"))


RUNS = [_scores, _interpreted(16, 16), _interpreted(64, 32)]


def _queries(problem, seed, order):
  """Log-sum-exps [R, H*G] and query positions [R]: in order, or any, some counting for no key."""
  rng = np.random.default_rng(seed)
  count = problem.q.shape[0]
  positions = np.arange(60, 60 + count) if order == "in order" else rng.integers(-90, 150, count)
  log_sums = rng.normal(4, 0.5, problem.q.shape[:2])
  return jnp.asarray(log_sums, jnp.float32), jnp.asarray(positions, jnp.int32)


def _error(problem, queries, run, power=2, buffer=10):
  sums = run(problem.q, *queries, *problem.held, scale=SCALE, power=power, buffer=buffer)
  assert sums.dtype == jnp.float32
  return sums_error(sums, expected_sums(problem, *queries, SCALE, power, buffer))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("order", ["in order", "any order"])
@pytest.mark.parametrize(("power", "buffer", "lengths"), [
    (2, 0, (0, 41)), (2, 0, (52, 1)), (2, 0, (33, 7, 0)), (1, 30, (0, 41)), (1, 30, (52, 1))])
def test_equals_dense_sums(run, power, buffer, order, lengths):
  problem = make_problem(buffer, lengths)
  assert _error(problem, _queries(problem, 1, order), run, power, buffer) < 1e-5


@pytest.mark.parametrize(("run", "tokens", "group", "head_dim", "block_size"), [
    (RUNS[0], 1, 1, 8, 16), (RUNS[0], 7, 3, 10, 1), (RUNS[0], 20, 16, 64, 8),
    (RUNS[1], 1, 1, 8, 16), (RUNS[1], 7, 3, 10, 1), (RUNS[2], 7, 3, 10, 1), (RUNS[2], 20, 16, 64, 8)])
def test_shapes(run, tokens, group, head_dim, block_size):
  problem = make_problem(3, (9, 40), tokens=tokens, group=group, head_dim=head_dim, block_size=block_size)
  assert _error(problem, _queries(problem, 2, "in order"), run) < 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_fp8_pool(run):
  problem = make_problem(7, (9, 40), pool_dtype=jnp.float8_e4m3fn)
  assert _error(problem, _queries(problem, 8, "in order"), run) < 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_an_uncounted_key_may_lie_far_above_the_log_sum_exp(run):
  problem = make_problem(4, (20, 20))
  log_sums, positions = _queries(problem, 3, "in order")
  sums = run(problem.q, log_sums - 1e4, positions - 1000, *problem.held, scale=SCALE, power=2, buffer=0)
  np.testing.assert_array_equal(sums, 0.0)


MUTATIONS = ("swapped heads", "shifted lengths", "other buffer", "other power")


def _mutated_error(problem, queries, run, mutation):
  """Error of a run that differs from what is expected: a tolerance that lets it pass is too wide."""
  power, buffer = 1 if mutation == "other power" else 2, 12 if mutation == "other buffer" else 10
  expected = expected_sums(problem, *queries, SCALE, power, buffer)
  if not mutation.startswith("other"):
    problem = mutate(problem, mutation)
  return sums_error(run(problem.q, *queries, *problem.held, scale=SCALE, power=2, buffer=10), expected)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_tolerance_catches(run, mutation):
  problem = make_problem(5, (30, 44), tokens=64)
  assert _mutated_error(problem, _queries(problem, 4, "any order"), run, mutation) > 1e-3


def test_mismatched_shapes_are_refused():
  problem = make_problem(6, (4, 4))
  log_sums, positions = _queries(problem, 5, "in order")
  with pytest.raises(ValueError, match="do not match"):
    column_scores(problem.q, log_sums[1:], positions, *problem.held, scale=1.0, power=2, buffer=0)


# ------------------------------------------------------------------------------------ on a GPU

TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-4, "float16": 2e-4}
"""Products of halves are exact in f32; what remains is the order of sums."""


def _gpu_problem(group=4, head_dim=128, block_size=16, dtype=jnp.bfloat16, tokens=300, pool_dtype=None):
  return make_problem(
      group, (700, 0, 1, 513), tokens=tokens, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype,
      pool_dtype=pool_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "group", "head_dim", "block_size", "dtype"), [
        (300, 4, 128, 16, jnp.bfloat16), (8, 4, 128, 16, jnp.bfloat16), (300, 1, 64, 8, jnp.float16),
        (33, 8, 96, 32, jnp.bfloat16), (100, 3, 256, 64, jnp.bfloat16), (100, 16, 128, 16, jnp.float32),
        (70, 2, 256, 16, jnp.float32)])
def test_on_gpu(tokens, group, head_dim, block_size, dtype):
  problem = _gpu_problem(group, head_dim, block_size, dtype, tokens)
  with backends.use("triton"):
    for order, power, buffer in (("in order", 2, 0), ("any order", 1, 30)):
      error = _error(problem, _queries(problem, 6, order), _scores, power, buffer)
      assert error < TOLERANCES[problem.q.dtype.name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_fp8_pool_on_gpu(dtype):
  problem = _gpu_problem(dtype=dtype, pool_dtype=jnp.float8_e4m3fn)
  with backends.use("triton"):
    error = _error(problem, _queries(problem, 9, "in order"), _scores)
  assert error < TOLERANCES[dtype.__name__]


@pytest.mark.gpu
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_gpu_tolerance_catches(mutation):
  problem = _gpu_problem()
  with backends.use("triton"):
    error = _mutated_error(problem, _queries(problem, 7, "any order"), _scores, mutation)
  assert error > 2 * TOLERANCES["bfloat16"]
