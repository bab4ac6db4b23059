"""The Pallas-Triton decode kernel: interpreted on the CPU, and on a GPU where there is one."""

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

from kvc_jax.kernels import backends, paged_decode_mosaic, paged_decode_triton, stream_k
from kvc_jax.kernels.paged_decode import paged_decode

SCALE = 0.2
SMALL = paged_decode_triton.Config(tile=16, num_stages=2, ctas=7)


def _interpret(problem, layer, *observed, **options):
  return paged_decode_triton.paged_decode(
      *problem.attention, jnp.int32(layer), *observed, scale=SCALE, config=SMALL, interpret=True, **options)


@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "dtype", "tolerance"),
    [(4, 64, 16, jnp.float32, 2e-6), (1, 128, 8, jnp.bfloat16, 1e-2), (3, 96, 32, jnp.float16, 2e-3)])
def test_equals_dense_attention(group, head_dim, block_size, dtype, tolerance):
  problem = make_problem(
      group, group=group, head_dim=head_dim, block_size=block_size, max_blocks=96 // block_size, dtype=dtype)
  out, observed = _interpret(problem, 1)
  assert observed is None
  assert out.dtype == dtype
  assert output_error(out, expected_output(problem, 1, SCALE)) < tolerance


def test_fp8_pool():
  problem = make_problem(
      7, group=2, head_dim=64, block_size=16, max_blocks=6, dtype=jnp.float8_e4m3fn, query_dtype=jnp.float32)
  out, _ = _interpret(problem, 0)
  assert output_error(out, expected_output(problem, 0, SCALE)) < 2e-3


def test_every_e4m3_number_unpacks_exactly():
  numbers = jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn)
  low, high = paged_decode_triton._unpack(numbers.view(jnp.int16))
  unpacked = np.stack([low, high], axis=1).reshape(-1).astype(np.float64) * 256
  finite = np.isfinite(np.asarray(numbers, np.float64))
  np.testing.assert_array_equal(unpacked[finite], np.asarray(numbers, np.float64)[finite])


@pytest.mark.parametrize(("power", "buffer", "every", "group"), [(2, 0, 1, 2), (1, 60, 1, 3), (2, 0, 3, 2)])
def test_scores(power, buffer, every, group):
  problem = make_problem(group, group=group, head_dim=64, block_size=8, max_blocks=10)
  _, observed = _interpret(problem, 0, problem.observed, power=power, buffer=buffer, every=every)
  assert score_error(problem, observed, expected_scores(problem, 0, SCALE, power, buffer, every)) < 1e-5
  some = np.repeat(np.asarray(problem.lengths)[0] > 0, group, axis=1)[..., None]
  np.testing.assert_array_equal(observed.queries[0], np.where(some, problem.q, problem.observed.queries[0]))
  np.testing.assert_array_equal(observed.queries[1], problem.observed.queries[1])
  assert output_error(observed.log_sums[0], expected_log_sums(problem, 0, SCALE)) < 2e-6


@pytest.mark.parametrize("ctas", [1, 2, 5, 7, 33, 80])
def test_the_plan_covers_each_tile_once(ctas):
  rng = np.random.default_rng(ctas)
  lengths = rng.integers(0, 60, (5, 4, 2)) * rng.integers(0, 2, (5, 4, 2))
  lengths[2] = 0
  lengths[2, 1, 0] = 20  # fewer tiles than CTAs
  lengths[3] = 40 * 8 - 3  # eight pairs alike: of 33 CTAs 32 share them
  lengths[4] = 0
  packed = np.asarray(stream_k.schedule(jnp.asarray(lengths, jnp.int32), tile=8, ctas=ctas))
  for layer in range(5):
    row, slots = stream_k.Row(packed, layer, 8, ctas), []
    workers: dict[int, list[int]] = {}
    for cta in range(ctas):
      first, stop, low, high = row.cta(cta)
      for pair in range(first, stop):
        tiles = range(max(low, row.start(pair)), min(high, row.start(pair + 1)))
        if tiles:
          slots.append(cta + pair)
          workers.setdefault(pair, []).append(cta)
    tiles = -(-lengths[layer].reshape(-1) // 8)
    assert row.start(8) == tiles.sum()
    shares = [share for cta in range(ctas) if (share := row.cta(cta)[3] - row.cta(cta)[2])]
    assert max(shares, default=0) - min(shares, default=0) <= 1
    assert len(shares) >= min(tiles.sum(), 0.95 * ctas), "many CTAs have nothing"
    if layer == 3:
      assert len(slots) == {2: 8, 33: 32, 80: 80}.get(ctas, len(slots)), "a CTA has parts of two pairs"
    assert len(slots) == len(set(slots))
    for pair in range(8):
      assert list(range(*map(int, row.ctas_of(pair)))) == workers.get(pair, []), pair


# ------------------------------------------------------------------------------------ on a GPU

GPU_SHAPES = [
    # group, head_dim, block_size, dtype
    (4, 128, 16, jnp.bfloat16),
    (1, 128, 16, jnp.bfloat16),
    (8, 128, 32, jnp.bfloat16),
    (16, 64, 8, jnp.bfloat16),
    (3, 64, 64, jnp.float16),
    (6, 128, 16, jnp.float16),
    (2, 256, 16, jnp.bfloat16),
    (4, 256, 64, jnp.float16),
    (4, 96, 16, jnp.bfloat16),
    (4, 128, 16, jnp.float32),
    (2, 64, 8, jnp.float32),
]
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
SCORE_TOLERANCES = {"bfloat16": 2e-2, "float16": 1e-2, "float32": 1e-4}
FP8_SCORE_TOLERANCE = 1e-3
"""float16 holds keys and queries exactly, and sums are float32."""
_decode = jax.jit(paged_decode, static_argnames=("scale", "power", "buffer", "every"))


def _gpu_problem(group, head_dim, block_size, dtype, seed=0):
  return make_problem(
      seed, group=group, head_dim=head_dim, block_size=block_size, max_blocks=720 // block_size, dtype=dtype)


def _takes(backend, problem, *, scored=False):
  group = problem.q.shape[1] // problem.tables.shape[2]
  with backends.use(backend):
    shape = backends.shape_of(problem.kv, group, problem.q.dtype, scored=scored)
    return backends.choose("paged_decode", shape) == backend


def _skip_without(backend, problem):
  if not _takes(backend, problem):
    pytest.skip(f"{backend} does not take this shape here")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize(("group", "head_dim", "block_size", "dtype"), GPU_SHAPES)
def test_on_the_gpu(backend, group, head_dim, block_size, dtype):
  problem = _gpu_problem(group, head_dim, block_size, dtype)
  name = jnp.dtype(dtype).name
  _skip_without(backend, problem)
  with backends.use(backend):
    for layer in range(2):
      out, none = _decode(*problem.attention, jnp.int32(layer), scale=SCALE)
      assert none is None
      assert output_error(out, expected_output(problem, layer, SCALE)) < TOLERANCES[name]
    for power, buffer, every in ((2, 0, 1), (1, 60, 1), (2, 0, 3)):
      out, observed = _decode(
          *problem.attention, jnp.int32(1), problem.observed, scale=SCALE, power=power, buffer=buffer, every=every)
      assert output_error(out, expected_output(problem, 1, SCALE)) < TOLERANCES[name]
      expected = expected_scores(problem, 1, SCALE, power, buffer, every)
      assert score_error(problem, observed, expected) < SCORE_TOLERANCES[name]
      assert output_error(observed.log_sums[1], expected_log_sums(problem, 1, SCALE)) < TOLERANCES[name]


@pytest.mark.gpu
@pytest.mark.parametrize("ctas", [1, 5, 11])
@pytest.mark.parametrize(("dtype", "head_dim", "stages"), [
    (jnp.bfloat16, 128, 2), (jnp.float8_e4m3fn, 128, 2), (jnp.float8_e4m3fn, 64, 3)])
def test_few_ctas_with_many_pairs(ctas, dtype, head_dim, stages):
  """Tile after tile in the same memory; some sums of others are there when a CTA begins a pair, some come later."""
  problem = make_problem(
      2, seqs=8, heads=4, group=4, head_dim=head_dim, block_size=16, max_blocks=45, dtype=dtype,
      query_dtype=jnp.bfloat16)
  _skip_without("mosaic", problem)
  config = paged_decode_mosaic.Config(stages=stages, ctas=ctas)
  for layer in range(2):
    out, observed = paged_decode_mosaic.paged_decode(
        *problem.attention, jnp.int32(layer), problem.observed, scale=SCALE, config=config)
    assert output_error(out, expected_output(problem, layer, SCALE)) < TOLERANCES["bfloat16"]
    assert score_error(problem, observed, expected_scores(problem, layer, SCALE, 2, 0)) < SCORE_TOLERANCES["bfloat16"]
    assert output_error(observed.log_sums[layer], expected_log_sums(problem, layer, SCALE)) < TOLERANCES["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "query_dtype"),
    [(4, 128, 16, jnp.bfloat16), (1, 128, 8, jnp.float16), (8, 128, 64, jnp.bfloat16), (3, 128, 32, jnp.bfloat16),
     (8, 64, 8, jnp.bfloat16), (4, 64, 16, jnp.float16), (4, 96, 16, jnp.bfloat16), (4, 256, 32, jnp.bfloat16)])
def test_fp8_pool_on_the_gpu(backend, group, head_dim, block_size, query_dtype):
  problem = make_problem(
      1, group=group, head_dim=head_dim, block_size=block_size, max_blocks=720 // block_size,
      dtype=jnp.float8_e4m3fn, query_dtype=query_dtype)
  _skip_without(backend, problem)
  tolerance = TOLERANCES[jnp.dtype(query_dtype).name]
  with backends.use(backend):
    for layer in range(2):
      out, _ = _decode(*problem.attention, jnp.int32(layer), scale=SCALE)
      assert out.dtype == query_dtype
      assert output_error(out, expected_output(problem, layer, SCALE)) < tolerance
    for buffer in (0, 60) if _takes(backend, problem, scored=True) else ():
      out, observed = _decode(*problem.attention, jnp.int32(1), problem.observed, scale=SCALE, buffer=buffer)
      assert output_error(out, expected_output(problem, 1, SCALE)) < tolerance
      assert score_error(problem, observed, expected_scores(problem, 1, SCALE, 2, buffer)) < FP8_SCORE_TOLERANCE
      assert output_error(observed.log_sums[1], expected_log_sums(problem, 1, SCALE)) < FP8_SCORE_TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_tolerance_catches(backend, mutation):
  problem = _gpu_problem(4, 128, 16, jnp.bfloat16)
  _skip_without(backend, problem)
  with backends.use(backend):
    out, observed = _decode(*mutate(problem, mutation).attention, jnp.int32(0), problem.observed, scale=SCALE)
  assert output_error(out, expected_output(problem, 0, SCALE)) > 2 * TOLERANCES["bfloat16"]
  if mutation != "zeroed V":
    error = np.abs(np.nan_to_num(np.asarray(observed.scores) - expected_scores(problem, 0, SCALE, 2, 0))[1:])
    assert error.max() > 2 * SCORE_TOLERANCES["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize(("dtype", "gib"), [(jnp.bfloat16, 4.5), (jnp.float8_e4m3fn, 3), (jnp.float8_e4m3fn, 4.5)])
def test_large_pool(backend, dtype, gib):
  problem = make_problem(
      3, group=4, head_dim=128, block_size=16, max_blocks=20, dtype=dtype, query_dtype=jnp.bfloat16, unused=0)
  _skip_without(backend, problem)
  _, _, block_size, head_dim = problem.kv.shape
  shift = int(gib * 2**30) // (2 * block_size * head_dim * jnp.dtype(dtype).itemsize)
  kv = jax.jit(lambda kv: jnp.pad(kv, ((shift, 0), *[(0, 0)] * 3)))(problem.kv)
  assert kv.nbytes > gib * 2**30
  observed = problem.observed._replace(
      scores=jnp.pad(problem.observed.scores, ((shift, 0), (0, 0))),
      positions=jnp.pad(problem.observed.positions, ((shift, 0), (0, 0))))
  tables = jnp.where(problem.tables > 0, problem.tables + shift, 0)
  with backends.use(backend):
    out, observed = _decode(problem.q, kv, tables, problem.lengths, jnp.int32(1), observed, scale=SCALE)
    small, small_observed = _decode(*problem.attention, jnp.int32(1), problem.observed, scale=SCALE)
  np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(small, np.float32))
  np.testing.assert_array_equal(observed.scores[shift + 1 :], small_observed.scores[1:])


@pytest.mark.gpu
def test_an_unknown_shape_runs_on_xla():
  problem = make_problem(4, group=2, head_dim=40, block_size=4)
  out, _ = _decode(*problem.attention, jnp.int32(0), scale=SCALE)
  assert output_error(out, expected_output(problem, 0, SCALE)) < 2e-3  # TF32 or better
