"""Times the eviction step (value, select, compact, free) on one GPU, beside an XLA-only baseline.

Pools have the shape of Llama-3.1-8B (32 layers, 8 KV heads of 128, blocks of 16, bfloat16)
unless the case says otherwise. Each call restores tables, scores and positions first, for
otherwise the second one would have nothing to evict; the time of these copies, measured
alone, is taken off.

  python scripts/bench_evict.py [CASE ...] [--baseline CASE ...] [--out FOLDER]
"""

import argparse
import dataclasses
import functools

import bench_common
import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.cache.state import CacheState
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import evict
from kvc_jax.kernels import backends

WINDOW = 32
RESTORED = ("scores", "positions", "tables", "lengths", "free_ids", "free_count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """What is evicted.

  Attributes:
    seqs, tokens: sequences in one call, and the length of each.
    rate: of the compression.
    layers, kv_heads, head_dim, block_size: of the model and the pool.
    table_tokens: width of the tables, M * P; by default just enough.
    bounded: whether the call is told that no head holds more than `tokens`.
    pooled: whether scores are max-pooled over 7 neighbours, as KVC-w's are: then
      ties have to be split.
    spread: of the heads' scores, standard deviation of the logarithm. Unequal heads
      lose unequal numbers of KVs, and fewer move; with 0 nearly all survivors do.
  """

  seqs: int = 1
  tokens: int
  rate: int = 8
  layers: int = 32
  kv_heads: int = 8
  head_dim: int = 128
  block_size: int = 16
  table_tokens: int | None = None
  bounded: bool = False
  pooled: bool = True
  spread: float = 1.0

  @property
  def kvs(self) -> int:
    """KVs held before."""
    return self.seqs * self.tokens * self.layers * self.kv_heads

  @property
  def cache_tokens(self) -> int:
    return WINDOW + -(-(self.tokens - WINDOW) // self.rate)


CASES = {
    "1x32k": Case(tokens=32768),
    "1x32k-no-ties": Case(tokens=32768, pooled=False),
    "1x32k-even-heads": Case(tokens=32768, spread=0.0),
    "16x4k": Case(seqs=16, tokens=4096),
    "16x4k-tables-of-32k": Case(seqs=16, tokens=4096, table_tokens=32768),
    "16x4k-tables-of-32k-bounded": Case(seqs=16, tokens=4096, table_tokens=32768, bounded=True),
    "1x4k": Case(tokens=4096),
    "1x32k-to-a-half": Case(tokens=32768, rate=2),
    "1x32k-to-1/64": Case(tokens=32768, rate=64),
    "1x128k": Case(tokens=131072),
    "1x32k-80-layers": Case(tokens=32768, layers=80),
    "1x32k-blocks-of-64": Case(tokens=32768, block_size=64),
}


DEFAULT_CASES = ("1x32k", "1x32k-even-heads", "16x4k", "1x4k")


def build(case: Case) -> CacheState:
  """A full cache with scores."""
  lengths = np.full((case.layers, case.seqs, case.kv_heads), case.tokens, np.int32)
  state = bench_common.make_cache(
      lengths, head_dim=case.head_dim, block_size=case.block_size,
      max_blocks_per_head=-(-(case.table_tokens or case.tokens) // case.block_size))
  return dataclasses.replace(state, scores=_scores(state, case=case))


@functools.partial(jax.jit, static_argnames="case")
def _scores(state, *, case):
  columns = state.tables[..., : case.tokens // state.block_size]
  kinds, heads = jax.random.split(jax.random.key(0))
  scores = jax.random.exponential(kinds, (*state.lengths.shape, case.tokens))
  scores *= jnp.exp(case.spread * jax.random.normal(heads, state.lengths.shape))[..., None]
  if case.pooled:
    scores = jax.lax.reduce_window(scores, 0.0, jax.lax.max, (1, 1, 1, 7), (1, 1, 1, 1), "SAME")
  return state.scores.at[columns].set(scores.reshape(*columns.shape, state.block_size))


def _restore(state, saved):
  return dataclasses.replace(state, **{name: jnp.copy(array) for name, array in saved.items()})


def _evict(state, saved, *, case):
  each = functools.partial(jnp.full, (case.seqs,), dtype=jnp.int32)
  return evict(
      _restore(state, saved), jnp.arange(case.seqs, dtype=jnp.int32), each(case.cache_tokens), each(WINDOW), each(0),
      rule=WindowAttention(), max_tokens=case.tokens if case.bounded else None)[0]


def moved_kvs(case: Case, state: CacheState) -> int:
  """KVs that were moved: before, each KV's index in its head's list was its position."""

  @jax.jit
  def count(state):
    columns = state.tables[..., : case.tokens // case.block_size]
    positions = state.positions[columns].reshape(*state.lengths.shape, -1)
    kept = state.lengths[..., None]
    return jnp.sum((jnp.arange(positions.shape[-1]) < kept) & (positions >= kept))

  return int(count(state))


def run(name: str, case: Case, backend: str, bandwidth: float, matmul_rate: float) -> dict:
  """One row of the table."""
  state = build(case)
  saved = {name: jnp.copy(getattr(state, name)) for name in RESTORED}
  rounds = {"repeats": 20} if backend == "auto" else {"repeats": 3, "rounds": 3}
  restore = jax.jit(_restore, donate_argnums=0)
  copies, state = bench_common.time_calls(lambda state: restore(state, saved), state)
  with backends.use(backend):
    step = jax.jit(functools.partial(_evict, case=case), donate_argnums=0).lower(state, saved).compile()
  total, last = bench_common.time_calls(lambda state: step(state, saved), state, **rounds)
  moved = moved_kvs(case, last)
  kv_bytes = 2 * case.head_dim * last.kv.dtype.itemsize
  # Each score and position is read once; each KV that moves is read and written with both.
  least_bytes = case.kvs * 8 + moved * 2 * (kv_bytes + 8)
  seconds = total.median - copies.median
  prefill = case.seqs * prefill_flops(case) / matmul_rate
  return {
      "case": name, "backend": backend, "KVs": case.kvs, "kept": int(last.lengths.sum()), "moved": moved,
      "ms": 1e3 * seconds, "ms_least": 1e3 * (total.least - copies.median),
      "ms_most": 1e3 * (total.most - copies.median), "ms_restore": 1e3 * copies.median,
      "GB": least_bytes / 1e9, "of_bandwidth": least_bytes / seconds / bandwidth,
      "of_prefill": seconds / prefill,
      "temp_bytes_per_KV": step.memory_analysis().temp_size_in_bytes / case.kvs,
  }


def prefill_flops(case: Case) -> float:
  """Products of one prompt through Llama-3.1-8B's layers."""
  config = bench_common.llama_8b()
  q_dim, kv_dim = config.num_heads * case.head_dim, case.kv_heads * case.head_dim
  weights = config.hidden_size * (2 * q_dim + 2 * kv_dim + 3 * config.intermediate_size)
  return case.layers * (2.0 * case.tokens * weights + 2.0 * case.tokens**2 * q_dim)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", metavar="CASE",
                      help=f"of {', '.join(CASES)} (default: {', '.join(DEFAULT_CASES)})")
  parser.add_argument("--baseline", nargs="*", metavar="CASE", default=["1x32k", "16x4k"],
                      help="cases that are run on XLA alone as well (default: %(default)s)")
  parser.add_argument("--out", default=bench_common.RESULTS, help="folder for evict.json")
  options = parser.parse_args()
  bandwidth, matmul_rate = bench_common.read_bandwidth(), bench_common.matmul_rate()
  rows = []
  for name in options.cases or DEFAULT_CASES:
    for backend in ("auto", backends.XLA) if name in options.baseline else ("auto",):
      rows.append(run(name, CASES[name], backend, bandwidth, matmul_rate))
      bench_common.print_table(rows[-1:])
  bench_common.print_table(rows)
  bench_common.write_results(
      "evict", rows, folder=options.out, read_bandwidth=bandwidth, matmul_rate=matmul_rate)


if __name__ == "__main__":
  main()
