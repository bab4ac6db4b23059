"""The decode op against dense attention: ragged heads, empty heads, poisoned padding."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvc_jax.kernels.compact_kv import compact_kv
from kvc_jax.kernels.compact_kv_xla import MOVES_PER_STEP
from kvc_jax.kernels.kv_write import kv_write
from kvc_jax.kernels.paged_decode import paged_decode

SEQS, LAYERS = 3, 2


def _problem(seed, *, group=2, heads=2, head_dim=8, block_size=4, max_blocks=37, dtype=jnp.float32):
  """Ragged lengths 0..M*P, block ids at random, NaN in every KV slot that is not held."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, max_blocks * block_size + 1, (LAYERS, SEQS, heads)).astype(np.int32)
  lengths[0, 0, 0], lengths[0, 0, 1], lengths[0, 1, 0] = 0, 1, max_blocks * block_size
  num_blocks = LAYERS * SEQS * heads * max_blocks + 1
  ids = list(rng.permutation(np.arange(1, num_blocks)))
  tables = np.zeros((*lengths.shape, max_blocks), np.int32)
  kv = np.full((num_blocks, 2, block_size, head_dim), np.nan, np.float32)
  for at in np.ndindex(lengths.shape):
    for m in range(-(-lengths[at] // block_size)):
      tables[at][m] = ids.pop()
      filled = min(block_size, lengths[at] - m * block_size)
      kv[tables[at][m], :, :filled] = rng.normal(size=(2, filled, head_dim))
  q = rng.normal(size=(SEQS, heads * group, head_dim))
  return jnp.asarray(q, dtype), jnp.asarray(kv, dtype), jnp.asarray(tables), jnp.asarray(lengths)


def _expected(q, kv, tables, lengths, layer, scale):
  q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
  out = []
  for seq in range(SEQS):
    lists = []
    for which in (0, 1):
      rows = [kv[np.asarray(tables)[layer, seq, h], which].reshape(-1, q.shape[-1]) for h in range(lengths.shape[2])]
      lists.append([r[:n] for r, n in zip(rows, np.asarray(lengths)[layer, seq], strict=True)])
    out.append(oracles.attention_ragged(q[seq], *lists, scale))
  return np.array(out)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_equals_dense_attention(layer, dtype, tolerance):
  problem = _problem(layer, dtype=dtype)
  out, scores = jax.jit(paged_decode, static_argnames="scale")(*problem, jnp.int32(layer), scale=0.5)
  assert scores is None
  assert out.dtype == dtype
  np.testing.assert_allclose(
      np.asarray(out, np.float64), _expected(*problem, layer, 0.5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(1, 64, 16), (4, 80, 8), (16, 10, 1)])
def test_shapes(group, head_dim, block_size):
  problem = _problem(3, group=group, head_dim=head_dim, block_size=block_size, max_blocks=20)
  out, _ = paged_decode(*problem, jnp.int32(0), scale=0.1)
  np.testing.assert_allclose(out, _expected(*problem, 0, 0.1), atol=3e-6)


@pytest.mark.parametrize("mutation", ["zeroed V", "swapped heads", "shifted lengths", "other layer", "other scale"])
def test_tolerance_catches(mutation):
  q, kv, tables, lengths = _problem(5, dtype=jnp.bfloat16)
  expected = _expected(q, kv, tables, lengths, 0, 0.5)
  layer, scale = 0, 0.5
  if mutation == "zeroed V":
    kv = kv.at[:, 1].set(0)
  elif mutation == "swapped heads":
    tables, lengths = tables[:, :, ::-1], lengths[:, :, ::-1]
  elif mutation == "shifted lengths":
    lengths = jnp.maximum(lengths - 1, 0)
  elif mutation == "other layer":
    layer = 1
  else:
    scale = 0.6
  out, _ = paged_decode(q, kv, tables, lengths, jnp.int32(layer), scale=scale)
  assert np.abs(np.asarray(out, np.float64) - expected).max() > 2 * 2e-2 * (1 + np.abs(expected).max())


def test_mismatched_shapes_are_refused():
  q, kv, tables, lengths = _problem(6, max_blocks=2)
  layer = jnp.int32(0)
  with pytest.raises(ValueError, match="do not match"):
    paged_decode(q[:2], kv, tables, lengths, layer, scale=1.0)
  with pytest.raises(ValueError, match="fits neither"):
    paged_decode(q[:, :3], kv, tables, lengths, layer, scale=1.0)
  with pytest.raises(ValueError, match="scores need positions"):
    paged_decode(q, kv, tables, lengths, layer, jnp.zeros(kv.shape[::2]), scale=1.0)


def test_kv_write_touches_its_targets_alone():
  rng = np.random.default_rng(0)
  kv = rng.normal(size=(6, 2, 4, 3)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 2, 3)).astype(np.float32)
  blocks, offsets = np.array([[1, 2], [0, 5]]), np.array([[3, 0], [1, 2]])
  expected = kv.copy()
  for t, h in np.ndindex(2, 2):
    expected[blocks[t, h], :, offsets[t, h]] = k[t, h], v[t, h]
  np.testing.assert_array_equal(kv_write(jnp.asarray(kv), k, v, blocks, offsets), expected)
  with pytest.raises(ValueError, match="head_dim"):
    kv_write(jnp.asarray(kv), k[..., :2], v[..., :2], blocks, offsets)


def test_compact_kv_moves_more_rows_than_one_step_takes():
  moves = 2 * MOVES_PER_STEP + 5
  pool = jnp.arange(2 * moves + 2, dtype=jnp.int32).reshape(-1, 2)
  kv = jnp.stack([pool, -pool], axis=1)[..., None].astype(jnp.float32)
  order = np.random.default_rng(0).permutation(np.arange(2, 2 * moves + 2))
  sources, targets = order[:moves], order[moves:]
  new_kv, new_scores, new_positions = compact_kv(
      kv, pool.astype(jnp.float32), pool, jnp.asarray(sources), jnp.asarray(targets), jnp.int32(moves))
  expected = np.arange(2 * moves + 2)
  expected[targets] = sources
  np.testing.assert_array_equal(new_positions.reshape(-1), expected)
  np.testing.assert_array_equal(new_scores.reshape(-1), expected)
  np.testing.assert_array_equal(new_kv[:, 0, :, 0].reshape(-1), expected)
  np.testing.assert_array_equal(new_kv[:, 1, :, 0].reshape(-1), -expected)


def test_compact_kv_moves_count_rows():
  rng = np.random.default_rng(1)
  kv = rng.normal(size=(4, 2, 2, 3)).astype(np.float32)
  scores, positions = rng.random((4, 2)).astype(np.float32), np.arange(8, dtype=np.int32).reshape(4, 2)
  # Moves block 3 slot 1 -> block 1 slot 0; the second entry is padding.
  new = compact_kv(jnp.asarray(kv), jnp.asarray(scores), jnp.asarray(positions),
                   jnp.array([7, 0]), jnp.array([2, 0]), jnp.int32(1))
  kv[1, :, 0], scores[1, 0], positions[1, 0] = kv[3, :, 1], scores[3, 1], positions[3, 1]
  for got, expected in zip(new, (kv, scores, positions), strict=True):
    np.testing.assert_array_equal(got, expected)
