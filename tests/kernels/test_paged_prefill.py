"""The prefill op against dense attention: on XLA, in pieces as for cuDNN, and on a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import pytest
from prefill_problems import MUTATIONS, expected_attention, largest_error, make_problem, mutate

from kvc_jax.kernels import backends, paged_prefill_cudnn
from kvc_jax.kernels.paged_prefill import bound_of_prefix, paged_prefill

SCALE = 0.3
_prefill = jax.jit(paged_prefill, static_argnames=("scale", "most_prefix"))


def _errors(problem, run, expected_from=None):
  """Largest errors of output and log-sum-exp over the real rows."""
  out, log_sum = run(*problem.attention, scale=SCALE)
  assert out.dtype == problem.q.dtype
  assert log_sum.dtype == jnp.float32
  # Padding rows go through the model's other layers: what they hold must not turn into NaN there.
  assert jnp.isfinite(out).all()
  count = int(problem.count)
  expected = expected_attention(expected_from or problem, SCALE)
  return [largest_error(got[:count], want) for got, want in zip((out, log_sum), expected, strict=True)]


@functools.cache
def _in_pieces(piece):
  return jax.jit(
      functools.partial(
          paged_prefill_cudnn.paged_prefill, config=paged_prefill_cudnn.Config(piece=piece), interpret=True),
      static_argnames=("scale", "most_prefix"))


@pytest.mark.parametrize("run", [_prefill, _in_pieces(1), _in_pieces(16), _in_pieces(1000)])
@pytest.mark.parametrize(
    ("lengths", "count"), [((0, 0), 24), ((0, 41), 24), ((52, 1), 9), ((16, 16), 1), ((33, 7, 0), 23)])
def test_equals_dense_attention(run, lengths, count):
  assert max(_errors(make_problem(count, lengths, count=count), run)) < 3e-6


@pytest.mark.parametrize(("lengths", "bound"), [((0, 0), 0), ((0, 41), 48), ((16, 3), 16), ((16, 3), 1000)])
def test_a_bound_of_the_prefix_changes_nothing(lengths, bound):
  problem = make_problem(1, lengths)
  run = functools.partial(_in_pieces(48), most_prefix=bound)
  assert max(_errors(problem, run)) < 3e-6
  assert max(_errors(problem, functools.partial(_prefill, most_prefix=bound))) < 3e-6


@pytest.mark.parametrize(("lengths", "bound", "asks"), [((0, 0), 0, False), ((9, 5), 48, False), ((9, 5), None, True)])
def test_with_a_bound_nothing_is_left_to_ask(lengths, bound, asks):
  """A branch or loop that depends on data makes the host wait for the device."""
  run = functools.partial(_in_pieces(48), scale=SCALE, most_prefix=bound)
  found = str(jax.make_jaxpr(run)(*make_problem(1, lengths).attention))
  assert ("cond[" in found or "while[" in found) == asks


def test_few_bounds():
  kv, in_halves = jnp.zeros((4, 2, 16, 128), jnp.bfloat16), jnp.bfloat16
  with backends.use("cudnn", (9, 0)):
    bounds = [bound_of_prefix(tokens, kv, 4, in_halves) for tokens in (0, 1, 16_384, 16_385, 100_000)]
  assert bounds == [0, 16_384, 16_384, None, None]
  with backends.use("xla"):
    assert bound_of_prefix(7, kv, 4, in_halves) is None


@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(1, 8, 16), (3, 10, 1), (16, 64, 8)])
def test_shapes(group, head_dim, block_size):
  problem = make_problem(group, (9, 40), tokens=7, group=group, head_dim=head_dim, block_size=block_size)
  assert max(_errors(problem, _prefill)) < 3e-6
  assert max(_errors(problem, _in_pieces(16))) < 3e-6


@pytest.mark.parametrize("run", [_prefill, _in_pieces(16)])
def test_fp8_pool(run):
  assert max(_errors(make_problem(4, (9, 40), pool_dtype=jnp.float8_e4m3fn), run)) < 3e-6


@pytest.mark.parametrize("run", [_prefill, _in_pieces(16)])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_tolerance_catches(run, mutation):
  problem = make_problem(2, (30, 44))
  assert _errors(mutate(problem, mutation), run, expected_from=problem)[0] > 1e-3


def test_mismatched_shapes_are_refused():
  q, k, v, *rest = make_problem(3, (4, 4)).attention
  with pytest.raises(ValueError, match="do not match"):
    paged_prefill(q, k[:3], v, *rest, scale=1.0)
  with pytest.raises(ValueError, match="fits neither"):
    paged_prefill(q[:, :3], k, v, *rest, scale=1.0)


# ------------------------------------------------------------------------------------ on a GPU

TOLERANCES = {"bfloat16": (1.5e-2, 2e-3), "float16": (3e-3, 5e-4)}
"""Of output and log-sum-exp; the weights are rounded before they meet V."""


def _gpu_problem(group=4, head_dim=128, block_size=16, dtype=jnp.bfloat16, count=300, pool_dtype=None):
  return make_problem(
      group, (700, 0, 1, 513), tokens=384, count=count, group=group, head_dim=head_dim, block_size=block_size,
      dtype=dtype, pool_dtype=pool_dtype)


def _assert_within(errors, name):
  for error, tolerance in zip(errors, TOLERANCES[name], strict=True):
    assert error < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "dtype", "pool_dtype"), [
        (4, 128, 16, jnp.bfloat16, None), (1, 64, 8, jnp.float16, None), (8, 96, 32, jnp.bfloat16, None),
        (3, 256, 64, jnp.bfloat16, None), (4, 128, 16, jnp.bfloat16, jnp.float8_e4m3fn)])
def test_on_gpu(group, head_dim, block_size, dtype, pool_dtype):
  problem = _gpu_problem(group, head_dim, block_size, dtype, pool_dtype=pool_dtype)
  shape = backends.shape_of(problem.kv, group, problem.q.dtype)
  with backends.use("cudnn"):
    if backends.choose("paged_prefill", shape) != "cudnn":
      pytest.skip("cuDNN does not take this shape here")
    errors = _errors(problem, _prefill)
  _assert_within(errors, problem.q.dtype.name)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 384])
@pytest.mark.parametrize("piece", [64, 256])
def test_pieces_on_gpu(piece, count):
  run = jax.jit(
      functools.partial(paged_prefill_cudnn.paged_prefill, config=paged_prefill_cudnn.Config(piece=piece)),
      static_argnames="scale")
  errors = _errors(_gpu_problem(count=count), run)
  _assert_within(errors, "bfloat16")


@pytest.mark.gpu
def test_an_empty_prefix_on_gpu():
  problem = make_problem(5, (0, 0), tokens=200, count=131, group=4, head_dim=128, block_size=16, dtype=jnp.bfloat16)
  with backends.use("cudnn"):
    errors = _errors(problem, _prefill)
  _assert_within(errors, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_gpu_tolerance_catches(mutation):
  problem = _gpu_problem()
  with backends.use("cudnn"):
    errors = _errors(mutate(problem, mutation), _prefill, expected_from=problem)
  assert errors[0] > 2 * TOLERANCES["bfloat16"][0]
