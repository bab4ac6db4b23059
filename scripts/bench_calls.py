"""Times what a call of the engine's programs costs beside its work, with CUDA graphs and without.

    python scripts/bench_calls.py [--slots 8 32] [--layers 32] [--tokens 1500] [--out FOLDER]

The model has the shape of Llama-3.1-8B and random weights. Every slot holds `--tokens` tokens. A row for
each number of slots and each way to launch: `step_us` and `call_us` are the slope and the intercept of a call
of the decode loop over its number of steps; `wait_us` is the same intercept where the host waits for each call;
`chunk_us` is a prompt's chunk of 2048 tokens, and `chunk_in_line_us` one of several that are dispatched at once.

XLA runs its kernels as CUDA graphs (command buffers). It records one again where an argument or a temporary
has moved since the last call, which a loop of few steps may not be worth.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import bench_common as common
import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.attention.prefill import init_observation
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.engine import steps
from kvc_jax.kernels.paged_prefill import bound_of_prefix
from kvc_jax.model.flat import FlatModel
from kvc_jax.model.llama import unstack_layers

_STEPS = (1, 4, 16)
_CHUNK = 2048
_GRAPHS = "xla_gpu_enable_command_buffer"
_LAUNCHES: dict[str, dict[str, Any]] = {
    "graphs": {}, "whole loop": {_GRAPHS: steps.LOOP_OPTIONS[_GRAPHS]}, "kernels": {_GRAPHS: ""}}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--slots", type=int, nargs="+", default=[8, 32])
  parser.add_argument("--tokens", type=int, default=1500, help="that each slot holds")
  parser.add_argument("--layers", type=int, default=32)
  parser.add_argument("--launch", nargs="+", choices=_LAUNCHES, default=list(_LAUNCHES))
  parser.add_argument("--repeats", type=int, default=8)
  parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
  parser.add_argument("--out", default=str(common.RESULTS), help="folder for calls.json")
  args = parser.parse_args()
  config = common.llama_tiny() if args.tiny else dataclasses.replace(common.llama_8b(), num_layers=args.layers)
  model = FlatModel.of(unstack_layers(common.random_model(config)))
  rows = []
  for slots in args.slots:
    for launch in args.launch:
      rows.append({"slots": slots, "launch": launch, **_Calls(model, config, slots, launch, args).row()})
      common.print_table(rows[-1:])
  common.print_table(rows)
  common.write_results("calls", rows, folder=args.out, layers=config.num_layers, tokens=args.tokens)


class _Calls:
  """The programs of one number of slots and one way to launch, and the cache that they work on."""

  def __init__(self, model: FlatModel, config: Any, slots: int, launch: str, args: argparse.Namespace):
    heads = config.num_layers * config.num_kv_heads
    longest = args.tokens + 3 * _CHUNK + 16 * sum(_STEPS) * args.repeats
    cache = CacheConfig(
        num_layers=config.num_layers, num_slots=slots, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        num_blocks=1 + heads * (slots * (-(-args.tokens // 16) + 64) + 2 * -(-_CHUNK // 16)),
        max_blocks_per_head=-(-longest // 16), num_heads=config.num_heads, dtype=jnp.bfloat16)
    self.model, self.slots, self.repeats = model, slots, 1 if args.tiny else args.repeats
    self.state = init_cache(cache)
    group = config.num_heads // config.num_kv_heads
    options = {} if jax.default_backend() == "cpu" else _LAUNCHES[launch]
    self.loop = functools.partial(jax.jit(
        steps.decode_loop.__wrapped__, static_argnames="rule", donate_argnames="state",
        compiler_options={} if jax.default_backend() == "cpu" else {**steps.DECODE_OPTIONS, **options}), rule=None)
    self.chunk = functools.partial(jax.jit(
        steps.mixed_step.__wrapped__, static_argnames=("rule", "most_prefix"), donate_argnames=("state", "observation"),
        compiler_options=options), rule=None,
        most_prefix=bound_of_prefix(longest, self.state.kv, group, jnp.bfloat16))
    self.observation = init_observation(
        None, config.num_layers, config.num_heads, config.head_dim, cache.query_dtype)
    for slot in range(slots):
      for start in range(0, args.tokens, _CHUNK):
        self._prefill(slot, min(_CHUNK, args.tokens - start))
    jax.block_until_ready(self.state)

  def _prefill(self, slot: int, count: int) -> None:
    found, self.state, self.observation = self.chunk(
        self.model, self.state, self.observation, common.prompt_chunk(np.ones(_CHUNK, np.int32), slot, count),
        common.decode_rows(np.zeros(self.slots, np.int32), 1))
    self.ok = found.ok

  def _decode(self, count: int) -> None:
    """As the engine calls it: what tells the slots apart comes from the host each time."""
    rows = common.decode_rows(np.full(self.slots, count, np.int32), max(_STEPS))
    found, self.state = self.loop(self.model, self.state, rows, np.int32(count))
    self.ok = found.counts[0] == count

  def _seconds(self, call: Callable[[], None], *, waits: bool) -> float:
    """Of one call: the mean of `repeats`, after one that does not count."""
    call()
    jax.block_until_ready(self.state)
    start = time.perf_counter()
    for _ in range(self.repeats):
      call()
      if waits:
        jax.block_until_ready(self.state)
    jax.block_until_ready(self.state)
    seconds = (time.perf_counter() - start) / self.repeats
    assert self.ok, "no block was free: the script gives the pool too few"
    return seconds

  def row(self) -> dict[str, float]:
    chunk = functools.partial(self._one_chunk, 0)
    found = {"chunk_us": 1e6 * self._seconds(chunk, waits=True),
             "chunk_in_line_us": 1e6 * self._seconds(chunk, waits=False)}
    for name, waits in (("call_us", False), ("wait_us", True)):
      seconds = [self._seconds(functools.partial(self._decode, count), waits=waits) for count in _STEPS]
      slope, intercept = np.polyfit(_STEPS, seconds, 1)
      found |= {name: 1e6 * float(intercept), "step_us" if not waits else "step_waiting_us": 1e6 * float(slope)}
    return found

  def _one_chunk(self, slot: int) -> None:
    """A prompt's first chunk: the slot is emptied for it."""
    self.state = steps.release(self.state, np.array([slot], np.int32))
    self._prefill(slot, _CHUNK)


if __name__ == "__main__":
  main()
