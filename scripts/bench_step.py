"""Times the whole decode step of a Llama-3.1-8B-shaped model with random weights.

    python scripts/bench_step.py [--seqs 64] [--tokens 4096] [--layers 32] [--out docs/results]

Rows: the engine's own step; the same with scores kept up to date; and the step of an
engine whose heads share one table and one length per layer, which is what cannot be
compressed by head. That one has the same model, kernels, pool layout and fragmentation. It
allocates for one head and finds a token's block and offset once per layer; block b of the
shared table stands for blocks b*H..b*H+H-1 of the pool, one for each head, and the
attention kernel is given the tables written out for all heads, which takes a few
microseconds of a step. All are timed in turns.

`bound` is the time that the parameters' bytes (without the embedding, of which a step
reads a few rows) and the bytes of all KVs take at the measured read bandwidth.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import bench_common as common
import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.cache import alloc
from kvc_jax.cache.state import CacheState
from kvc_jax.engine import steps
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.kernels.kv_write import kv_write
from kvc_jax.kernels.paged_decode import paged_decode
from kvc_jax.model.llama import Llama, unstack_layers

_STEPS_AHEAD = 256
"""Tokens that every sequence has room for behind those it starts with."""

Step = Callable[[CacheState], CacheState]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seqs", type=int, default=64)
  parser.add_argument("--tokens", type=int, default=4096, help="KVs per head in the middle of the run")
  parser.add_argument("--layers", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=20, help="steps in a round")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--out", default=common.RESULTS, help="folder for bench_step.json")
  args = parser.parse_args()

  bandwidth = common.read_bandwidth()
  config = dataclasses.replace(common.llama_8b(), num_layers=args.layers)
  model = unstack_layers(common.random_model(config))
  lengths = _lengths(args, config.num_kv_heads)
  tokens, active = jnp.arange(args.seqs, dtype=jnp.int32), jnp.ones(args.seqs, bool)

  def own(state, rule=None):
    return steps.decode_step(model, state, tokens, active, rule=rule)[2]

  def shared(state):
    return shared_step(model, state, tokens, active)[2]

  runs = {"tables per head": own, "tables per head, scored": functools.partial(own, rule=FullAttention()),
          "shared tables": shared}
  pool, *caches = _caches(lengths, config.num_heads)
  timings, parts = _time_in_turns(runs, dict(zip(runs, caches, strict=True)), pool, args)

  weights = common.parameter_bytes(model)
  kvs = 2 * config.head_dim * 2 * args.seqs * args.tokens * config.num_layers * config.num_kv_heads
  bound = (weights + kvs) / bandwidth
  rows = [{
      "step": name, **timing.row(), "bound_us": 1e6 * bound, "times_bound": timing.median / bound,
      "times_shared": timing.median / timings["shared tables"].median, **parts[name],
  } for name, timing in timings.items()]
  common.print_table(rows)
  common.write_results(
      "bench_step", rows, folder=args.out, read_bandwidth=bandwidth, weight_bytes=weights, kv_bytes=kvs,
      seqs=args.seqs, tokens=args.tokens, layers=args.layers)


def _lengths(args: argparse.Namespace, kv_heads: int) -> np.ndarray:
  """KVs [L, S, H] that the run begins with: `tokens` in its middle, sequences at different places of a block."""
  begin = args.tokens - (3 + args.repeats) * args.rounds // 2
  per_sequence = begin + np.random.default_rng(0).integers(-8, 8, args.seqs)
  return np.broadcast_to(per_sequence[None, :, None], (args.layers, args.seqs, kv_heads)).astype(np.int32)


# --------------------------------------------------------------------------- caches


def _caches(lengths: np.ndarray, q_heads: int) -> tuple[jax.Array, CacheState, CacheState, CacheState]:
  """One pool, as there is room for no more, and three caches that take it in turns.

  Returns:
    The pool; a cache with tables for every head; the same with the queries that scores
    wait for; one with tables that all heads share (H = 1), whose block b stands for
    blocks b*H..b*H+H-1 of the pool.
  """
  layers, slots, heads = lengths.shape
  own = _cache(lengths, spare_blocks=heads - 1)  # as many as the null block has in the shared tables
  pool, own = own.kv, dataclasses.replace(own, kv=None)
  scored = dataclasses.replace(
      jax.tree.map(jnp.copy, own), queries=jnp.zeros((layers, slots, q_heads, pool.shape[-1]), pool.dtype),
      log_sums=jnp.full((layers, slots, q_heads), jnp.inf, jnp.float32))
  shared = _cache(lengths[..., :1])
  assert shared.num_blocks * heads == len(pool)
  return pool, own, scored, dataclasses.replace(shared, kv=None)


def _cache(lengths: np.ndarray, spare_blocks: int = 0) -> CacheState:
  """A cache with room for _STEPS_AHEAD more tokens of every sequence, and `spare_blocks`."""
  room = -(-_STEPS_AHEAD // 16) + 1
  return common.make_cache(
      lengths, spare_blocks=lengths.size * room + spare_blocks, max_blocks_per_head=int(lengths.max()) // 16 + room)


@functools.partial(jax.jit, donate_argnums=1, compiler_options=steps.DECODE_OPTIONS)
def shared_step(
    model: Llama, state: CacheState, tokens: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array, CacheState]:
  """`steps.decode_step` with tables and lengths that all heads of a layer share."""
  slots = jnp.arange(state.num_slots, dtype=jnp.int32)
  state, ok = alloc.allocate(state, slots, active.astype(jnp.int32), max_count=1)
  ok &= active
  heads = jnp.arange(model.config.num_kv_heads, dtype=jnp.int32)
  tables = state.tables * len(heads) + heads[:, None]
  lengths = jnp.where(ok[:, None], state.lengths, 0)
  lengths_of_heads = jnp.broadcast_to(lengths, tables.shape[:3])

  def attend(layer, q, k, v, kv):
    last = jnp.maximum(lengths[layer] - 1, 0)  # [S, 1]
    block = state.tables[layer, slots, 0, last[:, 0] // state.block_size]
    blocks = block[:, None] * len(heads) + heads
    kv = kv_write(kv, k, v, blocks, jnp.broadcast_to(last % state.block_size, blocks.shape))
    out, *_ = paged_decode(q, kv, tables, lengths_of_heads, layer, scale=model.config.head_dim**-0.5)
    return out, kv

  hidden, kv = model(tokens, jnp.maximum(state.num_tokens - 1, 0), attend, state.kv)
  return model.logits(hidden), ok, dataclasses.replace(state, kv=kv)


# --------------------------------------------------------------------------- timing


def _time_in_turns(
    runs: dict[str, Step], caches: dict[str, CacheState], pool: jax.Array, args: argparse.Namespace
) -> tuple[dict[str, common.Timing], dict[str, dict[str, float]]]:
  """Times each of `runs` for one round after the other, so that a change of clocks meets them all; then its parts."""
  medians: dict[str, list[float]] = collections.defaultdict(list)
  parts = {}
  for turn in range(args.rounds + 1):
    for name, run in runs.items():
      cache = dataclasses.replace(caches[name], kv=pool)
      if turn < args.rounds:
        timing, cache = common.time_calls(run, cache, repeats=args.repeats, rounds=1)
        medians[name].append(timing.median)
      else:
        parts[name], cache = _parts(run, cache)
      pool, caches[name] = cache.kv, dataclasses.replace(cache, kv=None)
  return {name: common.Timing(float(np.median(t)), min(t), max(t)) for name, t in medians.items()}, parts


_KINDS = {
    "attention": ("paged_decode", "mosaic_gpu"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
}


def _parts(run: Step, cache: CacheState) -> tuple[dict[str, float], CacheState]:
  """Kernels of one step, and the microseconds of each kind, from the profiler."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      cache = jax.block_until_ready(run(cache))
    (trace,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
  parts: dict[str, Any] = collections.defaultdict(float)
  for plane in data.planes:
    for line in plane.lines:
      if "GPU" in plane.name and "Stream" in line.name:
        for event in line.events:
          kind = next((k for k, words in _KINDS.items() if any(w in event.name.lower() for w in words)), "other")
          parts["kernels"] += 1
          parts[f"{kind}_us"] += event.duration_ns / 1e3
  return dict(parts), cache


if __name__ == "__main__":
  main()
