"""Times the engine on many prompts, with compression off and at several rates: the paper's experiment.

    python scripts/bench_throughput.py [--input 500 2000 6000] [--rate off 1 8 64] [--pool-gib 2.3]
        [--prompts 256] [--output 500] [--arrivals PER_SECOND] [--peer transformers] [--plot] [--out FOLDER]

The model has the shape of Llama-3.1-8B and random weights; prompts are random tokens. One row
per input length and rate: total tokens (prompts and outputs) per second, the largest batch,
and this over the ideal. Compression comes behind every chunk of a prompt and every 64 decode
steps, with no floor.

`ideal` is the time that the prompts' products take at the measured matrix rate, and the decode
steps' bytes at the measured read bandwidth: the weights once for each step of the largest batch
that the pool has room for, and each sequence's KVs once a step. Nothing overlaps in it and
nothing else takes time.

With --arrivals, requests come at random (Poisson) and rows have the time to first token and the time between
tokens, medians and 99th percentiles; tokens that come in one piece share its time.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import bench_common as common
import numpy as np

from kvc_jax.cache.state import CacheConfig
from kvc_jax.config import LlamaConfig
from kvc_jax.engine.engine import Engine
from kvc_jax.engine.request import SamplingParams, Update
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.model.llama import Llama, unstack_layers
from kvc_jax.tokenizer import Tokenizer

_INTERVAL = 64
_MOST_SLOTS = 256
_TOKENIZER = common.ROOT / "assets" / "stories260K"


def main() -> None:
  args = _arguments()
  bandwidth, matmul = common.read_bandwidth(args.probe_bytes), common.matmul_rate(args.probe_matrix)
  config = dataclasses.replace(common.llama_8b() if not args.tiny else _tiny(), max_position_embeddings=131_072)
  if args.layers:
    config = dataclasses.replace(config, num_layers=args.layers)
  rows: list[dict[str, Any]] = []
  if args.peer != "none":  # before our weights take the memory
    rows += _peer_rows(args, config)
  model = unstack_layers(common.random_model(config))
  for length in args.input:
    for rate in args.rate:
      point = Point(args, model, length, rate, bandwidth, matmul)
      rows.append(point.run())
      common.print_table(rows[-1:])
  _compare(rows)
  common.print_table(rows)
  common.write_results(
      "throughput", rows, folder=args.out, read_bandwidth=bandwidth, matmul_flops_per_second=matmul,
      prompts=args.prompts, output=args.output, pool_gib=args.pool_gib, layers=config.num_layers,
      arrivals_per_second=args.arrivals)
  if args.plot:
    _plot(rows, pathlib.Path(args.out) / "throughput.png")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--input", type=int, nargs="+", default=[500, 2000, 6000], help="tokens of a prompt")
  parser.add_argument("--rate", nargs="+", type=_rate, default=[None, 1, 2, 4, 8, 16, 32, 64], help="or 'off'")
  parser.add_argument("--prompts", type=int, default=256)
  parser.add_argument("--output", type=int, default=500, help="tokens to generate for each prompt")
  parser.add_argument("--pool-gib", type=float, default=2.3, help="what an L4 leaves beside the 8B's weights")
  parser.add_argument("--chunk-size", type=int, default=2048)
  parser.add_argument("--chunks-per-step", type=int, default=1)
  parser.add_argument("--steps-per-sync", type=int, default=16)
  parser.add_argument("--arrivals", type=float, help="requests per second; all at once by default")
  parser.add_argument("--layers", type=int, help="instead of the model's 32")
  parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
  parser.add_argument("--peer", choices=("none", "transformers"), default="none",
                      help="its continuous batching, in a process of its own (needs torch and a GPU)")
  parser.add_argument("--plot", action="store_true", help="draw throughput.png")
  parser.add_argument("--out", default=str(common.RESULTS), help="folder for throughput.json")
  args = parser.parse_args()
  args.probe_bytes, args.probe_matrix = (4 << 30, 8192) if not args.tiny else (16 << 20, 512)
  return args


def _rate(text: str) -> float | None:
  return None if text == "off" else float(text)


def _tiny() -> LlamaConfig:
  return dataclasses.replace(
      common.llama_8b(), vocab_size=1024, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4,
      num_kv_heads=2, head_dim=32)


# --------------------------------------------------------------------------- ours


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


@dataclasses.dataclass
class Point:
  """One input length and rate.

  Attributes:
    args: the command's.
    model: as the engine runs it.
    length: tokens of each prompt.
    rate: of compression; None for off.
    bandwidth, matmul: of the machine, bytes/s and FLOP/s.
  """

  args: argparse.Namespace
  model: Llama
  length: int
  rate: float | None
  bandwidth: float
  matmul: float

  def __post_init__(self):
    self.compression = None if self.rate is None else Compression(
        rate=self.rate, interval=_INTERVAL, prefill_interval=self.args.chunk_size)
    config = self.model.config
    self.cache = CacheConfig(
        num_layers=config.num_layers, num_slots=1, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        num_blocks=2, max_blocks_per_head=1, num_heads=config.num_heads, dtype=self.model.embed.embedding[...].dtype)
    self.num_blocks = int(self.args.pool_gib * 2**30) // self.cache.bytes_per_block
    self.batch = max(1, min(self.args.prompts, _MOST_SLOTS, int(self.num_blocks // self._blocks_held())))

  def _blocks_held(self) -> float:
    """Blocks of one sequence in the middle of its output."""
    return self.cache.blocks_for(math.ceil(self._tokens_held()))

  def _tokens_held(self) -> float:
    """KVs per head of one sequence, on the average over its output."""
    middle = self.length + self.args.output // 2
    if self.compression is None:
      return middle
    return self.compression.cache_tokens(middle) + _INTERVAL / 2

  def ideal_seconds(self) -> float:
    """What the machine's limits allow; see the top of this file."""
    config, args = self.model.config, self.args
    weights, head = common.parameter_bytes(self.model), config.vocab_size * config.hidden_size * 2
    flops = (weights - head) * self.length  # two for each bfloat16 weight and token; the head runs once a chunk
    flops += head * -(-self.length // args.chunk_size)
    flops += 2 * 2 * self.length**2 / 2 * config.num_layers * config.num_heads * config.head_dim
    kvs = 2 * config.head_dim * self.model.embed.embedding[...].dtype.itemsize * config.num_layers * config.num_kv_heads
    steps = math.ceil(args.prompts / self.batch) * args.output
    read = steps * weights + args.prompts * args.output * self._tokens_held() * kvs
    return args.prompts * flops / self.matmul + read / self.bandwidth

  def run(self) -> dict[str, Any]:
    """Serves all prompts once and returns the row."""
    args = self.args
    slots = min(_MOST_SLOTS, -(-self.batch * 5 // 4), args.prompts)
    engine = Engine(
        self.model, tokenizer=_EveryIdHasText.from_folder(_TOKENIZER), max_model_len=self.length + args.output,
        max_num_seqs=slots, chunk_size=min(args.chunk_size, self.length), num_blocks=self.num_blocks,
        chunks_per_step=args.chunks_per_step, steps_per_sync=args.steps_per_sync, rules=(WindowAttention(),))
    engine.warm_up()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, self.model.config.vocab_size, self.length).tolist() for _ in range(args.prompts)]
    served = _Served(engine, self.compression, args)
    served.serve(prompts)
    ideal, stats = self.ideal_seconds(), engine.stats()
    tokens = args.prompts * self.length + stats.generated_tokens
    assert stats.generated_tokens == args.prompts * args.output, "a request ended early: the ideal would flatter"
    engine.close()
    row = {
        "input": self.length, "engine": "kvc_jax", "rate": "off" if self.rate is None else self.rate,
        "tokens_per_second": tokens / served.seconds, "seconds": served.seconds, "largest_batch": served.largest_batch,
        "rate_reached": served.rate_reached, "ideal_batch": self.batch, "of_ideal": ideal / served.seconds,
        "preemptions": stats.preemptions, "compressions": stats.compressions}
    return row | (served.latencies() if args.arrivals else {})


class _Served:
  """One run of an engine over many prompts, and what was seen of it."""

  def __init__(self, engine: Engine, compression: Compression | None, args: argparse.Namespace):
    self.engine, self.compression, self.args = engine, compression, args
    self.seconds, self.largest_batch = 0.0, 0
    self._rates: list[float] = []
    self._arrived: dict[int, float] = {}
    self._times: dict[int, list[tuple[float, int]]] = collections.defaultdict(list)

  def serve(self, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=self.args.output, ignore_eos=True)
    waits = np.zeros(len(prompts))
    if self.args.arrivals:
      waits = np.random.default_rng(1).exponential(1 / self.args.arrivals, len(prompts)).cumsum()
    start, coming = time.perf_counter(), collections.deque(zip(waits, prompts, strict=True))
    while coming or self.engine.has_work:
      now = time.perf_counter() - start
      while coming and coming[0][0] <= now:
        at, prompt = coming.popleft()
        self._arrived[self.engine.add(prompt, params, self.compression)] = start + at
      if not self.engine.has_work:
        time.sleep(max(0.0, coming[0][0] - now))
        continue
      for update in self.engine.step():
        self._note(update)
      self.largest_batch = max(self.largest_batch, self.engine.stats().running)
    self.seconds = time.perf_counter() - start

  def _note(self, update: Update) -> None:
    self._times[update.request_id].append((time.perf_counter(), len(update.token_ids)))
    if update.output:
      self._rates.append(update.output.receipt.rate_reached)

  @property
  def rate_reached(self) -> float:
    """Blocks without compression over blocks held at the end, on the average over the requests."""
    return float(np.mean(self._rates))

  def latencies(self) -> dict[str, float]:
    """Milliseconds to the first token and between tokens."""
    first = [times[0][0] - self._arrived[request] for request, times in self._times.items()]
    between = [
        (now - before) / count for times in self._times.values()
        for (before, _), (now, count) in itertools.pairwise(times) for _ in range(count)]
    return {
        f"{name}_ms_p{percent}": 1e3 * float(np.percentile(values, percent))
        for name, values in (("first_token", first), ("between_tokens", between)) for percent in (50, 99)}


# --------------------------------------------------------------------------- peer


def _peer_rows(args: argparse.Namespace, config: LlamaConfig) -> list[dict[str, Any]]:
  """A row for each input length, from a process of its own; with the error where it failed."""
  rows = []
  for length in args.input:
    job = {"length": length, "output": args.output, "prompts": args.prompts, "pool_bytes": args.pool_gib * 2**30,
           "config": {
               "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
               "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
               "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
               "head_dim": config.head_dim, "tie_word_embeddings": False}}
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("peer_transformers.py"))], input=json.dumps(job),
        capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"input": length, "engine": "transformers generate_batch", "rate": "off"}
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if found:
      row |= json.loads(found[-1])
    else:
      row["error"] = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    rows.append(row)
  return rows


# --------------------------------------------------------------------------- results


def _compare(rows: list[dict[str, Any]]) -> None:
  """Adds each row's speed over our own with compression off, at the same input length."""
  off = {row["input"]: row["tokens_per_second"] for row in rows if row["engine"] == "kvc_jax" and row["rate"] == "off"}
  for row in rows:
    if row["input"] in off and "tokens_per_second" in row:
      row["over_off"] = row["tokens_per_second"] / off[row["input"]]


def _plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Throughput against the rate, a line for each input length; the peer's as dashes."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for length in dict.fromkeys(row["input"] for row in rows):
    ours = [row for row in rows if row["input"] == length and row["engine"] == "kvc_jax"]
    labels = [str(row["rate"]) for row in ours]
    (line,) = axes.plot(labels, [row["tokens_per_second"] for row in ours], marker="o", label=f"{length} tokens in")
    for row in rows:
      if row["input"] == length and row["engine"] != "kvc_jax" and "tokens_per_second" in row:
        axes.axhline(row["tokens_per_second"], linestyle="--", color=line.get_color())
  axes.set_xlabel("compression rate")
  axes.set_ylabel("tokens per second, in and out")
  axes.set_ylim(bottom=0)
  axes.legend()
  figure.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
