"""Times the engine on many prompts, with compression off and at several rates: the paper's experiment.

    python scripts/bench_throughput.py [--input 500 2000 6000] [--rate off 1 8 64] [--pool-gib 2.4]
        [--prompts 256] [--output 500] [--max-seconds S] [--arrivals PER_SECOND [--arrivals-rate off 8]]
        [--peer transformers] [--plot] [--out FOLDER]
    python scripts/bench_throughput.py --rows FILE ... --plot   # joins files of rows and draws; runs nothing

The model has the shape of Llama-3.1-8B and random weights; prompts are random tokens. One row
per input length and rate: total tokens (prompts and outputs) per second, the largest batch,
and this over the ideal. Compression comes behind every chunk of a prompt and every 64 decode
steps, with no floor. The JSON is written anew after every row.

`--max-seconds` ends a point early: no prompt joins after so many seconds, and those that run
come to their end. `seconds` is then that run, with its ramp-up and its drain, and for each prompt that did
not run the time between first tokens in steady state: the slope of their times
behind the first full batch. Rows name what was run (`prompts_run`, `seconds_run`).

`ideal` is the time that the prompts' products take at the measured matrix rate, and the decode
steps' roofline: bytes (the weights once for each step, each sequence's KVs once) at the measured read
bandwidth, or products at the matrix rate where those take longer. Its steps have the largest batch that the
pool has room for, next to the chunk of a prompt that is about to be compressed (`ideal_batch`), or the largest
that was reached. Nothing overlaps in it and nothing else takes time.

`of_sustained` is over the ideal of a matrix rate that the machine keeps up for seconds (power limits), not only for
the best moment: a run of a minute can have no other.

`prefill_s`, `decode_s` and `eviction_s` (scoring of prompts and evictions) are device time within `seconds_run`: one
engine step in 24, drawn at random, waits for the device before and behind each call; the mean time of a
chunk (with the decode step beside it), a decode step and an eviction call, times how many there were. `other_s` is
the rest: the host where the device waited for it, and swaps; it is below 0 where calls were hidden behind
others more than they were when timed. The waits cost about half a percent.

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
from collections.abc import Callable
from typing import Any

import bench_common as common
import jax
import numpy as np

from kvc_jax.cache.state import CacheConfig
from kvc_jax.config import LlamaConfig
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.engine import Engine
from kvc_jax.engine.request import SamplingParams, Update
from kvc_jax.eviction.compression import Compression
from kvc_jax.model.llama import Llama, unstack_layers

_INTERVAL = 64
_SLOTS = (8, 32, 128, 256)
_PLAN_AHEAD = 1.0  # all outputs have their full length
_SAMPLED = 1 / 24
_FEWEST_STEADY = 8


def main() -> None:
  args = _arguments()
  rows: list[dict[str, Any]] = [row for file in args.rows for row in json.loads(file.read_text())["rows"]]
  if not args.rows:
    _measure(args, rows)
  _compare(rows)
  common.print_table(rows)
  if args.plot:
    _plot(rows, pathlib.Path(args.out) / "throughput.png")


def _measure(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
  """Runs all points, and adds each row to `rows` and to the file as soon as it is there."""
  bandwidth, matmul = common.read_bandwidth(args.probe_bytes), common.matmul_rate(args.probe_matrix)
  sustained = common.sustained_matmul_rate(args.probe_matrix, args.probe_seconds)
  shape = common.llama_tiny() if args.tiny else common.llama_8b()
  config = dataclasses.replace(shape, max_position_embeddings=131_072)
  if args.layers:
    config = dataclasses.replace(config, num_layers=args.layers)

  def add(row: dict[str, Any]) -> None:
    rows.append(row)
    _compare(rows)
    common.print_table(rows[-1:])
    common.write_results(
        args.name, rows, folder=args.out, read_bandwidth=bandwidth, matmul_flops_per_second=matmul,
        sustained_matmul_flops_per_second=sustained,
        prompts=args.prompts, output=args.output, pool_gib=args.pool_gib, layers=config.num_layers,
        max_seconds=args.max_seconds, chunk_size=args.chunk_size, steps_per_sync=args.steps_per_sync)

  todo = [(length, rate, None) for length in args.input for rate in args.rate]
  todo += [(length, rate, args.arrivals) for length in args.input for rate in args.arrivals_rate if args.arrivals]
  model = unstack_layers(common.random_model(config)) if todo else None
  for length, rate, arrivals in todo:
    assert model is not None
    add(Point(args, model, length, rate, bandwidth, matmul, sustained, arrivals).run())
  if args.peer != "none":  # beside our weights: there is room for both on any GPU that this is for
    for length in args.input:
      add(_peer_row(args, config, length))


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--input", type=int, nargs="+", default=[500, 2000, 6000], help="tokens of a prompt")
  parser.add_argument("--rate", nargs="*", type=_rate, default=[None, 1, 2, 4, 8, 16, 32, 64], help="or 'off'")
  parser.add_argument("--prompts", type=int, default=256)
  parser.add_argument("--output", type=int, default=500, help="tokens to generate for each prompt")
  parser.add_argument("--pool-gib", type=float, default=2.4,
                      help="what an L4 leaves beside the 8B's weights: three whole sequences of 6,500 tokens, no more")
  parser.add_argument("--max-seconds", type=float, default=math.inf, help="of a point, until no prompt joins any more")
  parser.add_argument("--chunk-size", type=int, default=2048)
  parser.add_argument("--chunks-per-step", type=int, default=1)
  parser.add_argument("--steps-per-sync", type=int, default=32)
  parser.add_argument("--arrivals", type=float, help="requests per second of further points, for their latencies")
  parser.add_argument("--arrivals-rate", nargs="+", type=_rate, default=[None, 8], help="rates of those points")
  parser.add_argument("--layers", type=int, help="instead of the model's 32")
  parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
  parser.add_argument("--peer", choices=("none", "transformers"), default="none",
                      help="its continuous batching, in a process of its own (needs torch and a GPU)")
  parser.add_argument("--peer-prompts", type=int, default=12, help="prompts for the peer, which takes its time")
  parser.add_argument("--peer-seconds", type=float, default=300, help="after which the peer is given up")
  parser.add_argument("--rows", type=pathlib.Path, nargs="+", default=[], help="files to join instead of measuring")
  parser.add_argument("--name", default="throughput", help="of the JSON file")
  parser.add_argument("--plot", action="store_true", help="draw throughput.png")
  parser.add_argument("--out", default=str(common.RESULTS), help="folder for the JSON and the PNG")
  args = parser.parse_args()
  probes = (16 << 20, 512, 0.3) if args.tiny else (4 << 30, 8192, 6.0)
  args.probe_bytes, args.probe_matrix, args.probe_seconds = probes
  return args


def _rate(text: str) -> float | None:
  return None if text == "off" else float(text)


# --------------------------------------------------------------------------- ours


@dataclasses.dataclass
class Point:
  """One input length and rate.

  Attributes:
    args: the command's.
    model: as the engine runs it.
    length: tokens of each prompt.
    rate: of compression; None for off.
    bandwidth, matmul, sustained: of the machine, bytes/s and FLOP/s, at its best and for seconds.
    arrivals: requests per second; None for all at once.
  """

  args: argparse.Namespace
  model: Llama
  length: int
  rate: float | None
  bandwidth: float
  matmul: float
  sustained: float
  arrivals: float | None = None

  def __post_init__(self):
    self.compression = None if self.rate is None else Compression(
        rate=self.rate, interval=_INTERVAL, prefill_interval=self.args.chunk_size)
    config = self.model.config
    self.cache = CacheConfig(
        num_layers=config.num_layers, num_slots=1, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        num_blocks=2, max_blocks_per_head=1, num_heads=config.num_heads, dtype=self.model.embed.embedding[...].dtype)
    self.num_blocks = int(self.args.pool_gib * 2**30) // self.cache.bytes_per_block
    chunk = 0 if self.compression is None else self.cache.blocks_for(min(self.args.chunk_size, self.length))
    most = (self.num_blocks - 1 - chunk) // self._blocks_held()
    self.batch = max(1, min(self.args.prompts, _SLOTS[-1], most))
    # Few sizes, so that points share programs; a decode step reads the weights whatever the number of its rows.
    self.slots = next((slots for slots in _SLOTS if slots >= self.batch * 5 // 4), _SLOTS[-1])
    # As many chunks as with what was asked for, but all of one size: a shorter last one would be padded.
    self.chunk_size = -(-self.length // -(-self.length // min(self.args.chunk_size, self.length)))
    if self.compression is not None:
      self.compression = dataclasses.replace(self.compression, prefill_interval=self.chunk_size)


  def _blocks_held(self) -> int:
    """Blocks of one sequence in the middle of its output."""
    return self.cache.blocks_for(math.ceil(self._tokens_held()))

  def _tokens_held(self) -> float:
    """KVs per head of one sequence, on the average over its output."""
    middle = self.length + self.args.output // 2
    if self.compression is None:
      return middle
    return self.compression.cache_tokens(middle) + _INTERVAL / 2

  def ideal_seconds(self, matmul: float) -> float:
    """What the machine's limits allow, at a matrix rate; see the top of this file."""
    config, args = self.model.config, self.args
    weights, head = common.parameter_bytes(self.model), config.vocab_size * config.hidden_size * 2
    flops = (weights - head) * self.length  # two for each bfloat16 weight and token; the head runs once a chunk
    flops += head * -(-self.length // args.chunk_size)
    flops += 4 * self._pairs_attended() * config.num_layers * config.num_heads * config.head_dim
    kvs = 2 * config.head_dim * self.model.embed.embedding[...].dtype.itemsize * config.num_layers * config.num_kv_heads
    steps = math.ceil(args.prompts / self.batch) * args.output
    read = steps * weights + args.prompts * args.output * self._tokens_held() * kvs
    decode = max(read / self.bandwidth, args.prompts * args.output * weights / matmul)
    return args.prompts * flops / matmul + decode

  def _pairs_attended(self) -> float:
    """Pairs of a prompt's query and a key that is held, per head: what was evicted behind a chunk is not read again."""
    pairs, held = 0.0, 0
    for start in range(0, self.length, self.args.chunk_size):
      count = min(self.args.chunk_size, self.length - start)
      pairs += count * held + count**2 / 2
      held += count
      if self.compression is not None:
        held = min(held, self.compression.cache_tokens(self.length))
    return pairs

  def run(self) -> dict[str, Any]:
    """Serves the prompts once and returns the row."""
    args = self.args
    engine = Engine(
        self.model, tokenizer=common.endless_tokenizer(), max_model_len=self.length + args.output,
        max_num_seqs=self.slots, chunk_size=self.chunk_size, num_blocks=self.num_blocks,
        chunks_per_step=args.chunks_per_step, steps_per_sync=args.steps_per_sync, plan_ahead=_PLAN_AHEAD)
    start = time.perf_counter()
    engine.warm_up(kinds=[self.compression])
    warm_up = time.perf_counter() - start
    print(f"input {self.length}, rate {self.rate or 'off'}: compiled in {warm_up:.0f} s", file=sys.stderr, flush=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, self.model.config.vocab_size, self.length).tolist() for _ in range(args.prompts)]
    served = _Served(engine, self.compression, args, self.arrivals)
    served.serve(prompts)
    stats = engine.stats()
    self.batch = max(self.batch, served.largest_batch)
    assert stats.generated_tokens == served.prompts * args.output, "a request ended early: the ideal would flatter"
    engine.close()
    row = {
        "input": self.length, "engine": "kvc_jax", "rate": "off" if self.rate is None else self.rate,
        "tokens_of_chunk": self.chunk_size,
        "largest_batch": served.largest_batch, "rate_reached": served.rate_reached, "ideal_batch": self.batch,
        "preemptions": stats.preemptions, "compressions": stats.compressions, "prompts_run": served.prompts,
        "seconds_run": served.seconds, "warm_up_s": warm_up, **served.parts.seconds(served.seconds)}
    if self.arrivals:
      return row | {"arrivals_per_second": self.arrivals, **served.latencies()}
    seconds = served.seconds_for(args.prompts)
    return row | {"tokens_per_second": args.prompts * (self.length + args.output) / seconds, "seconds": seconds,
                  "of_ideal": self.ideal_seconds(self.matmul) / seconds,
            "of_sustained": self.ideal_seconds(self.sustained) / seconds}


class _Parts:
  """Device time by kind of work, from a sample of the engine's steps: see the top of this file."""

  def __init__(self, batch: Batch):
    self.sampling = False
    self._batch = batch
    self._units: collections.Counter[str] = collections.Counter()
    self._timed: collections.Counter[str] = collections.Counter()
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._wrap("mixed", "prefill", lambda args, result: 1)
    self._wrap("decode", "decode", lambda args, result: max(args[1]))  # steps: the longest of the limits
    self._wrap("score", "eviction, scores", lambda args, result: 1)
    self._wrap("compress", "eviction", lambda args, result: len(result))

  def _wrap(self, method: str, kind: str, units: Callable[[tuple, Any], int]) -> None:
    call = getattr(self._batch, method)

    def timed(*args):
      if not self.sampling:
        result = call(*args)
        self._units[kind] += units(args, result)
        return result
      jax.block_until_ready(self._batch.state)
      start = time.perf_counter()
      result = call(*args)
      jax.block_until_ready(self._batch.state)
      self._seconds[kind] += time.perf_counter() - start
      self._units[kind] += (count := units(args, result))
      self._timed[kind] += count
      return result

    setattr(self._batch, method, timed)

  def seconds(self, total: float) -> dict[str, float]:
    """Of each kind, and the rest of `total`."""
    means = {kind: self._seconds[kind] / count for kind, count in self._timed.items() if count}
    each = {kind: mean * self._units[kind] for kind, mean in means.items()}
    found = {"prefill_s": each.get("prefill", 0.0), "decode_s": each.get("decode", 0.0),
             "eviction_s": each.get("eviction", 0.0) + each.get("eviction, scores", 0.0)}
    return {**found, "other_s": total - sum(found.values()), "decode_step_ms": 1e3 * means.get("decode", math.nan),
            "chunk_ms": 1e3 * means.get("prefill", math.nan)}


class _Served:
  """One run of an engine over many prompts, and what was seen of it."""

  def __init__(
      self, engine: Engine, compression: Compression | None, args: argparse.Namespace, arrivals: float | None):
    self.engine, self.compression, self.args, self.arrivals = engine, compression, args, arrivals
    self.seconds, self.largest_batch, self.prompts = 0.0, 0, 0
    self.parts = _Parts(engine.batch)
    self._start = 0.0
    self._rates: list[float] = []
    self._arrived: dict[int, float] = {}
    self._times: dict[int, list[tuple[float, int]]] = collections.defaultdict(list)

  def serve(self, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=self.args.output, ignore_eos=True)
    waits = np.zeros(len(prompts))
    if self.arrivals:
      waits = np.random.default_rng(1).exponential(1 / self.arrivals, len(prompts)).cumsum()
    sample = np.random.default_rng(2)
    self._start, coming = time.perf_counter(), collections.deque(zip(waits, prompts, strict=True))
    while coming or self.engine.has_work:
      now = time.perf_counter() - self._start
      if now > self.args.max_seconds:
        coming.clear()
      # A queue of two is as good as one of all the others, and can end at any time.
      while coming and coming[0][0] <= now and (self.arrivals or self.engine.stats().waiting < 2):
        at, prompt = coming.popleft()
        self._arrived[self.engine.add(prompt, params, self.compression)] = self._start + at
      if not self.engine.has_work:
        time.sleep(max(0.0, min(coming[0][0], self.args.max_seconds) - now) if coming else 0.0)
        continue
      self.parts.sampling = bool(sample.random() < _SAMPLED)
      for update in self.engine.step():
        self._note(update)
      self.largest_batch = max(self.largest_batch, self.engine.stats().running)
    self.seconds, self.prompts = time.perf_counter() - self._start, len(self._arrived)

  def _note(self, update: Update) -> None:
    self._times[update.request_id].append((time.perf_counter(), len(update.token_ids)))
    if update.output:
      self._rates.append(update.output.receipt.rate_reached)

  def seconds_for(self, prompts: int) -> float:
    """Seconds for so many prompts: those that ran, and the rest at the rate of steady state."""
    first = np.sort([times[0][0] - self._start for times in self._times.values()])
    steady = np.arange(len(first)) >= self.largest_batch
    if steady.sum() >= _FEWEST_STEADY:
      each = float(np.polyfit(np.flatnonzero(steady), first[steady], 1)[0])
    else:
      each = self.seconds / self.prompts  # too few: ramp-up and drain count as if they came again and again
    return self.seconds + (prompts - self.prompts) * each

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


def _peer_row(args: argparse.Namespace, config: LlamaConfig, length: int) -> dict[str, Any]:
  """A row for one input length, from a process of its own; with the error where it failed."""
  job = {"length": length, "output": args.output, "prompts": min(args.prompts, args.peer_prompts),
         "pool_bytes": args.pool_gib * 2**30,
         "config": {
             "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
             "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
             "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
             "head_dim": config.head_dim, "tie_word_embeddings": False}}
  row: dict[str, Any] = {"input": length, "engine": "transformers generate_batch", "rate": "off"}
  try:
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("peer_transformers.py"))], input=json.dumps(job),
        capture_output=True, text=True, check=False, timeout=args.peer_seconds)
  except subprocess.TimeoutExpired:
    return row | {"error": f"not done after {args.peer_seconds:.0f} s"}
  found = [line for line in done.stdout.splitlines() if line.startswith("{")]
  if found:
    return row | json.loads(found[-1])
  print(done.stderr[-4000:], file=sys.stderr)
  return row | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}


# --------------------------------------------------------------------------- results


def _compare(rows: list[dict[str, Any]]) -> None:
  """Adds each row's speed over our own with compression off, at the same input length."""
  off = {row["input"]: row["tokens_per_second"] for row in rows
         if row["engine"] == "kvc_jax" and row["rate"] == "off" and "tokens_per_second" in row}
  for row in rows:
    if row["input"] in off and "tokens_per_second" in row:
      row["over_off"] = row["tokens_per_second"] / off[row["input"]]


def _plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Throughput against the rate, a line for each input length; the peer's as dashes."""
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError:
    print("no plot: matplotlib is not installed; --rows draws it elsewhere", file=sys.stderr)
    return

  figure = Figure(figsize=(7, 4.5), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for length in dict.fromkeys(row["input"] for row in rows if row["engine"] == "kvc_jax"):
    ours = [row for row in rows
            if row["input"] == length and row["engine"] == "kvc_jax" and "tokens_per_second" in row]
    ours.sort(key=lambda row: 0.0 if row["rate"] == "off" else row["rate"])
    labels = [row["rate"] if row["rate"] == "off" else f"{row['rate']:g}x" for row in ours]
    (line,) = axes.plot(labels, [row["tokens_per_second"] for row in ours], marker="o", label=f"{length} tokens in")
    for row in rows:
      if row["input"] == length and row["engine"] != "kvc_jax" and "tokens_per_second" in row:
        axes.axhline(
            row["tokens_per_second"], linestyle="--", color=line.get_color(), label=f"{row['engine']}, {length} in")
  axes.set_xlabel("compression rate")
  axes.set_ylabel("tokens per second, in and out")
  axes.set_ylim(bottom=0)
  axes.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
