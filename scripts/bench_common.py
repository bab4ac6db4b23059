"""What the benchmarks share: timing, the machine's own limits, shapes, caches, results as JSON.

Every benchmark times its subject and its peers in the same run, next to the read
bandwidth and the matrix-product rate that the same machine reaches in that run.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need memory of their own
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # bench_step's pool of 34 GiB wants one gap

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvc_jax.cache.state import CacheConfig, CacheState, init_cache
from kvc_jax.config import LlamaConfig, RopeConfig
from kvc_jax.engine.packed import Packed
from kvc_jax.engine.steps import DecodeRows, PromptChunk
from kvc_jax.model.llama import Llama
from kvc_jax.sampling import SamplingArrays
from kvc_jax.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

LAYERS_PER_STEP = 32
"""Layers of attention that are timed together, ours and the peers': as many as Llama-3.1-8B has."""

ROUND_SECONDS = 0.25
"""Of a round that is set beside times from events on the device: the host's part is then a few thousandths of it."""

# --------------------------------------------------------------------------- timing


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of one call: median, least and most over the rounds."""

  median: float
  least: float
  most: float

  def per(self, calls: int) -> "Timing":
    """The same for one of `calls` parts."""
    return Timing(self.median / calls, self.least / calls, self.most / calls)

  def row(self, prefix: str = "") -> dict[str, float]:
    """Microseconds, for a table."""
    return {f"{prefix}us{end}": 1e6 * getattr(self, name)
            for end, name in (("", "median"), ("_least", "least"), ("_most", "most"))}


def time_calls[State](
    step: Callable[[State], State], state: State, *, repeats: int = 20, rounds: int = 5, seconds: float = 0.0
) -> tuple[Timing, State]:
  """Times `step`, each call on what the last one gave, so that none can be hoisted or skipped.

  Args:
    step: jitted; it may donate its argument.
    state: the first argument; gone afterwards where `step` donates it.
    repeats: calls in a round, which ends in one wait.
    rounds: rounds, of which the median counts.
    seconds: that a round takes about, by more calls where `repeats` take less: what the host needs to start
      the first one and to see the end of the last is in the time.

  Returns:
    The time of a call, and the last state.
  """

  def time_round(calls: int) -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(calls):
      state = step(state)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / calls

  time_round(3)
  if seconds:
    repeats = max(repeats, math.ceil(seconds / time_round(repeats)))
  times = [time_round(repeats) for _ in range(rounds)]
  return Timing(statistics.median(times), min(times), max(times)), state


def read_bandwidth(size: int = 4 << 30) -> float:
  """Bytes/s at which XLA reduces an array of `size` bytes: the faster of a bfloat16 sum and an int32 maximum."""
  rates = []
  for dtype, reduce in ((jnp.bfloat16, jnp.sum), (jnp.int32, jnp.max)):
    x = jnp.ones((size // jnp.dtype(dtype).itemsize // 4096, 4096), dtype)
    run = jax.jit(lambda x, _, reduce=reduce: reduce(x))
    timing, _ = time_calls(lambda last, x=x, run=run: run(x, last), jnp.zeros((), dtype), seconds=ROUND_SECONDS)
    rates.append(size / timing.median)
    x.delete()
  return max(rates)


def matmul_rate(n: int = 8192) -> float:
  """FLOP/s of a bfloat16 product of two random [n, n] matrices, in the best round: power limits slow later ones."""
  x, w = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
  w = w * n**-0.5  # keeps the size of the numbers from call to call
  timing, _ = time_calls(jax.jit(lambda x: x @ w), x)
  return 2 * n**3 / timing.least


def sustained_matmul_rate(n: int = 8192, seconds: float = 6.0) -> float:
  """FLOP/s of the product of `matmul_rate` in the last third of so many seconds, when power limits have set in."""
  x, w = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
  product, calls = jax.jit(lambda x: x @ w), 16
  found = jax.block_until_ready(product(x))
  start, times = time.perf_counter(), [time.perf_counter()]
  while times[-1] - start < seconds:
    for _ in range(calls):
      found = product(x)  # of the same numbers: thousands of products of products end in zeros, which take less power
    jax.block_until_ready(found)
    times.append(time.perf_counter())
  last = [at for at in times if at - start >= seconds * 2 / 3]
  return 2 * n**3 * calls * (len(last) - 1) / (last[-1] - last[0]) if len(last) > 1 else math.nan


# --------------------------------------------------------------------------- results


def machine() -> dict[str, Any]:
  """What the figures hold for: GPU, driver, versions, date, commit."""
  device = jax.devices()[0]
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  return {
      "gpu": device.device_kind,
      "compute_capability": getattr(device, "compute_capability", None),
      "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
      "python": platform.python_version(),
      **versions,
      "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
      # "-dirty" where files differ from the commit; KVC_COMMIT where the checkout has no history.
      "commit": os.environ.get("KVC_COMMIT") or _output(
          "git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"),
  }


def _output(*command: str) -> str | None:
  """First line that a command prints; None where it cannot run."""
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def write_results(
    name: str, rows: Sequence[Mapping[str, Any]], *, folder: str | pathlib.Path = RESULTS, **facts: Any
) -> pathlib.Path:
  """Writes `folder`/`name`.json: the machine, `facts` (such as read_bandwidth) and the rows."""
  path = pathlib.Path(folder) / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  record = {"name": name, "machine": machine(), **facts, "rows": [dict(row) for row in rows]}
  path.write_text(json.dumps(_rounded(record), indent=1) + "\n", encoding="utf-8")
  return path


def _rounded(value: Any) -> Any:
  """Floats to five digits: more is noise and makes diffs long."""
  if isinstance(value, dict):
    return {key: _rounded(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_rounded(item) for item in value]
  if isinstance(value, (float, np.floating)):
    return float(f"{value:.5g}") if math.isfinite(value) else None
  return value


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
  """One line a row; columns in the order of first appearance."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for line in cells:
    print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


# --------------------------------------------------------------------------- shapes and caches


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
  """A batch that decodes; letters as in docs/architecture.md.

  Attributes:
    seqs: S.
    kv_heads: H.
    group: G.
    head_dim: D.
    block_size: P.
    low, high: KVs that a head holds, at least and at most.
    ragged_by: "sequence": evenly between low and high, the same in all heads;
      "head": each head its own, evenly in the logarithm; None: all `high`.
  """

  seqs: int = 64
  kv_heads: int = 8
  group: int = 4
  head_dim: int = 128
  block_size: int = 16
  low: int = 0
  high: int
  ragged_by: Literal["sequence", "head"] | None = None

  def lengths(self, layers: int, seed: int = 0) -> np.ndarray:
    """KVs of each head, i32 [L, S, H]."""
    rng, shape = np.random.default_rng(seed), (layers, self.seqs, self.kv_heads)
    if self.ragged_by == "head":
      return np.exp(rng.uniform(np.log(self.low), np.log(self.high), shape)).astype(np.int32)
    low = self.low if self.ragged_by == "sequence" else self.high
    per_sequence = rng.integers(low, self.high + 1, self.seqs).astype(np.int32)
    return np.broadcast_to(per_sequence[None, :, None], shape).copy()


DECODE_SHAPES = {
    "uniform-4k": DecodeShape(high=4096),
    "uniform-8k": DecodeShape(high=8192),
    "ragged-by-sequence-2k-16k": DecodeShape(low=2048, high=16384, ragged_by="sequence"),
    "ragged-by-head-64-16k": DecodeShape(low=64, high=16384, ragged_by="head"),
    "8-sequences-8k": DecodeShape(seqs=8, high=8192),
    "group-8-4k": DecodeShape(group=8, high=4096),
    "group-1-2k": DecodeShape(kv_heads=32, group=1, high=2048),
}
"""Shapes that benchmarks and docs/performance.md name."""


Order = Literal["shuffled", "in order", "served"]
"""Of blocks in the pool: at random; as a fresh pool hands them out; or as a pool in use does, see `order_of_blocks`."""


def order_of_blocks(blocks: np.ndarray, spare: int, order: Order, rng: np.random.Generator) -> np.ndarray:
  """Ids of the blocks that heads hold, in the order of (layer, sequence, head, block), then the spare ones.

  "served" is what is left by a pool that has been in use with nothing compressed: each sequence has given way
  to another three times, in random order, and the others were shorter. Prompts, seven eighths of a sequence, take
  128 blocks at once (2048 tokens at P = 16), head by head; then all sequences decode, each head taking one in turn.

  Args:
    blocks: [L, S, H] blocks of each head; for "served" the same in all layers and heads of a sequence.
    spare: free blocks.
    order: see `Order`.
    rng: what is random.

  Returns:
    i32 [blocks.sum() + spare], from 0.
  """
  every = int(blocks.sum()) + spare
  if order != "served":
    return (rng.permutation(every) if order == "shuffled" else np.arange(every)).astype(np.int32)
  layers, seqs, heads = blocks.shape
  assert (blocks == blocks[:1, :, :1]).all(), "heads that differ were compressed"
  free = np.arange(every, dtype=np.int32)[::-1]  # a stack, its top at the end
  held = [np.zeros((layers, heads, 0), np.int32) for _ in range(seqs)]

  def take(seq: int, count: int) -> None:
    nonlocal free
    taken = free[len(free) - count * layers * heads :][::-1].reshape(layers, heads, count)
    free = free[: len(free) - taken.size]
    held[seq] = np.concatenate([held[seq], taken], axis=2)

  for turn in range(4):
    wanted = blocks[0, :, 0] if turn == 3 else (blocks[0, :, 0] * rng.uniform(0.3, 1, seqs)).astype(int)
    prompts = wanted * 7 // 8
    for seq in rng.permutation(seqs):
      free = np.concatenate([free, held[seq].reshape(-1)])
      held[seq] = held[seq][..., :0]
      for begin in range(0, prompts[seq], 128):
        take(seq, min(128, prompts[seq] - begin))
    for step in range((wanted - prompts).max(initial=0)):
      for seq in range(seqs):
        if step < wanted[seq] - prompts[seq]:
          take(seq, 1)
  rows = [held[seq][layer, head] for layer in range(layers) for seq in range(seqs) for head in range(heads)]
  return np.concatenate([*rows, free])


def make_cache(
    lengths: np.ndarray, *, head_dim: int = 128, block_size: int = 16, dtype: jax.typing.DTypeLike = jnp.bfloat16,
    spare_blocks: int = 0, max_blocks_per_head: int | None = None, num_heads: int | None = None,
    order: Order = "shuffled", seed: int = 0,
) -> CacheState:
  """A cache that holds `lengths` KVs [L, S, H].

  Args:
    lengths: i32 [L, S, H].
    head_dim: D.
    block_size: P.
    dtype: of the pool.
    spare_blocks: free blocks besides those that are held.
    max_blocks_per_head: M; by default what the longest head needs.
    num_heads: query heads, for decode steps that score.
    order: of the blocks. "served" wants the same lengths in all layers and heads of a sequence.
    seed: of block ids and values.
  """
  rng = np.random.default_rng(seed)
  layers, slots, kv_heads = lengths.shape
  blocks = -(-lengths // block_size)
  total = int(blocks.sum())
  config = CacheConfig(
      num_layers=layers, num_slots=slots, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size,
      num_blocks=1 + total + spare_blocks, max_blocks_per_head=max_blocks_per_head or int(blocks.max()), dtype=dtype,
      num_heads=num_heads)
  ids = order_of_blocks(blocks, spare_blocks, order, rng) + 1
  tables = np.zeros((*lengths.shape, config.max_blocks_per_head), np.int32)
  tables[np.arange(config.max_blocks_per_head) < blocks[..., None]] = ids[:total]
  positions = np.zeros((config.num_blocks, block_size), np.int32)
  columns = np.arange(config.max_blocks_per_head, dtype=np.int32)[:, None] * block_size
  positions[tables] = columns + np.arange(block_size, dtype=np.int32)
  free_ids = np.zeros(config.num_blocks, np.int32)
  free_ids[:spare_blocks] = ids[total:]
  empty = jax.eval_shape(lambda: init_cache(config))  # the pool is built once, below
  others = {} if num_heads is None else {
      "queries": jax.random.normal(jax.random.key(seed), empty.queries.shape, empty.queries.dtype),
      # About that of random queries over all keys, so that probabilities are probabilities.
      "log_sums": jnp.full(empty.log_sums.shape, 0.5 + math.log(lengths.mean()), jnp.float32)}
  if empty.kv_scales is not None:
    others["kv_scales"] = jnp.ones(empty.kv_scales.shape, jnp.float32)
  return dataclasses.replace(
      empty, **others, kv=_random_pool(empty.kv, seed),
      scores=jax.random.uniform(jax.random.key(seed), empty.scores.shape),
      positions=jnp.asarray(positions), tables=jnp.asarray(tables), lengths=jnp.asarray(lengths, jnp.int32),
      num_tokens=jnp.asarray(lengths.max((0, 2)), jnp.int32), free_ids=jnp.asarray(free_ids),
      free_count=jnp.asarray(spare_blocks, jnp.int32))


def _random_pool(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
  """Normal numbers, a few MiB of them over and over: timing needs no more, and memory is short."""
  num_blocks, *block = shape.shape
  some = min(num_blocks, 4096)

  @jax.jit
  def build() -> jax.Array:
    part = jax.random.normal(jax.random.key(seed), (some, *block), jnp.float32).astype(shape.dtype)
    return jnp.tile(part, (-(-num_blocks // some), 1, 1, 1))[:num_blocks]

  return build()


def kv_bytes(state: CacheState) -> float:
  """Bytes of the KVs held in one layer, on average over the layers."""
  head_dim = state.kv.shape[-1]
  return int(np.asarray(state.lengths).sum()) * 2 * head_dim * state.kv.dtype.itemsize / state.num_layers


def prompt_chunk(tokens: np.ndarray, slot: int, count: int) -> Packed[PromptChunk]:
  """A piece of a prompt, i32 [T], of which `count` are real, as the engine gives it; greedy."""
  arrays: list[Any] = [tokens, np.int32(slot), np.int32(count), _greedy(1), np.zeros(1, bool)]
  return Packed.of(PromptChunk(*arrays))


def decode_rows(limits: np.ndarray, most: int) -> Packed[DecodeRows]:
  """Decode steps as the engine asks for them: `limits` i32 [S], each `most` or less; greedy, without stop ids."""
  slots = len(limits)
  arrays: list[Any] = [
      np.zeros(slots, np.int32), limits, np.full((slots, most), -1, np.int32), np.full((slots, 16), -1, np.int32),
      _greedy(slots), np.zeros(slots, bool)]
  return Packed.of(DecodeRows(*arrays))


def _greedy(rows: int) -> SamplingArrays:
  zeros: Any = np.zeros(rows, np.int32)
  floats: list[Any] = [np.full(rows, value, np.float32) for value in (0.0, 1.0, 0.0)]
  return SamplingArrays(floats[0], zeros, floats[1], floats[2], zeros.astype(np.uint32), zeros)


def llama_8b() -> LlamaConfig:
  """The shape of Llama-3.1-8B."""
  rope = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0)
  return LlamaConfig(
      vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
      head_dim=128, rms_norm_eps=1e-5, rope=rope, max_position_embeddings=131_072)


def llama_tiny() -> LlamaConfig:
  """A tiny model, to try a script on a CPU."""
  return dataclasses.replace(
      llama_8b(), vocab_size=1024, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4,
      num_kv_heads=2, head_dim=32)


def random_model(config: LlamaConfig, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Llama:
  """A model with random weights, made on the device without a copy on the host."""
  return nnx.jit(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))()


def parameter_bytes(model: Llama) -> int:
  """Bytes that one decode step reads of the parameters: all but the embedding, of which it reads a few rows."""
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
  return total if model.lm_head is None else total - model.embed.embedding[...].nbytes


class _EveryIdHasText(Tokenizer):
  """The shipped model's pieces over and over: updates come with text, and it is they that are timed."""

  def token(self, token_id: int) -> str | None:
    return super().token(_piece(token_id))

  def is_special(self, token_id: int) -> bool:
    return super().is_special(_piece(token_id))

  def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    return super().decode([_piece(token_id) for token_id in ids], skip_special_tokens)


def _piece(token_id: int) -> int:
  return 300 + token_id % 200  # behind the special tokens and the bytes


def endless_tokenizer() -> Tokenizer:
  """For a model of any vocabulary: all ids have text."""
  return _EveryIdHasText.from_folder(ROOT / "assets" / "stories260K")
