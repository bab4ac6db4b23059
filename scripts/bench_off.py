"""Times the engine with compression off against one that has no compression by head compiled in.

    python scripts/bench_off.py [--input 2000] [--prompts 24] [--output 256] [--rounds 3] [--out FOLDER]

Both are the same engine, scheduler and model with random weights, and serve the same prompts in turns. With
compression off our programs score nothing and evict nothing already; what stays of the feature are tables and lengths
for each head, scores and positions of new KVs, and waiting queries. The other engine has one table and one length
for all heads of a layer and none of the rest: block b of its table stands for blocks b*H..b*H+H-1 of a
pool of the same size, and the attention kernels are given the tables written out.

Rows: tokens (in and out) per second of each, and `over_compiled_out`, ours over the other's, from the
medians of the rounds. `same_outputs` is the share of prompts with the same tokens from both.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from typing import Any

import bench_common as common
import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.attention.prefill import Observation
from kvc_jax.cache import alloc
from kvc_jax.cache.state import CacheState
from kvc_jax.engine import steps
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.engine import Engine
from kvc_jax.engine.packed import Packed
from kvc_jax.engine.request import SamplingParams
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.kernels.kv_write import kv_write
from kvc_jax.kernels.paged_decode import paged_decode
from kvc_jax.kernels.paged_prefill import paged_prefill
from kvc_jax.kernels.scatter import apart
from kvc_jax.model.flat import FlatModel
from kvc_jax.model.layers import Attend
from kvc_jax.model.llama import Llama, unstack_layers


def main() -> None:
  args = _arguments()
  bandwidth = common.read_bandwidth(4 << 30 if not args.tiny else 16 << 20)
  config = common.llama_8b() if not args.tiny else common.llama_tiny()
  model = unstack_layers(common.random_model(config))
  engines = {"off": _engine(model, args), "compiled out": _engine(model, args)}
  engines["compiled out"].batch = SharedBatch(engines["compiled out"].batch)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, config.vocab_size, args.input).tolist() for _ in range(args.prompts)]
  for engine in engines.values():
    _serve(engine, prompts[:3], 8)  # compiles; with steps beside chunks, and chunks ahead
  seconds: dict[str, list[float]] = {name: [] for name in engines}
  outputs: dict[str, list[Any]] = {}
  for turn in range(args.rounds):
    for name in (*engines,) if turn % 2 == 0 else (*reversed(engines),):
      start = time.perf_counter()
      outputs[name] = _serve(engines[name], prompts, args.output)
      seconds[name].append(time.perf_counter() - start)
  tokens = args.prompts * (args.input + args.output)
  medians = {name: statistics.median(found) for name, found in seconds.items()}
  same = np.mean([a == b for a, b in zip(*outputs.values(), strict=True)])
  rows = [{
      "engine": name, "tokens_per_second": tokens / medians[name], "seconds": medians[name], "least": min(found),
      "most": max(found), "over_compiled_out": medians["compiled out"] / medians[name], "same_outputs": float(same),
  } for name, found in seconds.items()]
  common.print_table(rows)
  common.write_results("off", rows, folder=args.out, read_bandwidth=bandwidth, **{
      name: getattr(args, name) for name in ("input", "output", "prompts", "seqs", "rounds")})


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--input", type=int, default=2000, help="tokens of a prompt")
  parser.add_argument("--output", type=int, default=256, help="tokens to generate for each")
  parser.add_argument("--prompts", type=int, default=24)
  parser.add_argument("--seqs", type=int, default=8, help="that run at once")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
  parser.add_argument("--out", default=str(common.RESULTS), help="folder for off.json")
  return parser.parse_args()


def _engine(model: Any, args: argparse.Namespace) -> Engine:
  return Engine(
      model, tokenizer=common.endless_tokenizer(), max_model_len=args.input + args.output,
      max_num_seqs=args.seqs, chunk_size=min(2048, args.input), steps_per_sync=16,
      num_blocks=_blocks(model.config, args))


def _blocks(config: Any, args: argparse.Namespace) -> int:
  """Room for all that run, and as many null blocks as the other engine has."""
  rows = config.num_layers * args.seqs * (-(-(args.input + args.output) // 16) + 1)
  return (1 + rows) * config.num_kv_heads


def _serve(engine: Engine, prompts: list[list[int]], output: int) -> list[list[int]]:
  params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
  ids = [engine.add(prompt, params) for prompt in prompts]
  found = {}
  while engine.has_work:
    found |= {update.request_id: update.output.token_ids for update in engine.step() if update.output}
  return [found[i] for i in ids]


# --------------------------------------------------------------------------- without tables per head


class SharedBatch(Batch):
  """A batch whose heads share tables and lengths. Serves no compression and swaps nothing out."""

  def __init__(self, batch: Batch):
    super().__init__(batch.model, batch.config, batch.chunk_size, None, batch.steps_per_sync)
    batch.free()

  def _start_empty(self) -> None:
    super()._start_empty()
    self._buckets = (self.config.num_slots,)  # the programs below have a row for every slot
    heads = self.config.num_kv_heads
    blocks = self.config.num_blocks // heads
    self.state = CacheState(
        kv=self.state.kv, scores=None, positions=None, num_tokens=self.state.num_tokens,  # type: ignore[arg-type]
        tables=self.state.tables[:, :, :1], lengths=self.state.lengths[:, :, :1],
        free_ids=jnp.arange(blocks - 1, -1, -1, dtype=jnp.int32), free_count=jnp.asarray(blocks - 1, jnp.int32))

  def _compile_side_by_side(self, *_: Any) -> None:
    pass

  def _mixed(
      self, compression: Compression | None, chunk: Packed[steps.PromptChunk], rows: Packed[steps.DecodeRows],
      observation: Observation, most_prefix: int | None,
  ) -> tuple[steps.Mixed, Observation]:
    assert compression is None
    found, self.state = _mixed_step(self._flat, self.state, chunk, rows, most_prefix)
    return found, observation

  def _decode(self, rows: Packed[steps.DecodeRows], num_steps: int, rule: ScoringRule | None) -> steps.Decoded:
    assert rule is None
    found, self.state = _decode_loop(self._flat, self.state, rows, np.int32(num_steps))
    return found

  def usage(self) -> steps.Usage:
    return _usage(self.state, heads=self.config.num_kv_heads)


@functools.partial(jax.jit, static_argnames="heads")
def _usage(state: CacheState, heads: int) -> steps.Usage:
  found = steps.usage(state)
  return dataclasses.replace(found, held=heads * found.held, free=heads * found.free)


@functools.partial(jax.jit, static_argnames="most_prefix", donate_argnames="state")
def _mixed_step(
    model: FlatModel, state: CacheState, packed_chunk: Packed[steps.PromptChunk],
    packed_rows: Packed[steps.DecodeRows], most_prefix: int | None,
) -> tuple[steps.Mixed, CacheState]:
  """`steps.mixed_step` with shared tables."""
  chunk, rows = packed_chunk.unpacked(), packed_rows.unpacked()
  llama, slot, width = model.model(), chunk.slot, chunk.tokens.shape[0]
  heads = jnp.arange(llama.config.num_kv_heads, dtype=jnp.int32)
  state, (ok,) = _allocate(state, slot[None], chunk.count[None], -(-width // state.block_size))
  count = jnp.where(ok, chunk.count, 0)
  state, rows_ok, decode = _decoding(state, llama, rows.limits > 0)
  row = jnp.arange(width, dtype=jnp.int32)
  at = state.num_tokens[slot] - count + row
  tables = (state.tables[:, slot] * len(heads) + heads[:, None])[:, None]  # [L, 1, H, M]
  offsets = jnp.broadcast_to((at % state.block_size)[:, None], (len(row), len(heads)))
  prefix = jnp.broadcast_to(state.num_tokens[slot] - count, heads.shape)

  def attend(layer, q, k, v, kv):
    block = apart(state.tables[layer, slot, 0, at // state.block_size], row < count, kv.shape[0] // len(heads))
    kv = kv_write(kv, k[:width], v[:width], block[:, None] * len(heads) + heads, offsets)
    out, _ = paged_prefill(
        q[:width], k[:width], v[:width], kv, tables, prefix, layer, jnp.int32(0), count,
        scale=llama.config.head_dim**-0.5, most_prefix=most_prefix)
    decoded, kv = decode(layer, q[width:], k[width:], v[width:], kv)
    return jnp.concatenate([out, decoded]), kv

  positions = jnp.concatenate([at, jnp.maximum(state.num_tokens - 1, 0)])
  found, kv = steps.run_mixed(llama, chunk, rows, (ok, rows_ok), positions, attend, state.kv, num_slots=state.num_slots)
  return found, _with_pool(state, kv)


def _decoding(state: CacheState, llama: Llama, active: jax.Array) -> tuple[CacheState, jax.Array, Attend]:
  """Makes room for one token of each active slot; returns ok bool [S] too, and the attention of one layer."""
  heads, slots = (jnp.arange(count, dtype=jnp.int32) for count in (llama.config.num_kv_heads, state.num_slots))
  state, ok = _allocate(state, slots, active.astype(jnp.int32), 1)
  ok &= active
  tables = state.tables * len(heads) + heads[:, None]
  lengths = jnp.where(ok[:, None], state.lengths, 0)
  lengths_of_heads = jnp.broadcast_to(lengths, tables.shape[:3])
  last = jnp.maximum(state.num_tokens - 1, 0)
  offsets = jnp.broadcast_to((last % state.block_size)[:, None], (len(slots), len(heads)))

  def attend(layer, q, k, v, kv):
    block = apart(state.tables[layer, slots, 0, last // state.block_size], ok, kv.shape[0] // len(heads))
    kv = kv_write(kv, k, v, block[:, None] * len(heads) + heads, offsets)
    out, *_ = paged_decode(q, kv, tables, lengths_of_heads, layer, scale=llama.config.head_dim**-0.5)
    return out, kv

  return state, ok, attend


@functools.partial(jax.jit, donate_argnames="state", compiler_options=steps.LOOP_OPTIONS)
def _decode_loop(
    model: FlatModel, state: CacheState, rows: Packed[steps.DecodeRows], num_steps: jax.Array
) -> tuple[steps.Decoded, CacheState]:
  """`steps.decode_loop` with shared tables."""
  llama = model.model()

  def decode(state, tokens, active):
    state, ok, attend = _decoding(state, llama, active)
    hidden, kv = llama(tokens, jnp.maximum(state.num_tokens - 1, 0), attend, state.kv)
    return llama.logits(hidden), ok, _with_pool(state, kv)

  return steps.run_loop(decode, state, rows.unpacked(), num_steps, llama.config.vocab_size)


def _with_pool(state: CacheState, kv: jax.Array) -> CacheState:
  return dataclasses.replace(state, kv=kv)


def _allocate(
    state: CacheState, slots: jax.Array, counts: jax.Array, most: int
) -> tuple[CacheState, jax.Array]:
  """`alloc.allocate` without scores, positions and queries; `most` blocks for each sequence at most."""
  old = state.lengths[:, slots]
  need = alloc.blocks_held(old + counts[:, None], state.block_size) - alloc.blocks_held(old, state.block_size)
  per_sequence = jnp.sum(need, axis=(0, 2))
  ok = (jnp.cumsum(per_sequence) <= state.free_count) | (per_sequence == 0)
  counts = jnp.where(ok, counts, 0)
  state = alloc.pop_blocks(state, slots, old, jnp.where(ok[:, None], need, 0), most)
  return dataclasses.replace(
      state, lengths=state.lengths.at[:, slots].add(counts[None, :, None]),
      num_tokens=state.num_tokens.at[slots].add(counts)), ok


if __name__ == "__main__":
  main()
