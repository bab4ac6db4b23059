"""Closing the holes that eviction left: the XLA version, the Triton one interpreted, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.kernels import backends, compact_kv_triton, compact_kv_xla
from kvc_jax.kernels.compact_kv import compact_kv

SMALL = compact_kv_triton.Config(chunk=32, tile=4, ctas=3)


_xla = jax.jit(compact_kv_xla.compact_kv)
_interpret = jax.jit(functools.partial(compact_kv_triton.compact_kv, config=SMALL, interpret=True))


def make_problem(seed, *, heads=5, block_size=8, max_blocks=12, head_dim=64, dtype=jnp.float32, wide=None):
  """Pools whose every KV names itself, random tables, lengths (some 0, some full) and evictions.

  `wide` is a number of blocks in the pool, of which the last are used.
  """
  rng = np.random.default_rng(seed)
  used = heads * max_blocks
  blocks = wide or used + 1
  kvs = max_blocks * block_size
  lengths = np.r_[0, kvs, rng.integers(1, kvs, heads - 2)]
  share = np.r_[0.5, 0.8, 0.0, rng.random(heads - 3)]
  evicted = (rng.random((heads, kvs)) < share[:, None]) & (np.arange(kvs) < lengths[:, None])
  evicted[-1] = np.arange(kvs) < lengths[-1]  # all of a head
  tables = (blocks - used + rng.permutation(used)).reshape(heads, max_blocks)
  tables[np.arange(max_blocks) * block_size >= lengths[:, None]] = 0
  kept = lengths - evicted.sum(axis=1)
  arrays = [jnp.asarray(x, jnp.int32) for x in (tables, lengths, kept)]
  return *_pools(blocks, block_size, head_dim, dtype), jnp.asarray(evicted), *arrays


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pools(blocks, block_size, head_dim, dtype):
  names = jnp.arange(blocks * block_size, dtype=jnp.int32).reshape(blocks, block_size)
  kv = ((names[:, None, :, None] + jnp.arange(head_dim, dtype=jnp.int32)) % _modulus(dtype)).astype(dtype)
  return jnp.concatenate([kv, -kv], axis=1), names.astype(jnp.float32), names


def _modulus(dtype):
  """Whole numbers below it are exact."""
  return 17 if jnp.dtype(dtype).itemsize == 1 else 251


def check(problem, pools):
  """Each head's first entries are the survivors, whole, in place where they need not move."""
  tables = problem[4]
  block_size = problem[0].shape[2]
  evicted, lengths, kept, slots = (np.asarray(x) for x in (problem[3], *problem[5:], tables * block_size))
  # Only what the tables name comes to the host: the pool may be large.
  kv, scores, positions = (np.asarray(pool[tables]).astype(np.float32) for pool in pools)
  heads, _, _, _, head_dim = kv.shape
  kv = kv.swapaxes(2, 3).reshape(heads, -1, 2, head_dim)
  for row in range(heads):
    at = (slots[row][:, None] + np.arange(block_size)).reshape(-1)
    stays = ~evicted[row] & (np.arange(at.size) < lengths[row])
    new = positions[row].reshape(-1)[: kept[row]].astype(np.int64)
    np.testing.assert_array_equal(np.sort(new), np.sort(at[stays]))
    unmoved = stays[: kept[row]]
    np.testing.assert_array_equal(new[unmoved], at[: kept[row]][unmoved])
    np.testing.assert_array_equal(scores[row].reshape(-1)[: kept[row]], new)
    keys = (new[:, None] + np.arange(head_dim)) % _modulus(pools[0].dtype)
    np.testing.assert_array_equal(kv[row, : kept[row]], np.stack([keys, -keys], axis=1))


@pytest.mark.parametrize("run", [_xla, _interpret], ids=["xla", "triton"])
@pytest.mark.parametrize(
    ("seed", "options"),
    [(0, {}), (1, {"block_size": 16, "max_blocks": 5, "head_dim": 96}), (2, {"block_size": 1, "max_blocks": 40}),
     (3, {"dtype": jnp.bfloat16, "head_dim": 128, "heads": 9}),
     (4, {"dtype": jnp.float8_e4m3fn, "head_dim": 64})])
def test_survivors_close_ranks(run, seed, options):
  problem = make_problem(seed, **options)
  check(problem, run(*problem))


def test_nothing_evicted_changes_nothing():
  kv, scores, positions, evicted, tables, lengths, _ = make_problem(4)
  for run in (_xla, _interpret):
    new = run(kv, scores, positions, jnp.zeros_like(evicted), tables, lengths, lengths)
    for before, after in zip((kv, scores, positions), new, strict=True):
      np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("mutation", ["values kept", "scores kept", "one move less"])
def test_the_check_sees_mistakes(mutation):
  problem = make_problem(0)
  kv, scores, positions = _xla(*problem)
  if mutation == "values kept":
    kv = kv.at[:, 1].set(problem[0][:, 1])
  elif mutation == "scores kept":
    scores = problem[1]
  else:
    moved = np.flatnonzero(np.asarray(positions) != np.asarray(problem[2]))[0]
    positions = positions.reshape(-1).at[moved].set(moved).reshape(positions.shape)
  with pytest.raises(AssertionError):
    check(problem, (kv, scores, positions))


def test_mismatched_shapes_are_refused():
  kv, scores, positions, evicted, tables, lengths, kept = make_problem(0)
  with pytest.raises(ValueError, match="do not match"):
    compact_kv(kv, scores, positions, evicted[:, :-8], tables, lengths, kept)


# ------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 8), (96, 16), (128, 16), (128, 64), (256, 32)])
def test_on_gpu(dtype, head_dim, block_size):
  problem = make_problem(
      head_dim, heads=37, head_dim=head_dim, block_size=block_size, max_blocks=4096 // block_size, dtype=dtype)
  with backends.use("triton"):
    check(problem, jax.jit(compact_kv)(*problem))


@pytest.mark.gpu
def test_on_gpu_in_a_pool_above_4_gib():
  """The pool's last blocks lie beyond what 32-bit byte offsets, and element offsets, can reach."""
  problem = make_problem(1, heads=5, block_size=16, head_dim=128, max_blocks=64, dtype=jnp.bfloat16, wide=600_001)
  with backends.use("triton"):
    check(problem, jax.jit(compact_kv)(*problem))
