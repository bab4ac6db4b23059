"""The lowest KVs of each head: the XLA version, the Triton one interpreted, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.kernels import backends, lowest_kvs_triton, lowest_kvs_xla
from kvc_jax.kernels.lowest_kvs import lowest_kvs

NEVER = 0xFFFF_FFFF


def _interpret(*arguments, step_bits=4):
  config = lowest_kvs_triton.Config(tile=16, unroll=2, step_bits=step_bits, num_warps=1)
  return lowest_kvs_triton.lowest_kvs(*arguments, config=config, interpret=True)


def _problem(seed, heads, block_size, max_blocks, kinds):
  """Keys of `kinds` different values, some NEVER; random positions, tables, lengths and numbers wanted."""
  rng = np.random.default_rng(seed)
  kvs, used = max_blocks * block_size, heads * max_blocks
  lengths = np.r_[0, kvs, rng.integers(1, kvs + 1, heads - 2)]
  values = np.r_[0, NEVER, NEVER - 1, rng.integers(0, 2**32, kinds)].astype(np.uint32)
  keys = rng.choice(values, (heads, kvs))
  tables = rng.permutation(used).reshape(heads, max_blocks) + 1
  positions = np.zeros((used + 1, block_size), np.int64)
  for row in tables:
    positions[row] = rng.choice(100 * kvs, kvs, replace=False).reshape(max_blocks, block_size)
  held = np.arange(kvs) < lengths[:, None]
  most = np.sum(held & (keys < NEVER), axis=1)
  wanted = np.r_[0, most[1], rng.integers(0, most[2:] + 1)]
  arrays = keys, positions.astype(np.int32), tables.astype(np.int32), lengths.astype(np.int32), wanted.astype(np.int32)
  return [jnp.asarray(x) for x in arrays]


def _expected(keys, positions, tables, lengths, wanted):
  marks = np.zeros(keys.shape, bool)
  for row, (n, count) in enumerate(zip(lengths, wanted, strict=True)):
    order = np.lexsort((np.asarray(positions)[tables[row]].reshape(-1)[:n], np.asarray(keys)[row, :n]))
    marks[row, order[:count]] = True
  return marks


@pytest.mark.parametrize(
    "run", [lowest_kvs_xla.lowest_kvs, _interpret, functools.partial(_interpret, step_bits=2)],
    ids=["xla", "triton", "triton, 2 bits"])
@pytest.mark.parametrize(
    ("seed", "shape"), [(0, (6, 8, 9, 4)), (1, (4, 16, 3, 1000)), (2, (7, 1, 41, 1)), (3, (3, 64, 2, 20))])
def test_lowest_and_oldest(run, seed, shape):
  problem = _problem(seed, *shape)
  np.testing.assert_array_equal(run(*problem), _expected(*problem))


def test_mismatched_shapes_are_refused():
  keys, positions, tables, lengths, wanted = _problem(0, 3, 8, 4, 4)
  with pytest.raises(ValueError, match="do not match"):
    lowest_kvs(keys, positions, tables[:, 1:], lengths, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [1, 300, 100_000])
@pytest.mark.parametrize(("heads", "block_size", "max_blocks"), [(40, 16, 700), (40, 64, 33), (700, 8, 40)])
def test_on_gpu(kinds, heads, block_size, max_blocks):
  problem = _problem(kinds, heads, block_size, max_blocks, kinds)
  with backends.use("triton"):
    np.testing.assert_array_equal(jax.jit(lowest_kvs)(*problem), _expected(*problem))
