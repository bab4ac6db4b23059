"""Times paged decode attention on one GPU, beside FlashInfer, JAX's own kernel and torch SDPA.

One row per shape and variant: microseconds of one layer's attention, the bytes of its KVs
over that time, and this over the read bandwidth measured in the same run. What is timed is
a step of 32 layers, as many as Llama-3.1-8B has, with the schedule of work that a step
computes once. Each layer's queries are the output of the one before; KVs are those of
fewer layers in turn, for there is no room for 32.

  python scripts/bench_decode.py [SHAPE ...] [--variant NAME ...] [--peer NAME ...] [--out FOLDER]
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence

import bench_common
import jax
import jax.numpy as jnp
import numpy as np
import peers

from kvc_jax.cache.quantize import FP8
from kvc_jax.cache.state import CacheState
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.kernels import backends
from kvc_jax.kernels.observed import Observed
from kvc_jax.kernels.paged_decode import paged_decode

_LAYER_BYTES = 6 << 30  # of KVs in all layers together, many times the L2 cache
_MOST_LAYERS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """What is timed.

  Attributes:
    backend: of the op.
    scores: whether scores are kept up to date.
    every: one query in so many is observed, at the same step in all sequences; what is timed is the mean.
    buffer: newest tokens that a query does not count for; above 0 positions are read too.
    order: of the blocks in the pool.
    dtype: of the pool; queries are bfloat16.
  """

  backend: str = "auto"
  scores: bool = False
  every: int = FullAttention().decode_every
  buffer: int = 0
  order: bench_common.Order = "shuffled"
  dtype: str = "bfloat16"


VARIANTS = {
    "plain": Variant(),
    "scores": Variant(scores=True),
    "scores, buffer 10": Variant(scores=True, buffer=10),
    "scores, every query": Variant(scores=True, every=1),
    "in order": Variant(order="in order"),
    "in order, scores": Variant(order="in order", scores=True),
    "in order, scores, every query": Variant(order="in order", scores=True, every=1),
    "served": Variant(order="served"),
    "served, scores": Variant(order="served", scores=True),
    "mosaic": Variant(backend="mosaic"),
    "triton": Variant(backend="triton"),
    "mosaic, scores": Variant(backend="mosaic", scores=True),
    "triton, scores": Variant(backend="triton", scores=True),
    "fp8": Variant(dtype=FP8.name),
    "fp8, scores": Variant(dtype=FP8.name, scores=True),
    "fp8, triton": Variant(dtype=FP8.name, backend="triton"),
    "xla": Variant(backend="xla"),
}
_ON_ALL_SHAPES = ("mosaic", "triton", "served", "fp8")
_ON_THE_FIRST = (
    *_ON_ALL_SHAPES, "served, scores", "mosaic, scores", "triton, scores", "scores, every query", "scores, buffer 10",
    "in order", "in order, scores", "in order, scores, every query", "fp8, scores", "fp8, triton")
PEER_SHAPES = tuple(name for name, shape in bench_common.DECODE_SHAPES.items() if shape.ragged_by != "head")


def time_variant(shape: bench_common.DecodeShape, variant: Variant) -> tuple[bench_common.Timing, float]:
  """Time of one layer's attention, and the bytes of its KVs."""
  item = jnp.dtype(variant.dtype).itemsize
  one = int(shape.lengths(1).sum()) * 2 * shape.head_dim * item
  layers = min(_MOST_LAYERS, max(2, _LAYER_BYTES // one))
  heads = shape.kv_heads * shape.group
  state = bench_common.make_cache(
      shape.lengths(layers), head_dim=shape.head_dim, block_size=shape.block_size, dtype=variant.dtype,
      order=variant.order, num_heads=heads)
  q = jax.random.normal(jax.random.key(1), (shape.seqs, heads, shape.head_dim), jnp.bfloat16)
  size = bench_common.kv_bytes(state)
  with backends.use(variant.backend):
    run = jax.jit(functools.partial(_layers, variant=variant), donate_argnums=(0, 1)).lower(q, state).compile()
    slow = variant.backend == backends.XLA
    timing, _ = bench_common.time_calls(
        lambda carry: run(*carry), (q, state), repeats=2 if slow else 6, rounds=2 if slow else 5,
        seconds=0.0 if slow else bench_common.ROUND_SECONDS)
  return timing.per(bench_common.LAYERS_PER_STEP), size


def _layers(q: jax.Array, state: CacheState, *, variant: Variant) -> tuple[jax.Array, CacheState]:
  observed = None
  if variant.scores:
    observed = Observed(state.scores, state.positions, state.queries, state.log_sums, state.num_tokens - 1)
  for layer in range(bench_common.LAYERS_PER_STEP):
    q, observed = paged_decode(
        q, state.kv, state.tables, state.lengths, jnp.int32(layer % state.num_layers), observed,
        scale=q.shape[-1]**-0.5, buffer=variant.buffer, every=variant.every)
  if observed is not None:
    state = dataclasses.replace(
        state, scores=observed.scores, queries=observed.queries, log_sums=observed.log_sums,
        num_tokens=state.num_tokens + 1)  # the next step's queries stand one further
  return q, state


def run_shape(name: str, variants: Sequence[str], bandwidth: float) -> list[dict]:
  """A row for each variant that the device has."""
  shape, rows = bench_common.DECODE_SHAPES[name], []
  for label in variants:
    variant = VARIANTS[label]
    if variant.order == "served" and shape.ragged_by == "head":
      continue
    supported = {support.backend for support in backends.TABLE["paged_decode"]} | {"auto", backends.XLA}
    if variant.backend not in supported:
      continue
    timing, size = time_variant(shape, variant)
    rate = size / timing.median
    rows.append({"shape": name, "variant": label, "order": variant.order, **timing.row(), "TB/s": rate / 1e12,
                 "of_bandwidth": rate / bandwidth})
    bench_common.print_table(rows[-1:])
  return rows


def run_peers(names: list[str], wanted: list[str], bandwidth: float) -> list[dict]:
  """A row for each peer, shape and variant; a peer that is not installed leaves its error."""
  rows = []
  for peer in wanted:
    # JAX's own kernel is far behind, and slow to compile in its four configurations.
    some = [name for name in names if peer != "jax-paged-attention" or name in ("uniform-4k", "8-sequences-8k")]
    for found in [row for order in peers.ORDERS[peer] for row in peers.measure(peer, some, order=order)]:
      row = {"shape": found["shape"], "variant": f"{peer} {found.get('variant', '')}".strip(), "order": found["order"]}
      if "us" in found:
        rate = found["kv_bytes"] / (found["us"] * 1e-6)
        row |= {key: found[key] for key in ("us", "us_least", "us_most")}
        row |= {"TB/s": rate / 1e12, "of_bandwidth": rate / bandwidth}
      else:
        row["error"] = found["error"][:200]
      rows.append(row)
  return rows


def compare(rows: list[dict]) -> None:
  """Adds to our rows their speed over FlashInfer's better layout: same shape, pages in the same order, same dtype."""
  best: dict[tuple[str, str, str], float] = {}
  for row in rows:
    peer = row["variant"].split()[0]
    if peer in ("flashinfer", "flashinfer-fp8") and "us" in row:
      key = row["shape"], row["order"], peers.KV_DTYPES.get(peer, "bfloat16")
      best[key] = min(row["us"], best.get(key, np.inf))
  for row in rows:
    variant = VARIANTS.get(row["variant"])
    if variant and (row["shape"], variant.order, variant.dtype) in best:
      row["over_flashinfer"] = best[row["shape"], variant.order, variant.dtype] / row["us"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  shapes = list(bench_common.DECODE_SHAPES)
  parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(shapes)}; all by default")
  parser.add_argument("--variant", action="append", choices=VARIANTS,
                      help="may be repeated; by default four, and more on the first shape")
  parser.add_argument("--peer", action="append", choices=[*peers.PEERS, "none"], help="may be repeated; all by default")
  parser.add_argument("--out", default=bench_common.RESULTS, help="folder for decode.json")
  options = parser.parse_args()
  unknown = set(options.shapes) - set(shapes)
  if unknown:
    parser.error(f"unknown shape {', '.join(sorted(unknown))}; known: {', '.join(shapes)}")
  names, bandwidth = options.shapes or shapes, bench_common.read_bandwidth()
  wanted = [peer for peer in options.peer or peers.PEERS if peer != "none"]
  rows = run_peers([name for name in names if name in PEER_SHAPES], wanted, bandwidth)
  for i, name in enumerate(names):
    rows += run_shape(name, options.variant or (_ON_ALL_SHAPES if i else _ON_THE_FIRST), bandwidth)
  compare(rows)
  bench_common.print_table(rows)
  bench_common.write_results("decode", rows, folder=options.out, read_bandwidth=bandwidth)


if __name__ == "__main__":
  main()
