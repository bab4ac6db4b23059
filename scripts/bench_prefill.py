"""Times prefill of the Llama-3.1-8B shape: the attention alone beside torch's, and whole chunks with their scores.

    python scripts/bench_prefill.py [--only attention chunk] [--tokens 8192] [--out FOLDER]

Writes docs/results/prefill.json. A share of peak is model FLOPs (two per parameter of the
layers and token, and the products of attention that the causal mask leaves) over the
rate of an 8192^3 bfloat16 product measured in the same run. Whole chunks take a fifth of a
second, so one call is a round.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_common
import jax
import jax.numpy as jnp
import numpy as np
from bench_common import Timing, time_calls

from kvc_jax.attention.prefill import Observation, init_observation
from kvc_jax.cache.state import CacheState
from kvc_jax.engine import steps
from kvc_jax.engine.packed import Packed
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.kernels.paged_prefill import paged_prefill
from kvc_jax.model.llama import abstract_llama, unstack_layers

CONFIG = bench_common.llama_8b()
GROUP = CONFIG.num_heads // CONFIG.num_kv_heads
_ZERO = np.int32(0)  # of NumPy, so that torch's process does not start JAX's backend


def prefix_lengths(kind: str, tokens: int, layers: int) -> np.ndarray:
  """KVs before the chunk, i32 [L, 1, H]: none, a chunk's in each head, or ragged from 1/16 of that to all of it."""
  shape = layers, 1, CONFIG.num_kv_heads
  if kind == "ragged":
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(tokens / 16), np.log(tokens), shape))
    return lengths.astype(np.int32)
  return np.full(shape, tokens if kind == "full" else 0, np.int32)


def attention_flops(tokens: int, lengths: np.ndarray) -> float:
  """Products of attention under the causal mask, for all layers in `lengths` [L, 1, H]."""
  pairs = lengths.size * tokens * (tokens + 1) / 2 + tokens * float(lengths.sum())
  return 4.0 * pairs * GROUP * CONFIG.head_dim


def layer_parameters() -> int:
  """Parameters of the layers' products: embedding, head and norms left out."""
  c = CONFIG
  attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def _row(what: str, timing: Timing, flops: float, peak: float, **more: Any) -> dict[str, Any]:
  return {"what": what, **more, **timing.row(), "tflops": flops / timing.median / 1e12,
          "share_of_peak": flops / timing.median / peak}


# --------------------------------------------------------------------------- attention alone


def attention_rows(tokens: int, peak: float) -> Iterator[dict[str, Any]]:
  """One layer's attention of a chunk, over each kind of prefix."""
  q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(q_key, (tokens, CONFIG.num_heads, CONFIG.head_dim), jnp.bfloat16)
  k, v = (jax.random.normal(key, (tokens, CONFIG.num_kv_heads, CONFIG.head_dim), jnp.bfloat16)
          for key in (k_key, v_key))

  @jax.jit
  def attend(q, k, v, state):
    out, _ = paged_prefill(
        q, k, v, state.kv, state.tables, state.lengths[0, 0], _ZERO, _ZERO, jnp.int32(tokens),
        scale=CONFIG.head_dim**-0.5)
    return out

  for kind in ("none", "full", "ragged"):
    lengths = prefix_lengths(kind, tokens, 1)
    state = bench_common.make_cache(
        lengths, head_dim=CONFIG.head_dim, max_blocks_per_head=4 * tokens // 16,
        spare_blocks=lengths.size * -(-tokens // 16) - int((-(-lengths // 16)).sum()))
    timing, _ = time_calls(lambda q, state=state: attend(q, k, v, state), q)
    yield _row(f"attention, prefix {kind}", timing, attention_flops(tokens, lengths), peak)


def start_torch(tokens: int) -> subprocess.Popen[str]:
  """torch in a process of its own, which imports it and then waits for a line."""
  return subprocess.Popen(
      [sys.executable, __file__, "--torch", "--tokens", str(tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True)


def torch_rows(process: subprocess.Popen[str], tokens: int, peak: float) -> Iterator[dict[str, Any]]:
  """torch's attention of one chunk without prefix."""
  output, log = process.communicate("go\n")
  for line in output.splitlines():
    row = json.loads(line)
    timing = Timing(row["seconds"], row["least"], row["most"])
    yield _row(row["what"], timing, attention_flops(tokens, prefix_lengths("none", tokens, 1)), peak)
  if process.returncode:
    yield {"what": "torch", "error": (log.strip().splitlines() or ["no output"])[-1]}


def run_torch(tokens: int) -> None:
  """Prints a JSON line for each of torch's attention backends."""
  import torch
  from torch.nn import attention, functional

  sys.stdin.readline()
  shape = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
  q = shape(1, CONFIG.num_heads, tokens, CONFIG.head_dim)
  k, v = (shape(1, CONFIG.num_kv_heads, tokens, CONFIG.head_dim) for _ in range(2))
  for backend in (attention.SDPBackend.CUDNN_ATTENTION, attention.SDPBackend.FLASH_ATTENTION):
    times = []
    with attention.sdpa_kernel(backend):
      for _ in range(6):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(20):
          functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 20 / 1e3)
    times = times[1:]
    print(json.dumps({"what": f"torch SDPA, {backend.name}", "seconds": statistics.median(times),
                      "least": min(times), "most": max(times)}))


# --------------------------------------------------------------------------- whole chunks


@functools.partial(jax.jit, donate_argnames="state")
def _rewind(state: CacheState, start: dict[str, jax.Array]) -> CacheState:
  """The cache as before the chunk; the chunk's KVs are written over."""
  return dataclasses.replace(state, **jax.tree.map(jnp.copy, start))


def _cache(layers: int, tokens: int, kind: str) -> tuple[CacheState, dict[str, jax.Array]]:
  """A cache with room for one more chunk, and what `_rewind` needs to come back to it.

  Its shapes are the same for every kind, so one program serves them all.
  """
  lengths = prefix_lengths(kind, tokens, layers)
  room = lengths.size * (2 * -(-tokens // 16) + 1) - int((-(-lengths // 16)).sum())
  state = bench_common.make_cache(
      lengths, head_dim=CONFIG.head_dim, max_blocks_per_head=4 * tokens // 16, spare_blocks=room)
  names = ("tables", "lengths", "num_tokens", "free_ids", "free_count")
  return state, {name: jnp.copy(getattr(state, name)) for name in names}


def _observe(rule, layers: int) -> Observation:
  return init_observation(rule, layers, CONFIG.num_heads, CONFIG.head_dim, jnp.bfloat16)


def _compile_chunk(model, layers: int, tokens: int, rule) -> Callable[..., Any]:
  state = jax.eval_shape(lambda: _cache(layers, tokens, "none")[0])
  observation = jax.eval_shape(lambda: _observe(rule, layers))
  ids = np.zeros(tokens, np.int32)
  return steps.mixed_step.lower(
      model, state, observation, bench_common.prompt_chunk(ids, 0, tokens), _no_rows(state), rule=rule).compile()


def _no_rows(state: CacheState) -> Packed[steps.DecodeRows]:
  """A decode step of nobody beside the chunk."""
  return bench_common.decode_rows(np.zeros(state.num_slots, np.int32), 1)


def _compile_chunks(model, tokens: int, rules: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
  """`mixed_step` for each rule, compiled side by side."""
  # XLA times algorithms for products while it compiles, and keeps the answer: one layer
  # settles them all while nothing else runs.
  one = dataclasses.replace(CONFIG, num_layers=1)
  _compile_chunk(abstract_llama(one, jnp.bfloat16, stacked=False), 1, tokens, None)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    built = pool.map(lambda rule: _compile_chunk(model, CONFIG.num_layers, tokens, rule), rules)
    return dict(zip(rules, built, strict=True))


def _time_chunk(run, model, tokens: int, kind: str, rule) -> tuple[Timing, CacheState, Observation]:
  """Time of one chunk behind a prefix of that kind; also the cache and observation it leaves."""
  state, start = _cache(CONFIG.num_layers, tokens, kind)
  ids = np.arange(tokens, dtype=np.int32) * 7 % CONFIG.vocab_size

  def step(carry):
    observation = _observe(rule, CONFIG.num_layers)
    state = _rewind(carry[0], start)
    found, state, observation = run(
        model, state, observation, bench_common.prompt_chunk(ids, 0, tokens), _no_rows(state))
    return state, observation, found.logits, found.ok

  timing, (state, observation, logits, ok) = time_calls(step, (state,), repeats=1, rounds=5)
  assert bool(ok), "the chunk did not get its blocks"
  assert bool(jnp.isfinite(logits).all()), "a logit is not finite"
  return timing, state, observation


def chunk_rows(tokens: int, peak: float) -> Iterator[dict[str, Any]]:
  """`mixed_step` of the whole model, without decode rows, over each kind of prefix and with each way to score."""
  model = unstack_layers(bench_common.random_model(CONFIG))  # as the engine does on a GPU
  window, full, scale = WindowAttention(), FullAttention(), CONFIG.head_dim**-0.5
  programs = _compile_chunks(model, tokens, (None, window, full))
  for kind, rule in (("none", None), ("full", None), ("ragged", None), ("none", window), ("none", full)):
    timing, state, observation = _time_chunk(programs[rule], model, tokens, kind, rule)
    flops = 2.0 * layer_parameters() * tokens + attention_flops(tokens, prefix_lengths(kind, tokens, CONFIG.num_layers))
    scores = type(rule).__name__ if rule else "none"
    yield _row(f"chunk, prefix {kind}", timing, flops, peak, scores=scores)
    if rule is window:
      timing, _ = time_calls(
          lambda state, o=observation: steps.score_prompt(state, o, _ZERO, scale=scale, rule=window), state)
      yield {"what": "score_prompt behind it", "scores": scores, **timing.row()}


PARTS = ("attention", "chunk")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
  parser.add_argument("--tokens", type=int, default=8192, help="tokens of a chunk")
  parser.add_argument("--out", default=bench_common.RESULTS, help="folder for prefill.json")
  parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.torch:
    run_torch(args.tokens)
    return
  warnings.filterwarnings("ignore", category=DeprecationWarning)  # lowering a Triton kernel warns
  torch = start_torch(args.tokens) if "attention" in args.only else None
  peak = bench_common.matmul_rate()
  measured: list[Iterator[dict[str, Any]]] = []
  if torch:
    measured += [attention_rows(args.tokens, peak), torch_rows(torch, args.tokens, peak)]
  if "chunk" in args.only:
    measured.append(chunk_rows(args.tokens, peak))
  rows = []
  try:
    for row in itertools.chain(*measured):
      rows.append(row)
      bench_common.print_table([row])
  finally:  # what was measured before an error is kept
    path = bench_common.write_results(
        "prefill", rows, folder=args.out, matmul_flops_per_second=peak, tokens=args.tokens,
        layer_parameters=layer_parameters())
    print(f"matmul {peak / 1e12:.0f} TFLOP/s; wrote {path}")


if __name__ == "__main__":
  main()
