"""Counting keys up to thresholds: the XLA version, the Triton one interpreted, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.kernels import backends, count_at_most_triton, count_at_most_xla
from kvc_jax.kernels.count_at_most import count_at_most

SMALL = count_at_most_triton.Config(chunk=32, num_warps=1)
NEVER = 0xFFFF_FFFF


def _interpret(*arguments):
  return count_at_most_triton.count_at_most(*arguments, config=SMALL, interpret=True)


def _problem(seed, rows, kvs, wanted):
  """Keys of few values among the whole range, thresholds that meet them, lengths with 0 and K."""
  rng = np.random.default_rng(seed)
  values = np.r_[0, 1, NEVER, NEVER - 1, 2**31, 2**31 - 1, rng.integers(0, 2**32, 30)].astype(np.uint32)
  keys, thresholds = rng.choice(values, (rows, kvs)), rng.choice(values, (rows, wanted))
  lengths = np.r_[0, kvs, rng.integers(0, kvs + 1, rows - 2)].astype(np.int32)
  expected = [[int(np.sum(k[:n] <= t)) for t in ts] for k, ts, n in zip(keys, thresholds, lengths, strict=True)]
  return [jnp.asarray(x) for x in (keys, thresholds, lengths)], expected


@pytest.mark.parametrize("run", [count_at_most_xla.count_at_most, _interpret], ids=["xla", "triton"])
@pytest.mark.parametrize(("rows", "kvs", "wanted"), [(5, 96, 15), (3, 41, 1), (4, 32, 2)])
def test_counts(run, rows, kvs, wanted):
  arguments, expected = _problem(rows, rows, kvs, wanted)
  np.testing.assert_array_equal(run(*arguments), expected)


def test_mismatched_shapes_are_refused():
  with pytest.raises(ValueError, match="count_at_most"):
    count_at_most(jnp.zeros((3, 8), jnp.uint32), jnp.zeros((2, 1), jnp.uint32), jnp.zeros(3, jnp.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [1, 2, 15])
def test_on_gpu(wanted):
  arguments, expected = _problem(wanted, 61, 33_000, wanted)
  with backends.use("triton"):
    np.testing.assert_array_equal(jax.jit(count_at_most)(*arguments), expected)
