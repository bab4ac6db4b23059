"""Paged decode attention of others, timed on the shapes of bench_common; run in a process of its own.

    python scripts/peers.py flashinfer uniform-4k 8-sequences-8k

prints one JSON line per shape and variant. `measure` starts that process and reads
it, so that torch and JAX never share one. FlashInfer wants flashinfer-python and
apache-tvm-ffi beside a CUDA build of torch, ninja and nvcc; CUDA_HOME is found
from nvcc where it is not set.

No peer can hold a different number of KVs in each head, so they run the uniform
shapes and those ragged by sequence.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_common import (
    DECODE_SHAPES,
    LAYERS_PER_STEP,
    ROUND_SECONDS,
    DecodeShape,
    Order,
    order_of_blocks,
    time_calls,
)

from kvc_jax.cache.quantize import FP8

Timings = Iterator[tuple[str, tuple[float, float, float]]]
"""Variant, and seconds of a call: median, least and most."""
_POOL_BYTES = 3 << 30  # at least; many times the L2 cache, so that no call finds its KVs there
_ROUNDS, _REPEATS = 5, 5


def measure(
    peer: str, shapes: Sequence[str], dtype: str = "bfloat16", order: Order = "shuffled", limit: float = 300
) -> list[dict[str, Any]]:
  """Runs one peer in a process of its own.

  Args:
    peer: a key of PEERS.
    shapes: names in DECODE_SHAPES.
    dtype: of queries, and of keys and values where KV_DTYPES has no other.
    order: of the pages in the pool.
    limit: seconds that the process may take.

  Returns:
    Rows with shape, peer, order, variant, us (median), us_least, us_most, and kv_bytes of
    one call; or shape, peer, order and error where it failed.
  """
  command = [sys.executable, str(pathlib.Path(__file__)), peer, *shapes, "--dtype", dtype, "--order", order]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    output, error = done.stdout, done.stderr
  except subprocess.TimeoutExpired as e:
    output, error = (e.stdout or b"").decode(), f"ran past {limit} s"
  rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
  missing = [name for name in shapes if name not in {row["shape"] for row in rows}]
  reason = (error.strip().splitlines() or ["no output"])[-1]
  return rows + [{"shape": name, "peer": peer, "order": order, "error": reason} for name in missing]


def _num_pools(shape: DecodeShape, itemsize: int) -> int:
  """Pools, of a layer each, that are read in turn."""
  one = int(shape.lengths(1).sum()) * 2 * shape.head_dim * itemsize
  return max(2, -(-_POOL_BYTES // one))


def _page_ids(pages: np.ndarray, order: Order) -> np.ndarray:
  """Ids of each sequence's pages, which hold all heads of a layer."""
  return order_of_blocks(pages[None, :, None], 0, order, np.random.default_rng(0))


# --------------------------------------------------------------------------- torch


def _time_graph(call: Callable[[int], None]) -> tuple[float, float, float]:
  """Seconds (median, least, most) of `call(layer)`, from replays of one CUDA graph of all layers of a step."""
  import torch

  stream = torch.cuda.Stream()
  torch.cuda.synchronize()  # the plan was copied on another stream
  with torch.cuda.stream(stream):
    for layer in range(2):
      call(layer)
  stream.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph, stream=stream):
    for layer in range(LAYERS_PER_STEP):
      call(layer)
  times = []
  for _ in range(_ROUNDS + 1):
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_REPEATS):
      graph.replay()
    last.record()
    last.synchronize()
    times.append(first.elapsed_time(last) / 1e3 / _REPEATS / LAYERS_PER_STEP)
  times = times[1:]
  return statistics.median(times), min(times), max(times)


def flashinfer(shape: DecodeShape, dtype: str, order: Order, kv_dtype: str | None = None) -> Timings:
  """FlashInfer's BatchDecodeWithPagedKVCacheWrapper on tensor cores, both layouts, in a CUDA graph.

  `kv_dtype` is that of the pages, where it is not that of the queries.
  """
  nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
  os.environ.setdefault("CUDA_HOME", str(pathlib.Path(nvcc).resolve().parents[1]))
  import torch
  from flashinfer import BatchDecodeWithPagedKVCacheWrapper

  kind, kv_kind = getattr(torch, dtype), getattr(torch, kv_dtype or dtype)
  lengths = shape.lengths(1)[0, :, 0]
  pages = -(-lengths // shape.block_size)
  starts = np.concatenate([[0], np.cumsum(pages)])
  indptr, last = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths - (pages - 1) * shape.block_size))
  indices = torch.tensor(_page_ids(pages, order)).cuda()
  q = torch.randn(shape.seqs, shape.kv_heads * shape.group, shape.head_dim, device="cuda", dtype=kind)
  sides = {"NHD": (shape.block_size, shape.kv_heads), "HND": (shape.kv_heads, shape.block_size)}
  for layout, middle in sides.items():
    pools = [torch.randn(int(pages.sum()), 2, *middle, shape.head_dim, device="cuda", dtype=kind).to(kv_kind)
             for _ in range(_num_pools(shape, kv_kind.itemsize))]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(512 << 20, dtype=torch.uint8, device="cuda"), layout, use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr.cuda(), paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.cuda())
    wrapper.plan(
        indptr, indices, last, shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim, shape.block_size,
        q_data_type=kind, kv_data_type=kv_kind)
    out = torch.empty_like(q)

    def call(layer, wrapper=wrapper, pools=pools, out=out):
      wrapper.run(q, pools[layer % len(pools)], out=out)

    yield f"{layout} {wrapper._backend}", _time_graph(call)
    del pools, wrapper


def torch_sdpa(shape: DecodeShape, dtype: str, order: Order) -> Timings:
  """torch's scaled_dot_product_attention on KVs that already lie gathered and padded (the gather is not timed)."""
  del order
  import torch
  from torch.nn import functional

  kind = getattr(torch, dtype)
  lengths = torch.tensor(shape.lengths(1)[0, :, 0])
  longest, pools = int(lengths.max()), _num_pools(shape, kind.itemsize)
  q = torch.randn(shape.seqs, shape.kv_heads * shape.group, 1, shape.head_dim, device="cuda", dtype=kind)
  k, v = ([torch.randn(shape.seqs, shape.kv_heads, longest, shape.head_dim, device="cuda", dtype=kind)
           for _ in range(pools)] for _ in range(2))
  ragged = bool((lengths < longest).any())
  mask = (torch.arange(longest) < lengths[:, None])[:, None, None].cuda() if ragged else None

  def call(layer):
    functional.scaled_dot_product_attention(q, k[layer % pools], v[layer % pools], attn_mask=mask, enable_gqa=True)

  yield "padded, with a mask" if ragged else "gathered", _time_graph(call)


# --------------------------------------------------------------------------- JAX


def jax_paged_attention(shape: DecodeShape, dtype: str, order: Order) -> Timings:
  """JAX's own Pallas-Triton `paged_attention` (deprecated upstream), the best of a few configurations."""
  warnings.filterwarnings("ignore", category=DeprecationWarning)
  from jax.experimental.pallas.ops.gpu import paged_attention as op

  kind = jnp.dtype(dtype)
  lengths = shape.lengths(1)[0, :, 0]
  pages = -(-lengths // shape.block_size)
  longest = -(-int(pages.max()) // 16) * 16  # divides among the splits
  ids = _page_ids(pages, order)
  tables = np.zeros((shape.seqs, longest), np.int32)
  tables[np.arange(longest) < pages[:, None]] = ids
  keys = jax.random.split(jax.random.key(0), 2 * _num_pools(shape, kind.itemsize) + 1)
  pool = (shape.kv_heads, int(pages.sum()), shape.block_size, shape.head_dim)
  pools = [jax.random.normal(key, pool, kind) for key in keys[1:]]
  q = jax.random.normal(keys[0], (shape.seqs, shape.kv_heads * shape.group, shape.head_dim), kind)
  best = None
  for splits, at_once, warps, stages in ((16, 4, 4, 2), (16, 8, 8, 2), (8, 8, 4, 2), (4, 4, 4, 2)):

    attend = jax.jit(functools.partial(  # jitted, to be lowered once
        op.paged_attention, k_splits=splits, pages_per_compute_block=at_once, num_warps=warps, num_stages=stages))

    @jax.jit
    def run(q, pools, attend=attend):
      for layer in range(LAYERS_PER_STEP):
        q = attend(q, *pools[2 * layer % len(pools) :][:2], jnp.asarray(tables), jnp.asarray(lengths))
      return q

    timing, _ = time_calls(lambda q, run=run: run(q, pools), q, repeats=5, seconds=ROUND_SECONDS)
    timing = timing.per(LAYERS_PER_STEP)
    if best is None or timing.median < best[1].median:
      best = f"{splits} splits, {at_once} pages, {warps} warps, {stages} stages", timing
  yield best[0], (best[1].median, best[1].least, best[1].most)


KV_DTYPES = {"flashinfer-fp8": FP8.name}
"""Of keys and values, where it is not that of the queries."""
PEERS = {
    "flashinfer": flashinfer,
    "flashinfer-fp8": functools.partial(flashinfer, kv_dtype=KV_DTYPES["flashinfer-fp8"]),
    "torch-sdpa": torch_sdpa, "jax-paged-attention": jax_paged_attention}
ORDERS: dict[str, tuple[Order, ...]] = {
    "flashinfer": ("shuffled", "served", "in order"), "flashinfer-fp8": ("shuffled",), "torch-sdpa": ("in order",),
    "jax-paged-attention": ("shuffled",)}
"""Of pages, in which each peer is timed."""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("peer", choices=PEERS)
  parser.add_argument("shapes", nargs="+", choices=DECODE_SHAPES)
  parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
  parser.add_argument("--order", default="shuffled", choices=typing.get_args(Order))
  args = parser.parse_args()
  for name in args.shapes:
    shape = DECODE_SHAPES[name]
    assert shape.ragged_by != "head", "no peer can run a shape that is ragged by head"
    itemsize = jnp.dtype(KV_DTYPES.get(args.peer, args.dtype)).itemsize
    size = int(shape.lengths(1).sum()) * 2 * shape.head_dim * itemsize
    start = time.perf_counter()
    for variant, (median, least, most) in PEERS[args.peer](shape, args.dtype, args.order):
      row = {"shape": name, "peer": args.peer, "order": args.order, "variant": variant, "us": median * 1e6,
             "us_least": least * 1e6, "us_most": most * 1e6, "kv_bytes": size,
             "seconds_to_measure": time.perf_counter() - start}
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
