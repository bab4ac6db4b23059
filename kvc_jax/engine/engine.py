"""`Engine`: requests join and leave one running batch at any step."""

import collections
import dataclasses
import itertools
import logging
import os
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import tqdm
from jax.typing import DTypeLike

from kvc_jax.cache.quantize import FP8
from kvc_jax.cache.sequence_file import load_sequence, save_sequence
from kvc_jax.cache.snapshot import check_fits
from kvc_jax.checkpoint.store import load_model
from kvc_jax.config import LlamaConfig
from kvc_jax.engine import footprint, saved
from kvc_jax.engine.batch import Batch, decode_rule, ride_rule
from kvc_jax.engine.checks import check_profile, check_types, prompt_ids
from kvc_jax.engine.flight import SYNC_STEPS, Dispatched, First, Flight, row_of, token_logprobs, worthwhile_steps
from kvc_jax.engine.kinds import kind_of, kinds_of, smallest_of
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.pool import calibrated_scales, check_sizes, context_length, pool_config
from kvc_jax.engine.prefix_cache import PrefixCache
from kvc_jax.engine.request import EngineStats, FinishReason, SamplingParams, Update
from kvc_jax.engine.scheduler import Scheduler
from kvc_jax.engine.sequence import Sequence
from kvc_jax.engine.steps import Usage
from kvc_jax.errors import InputError, QueueFull, check_count, check_real
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score import ScoringRule, check_rule
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.shares import Allocation
from kvc_jax.kernels import backends
from kvc_jax.model.fingerprint import fingerprint
from kvc_jax.model.layers import DecoderLayer
from kvc_jax.model.llama import Llama, unstack_layers
from kvc_jax.tokenizer import IncrementalDecoder, Tokenizer

_log = logging.getLogger(__name__)


class Engine:
  """Continuous batching on one cache. Not thread-safe: one thread calls it.

  Each step runs at most `chunks_per_step` prompt chunks and, for all sequences that
  decode, up to `steps_per_sync` tokens; a prompt never holds up the others for longer
  than its chunk. A request's text depends on the request and the pool's size, not on
  what else is served (`Compression.on_demand` gives that up, and rounding may, where logits
  nearly tie: of a GPU's sums, or in 16 bits, of products with a prompt's chunk beside or without).

  Attributes:
    tokenizer: of the model folder.
    max_model_len: most tokens of prompt and output together.
    config: shape of the cache.
    model: the model.
    fingerprint: of the model, which saved requests bear; None of a model that was given with its layers apart.
    batch: the cache, and the transitions on it.
  """

  def __init__(
      self,
      model: str | pathlib.Path | Llama,
      *,
      tokenizer: Tokenizer | None = None,
      dtype: DTypeLike | None = None,
      kv_cache_dtype: str = "auto",
      max_model_len: int | None = None,
      max_num_seqs: int = 8,
      block_size: int = 16,
      chunk_size: int = 256,
      num_blocks: int | None = None,
      kv_cache_memory_bytes: int | None = None,
      seed: int = 0,
      max_waiting: int | None = None,
      steps_per_sync: int = 8,
      chunks_per_step: int = 1,
      swap_bytes: int = 4 << 30,
      plan_ahead: float = 0.0,
      rules: tuple[ScoringRule, ...] = (WindowAttention(),),
      allocations: tuple[Allocation, ...] = ("all",),
      prefix_caching: bool = False,
      prefix_interval: int = 256,
      compilation_cache_dir: str | pathlib.Path | None = None,
      progress: bool = False,
  ):
    """Loads a model and allocates the pool.

    Args:
      model: folder of a Hugging Face or converted checkpoint; or a model that is loaded
        already, which comes with its tokenizer and is used as it is (on a GPU give what
        `unstack_layers` returns).
      tokenizer: by default that of the folder.
      dtype: of weights and cache; the checkpoint's own by default.
      kv_cache_dtype: "auto" for that of the weights, or "fp8" (e4m3, a scale per
        head): half the bytes of bfloat16 per KV.
      max_model_len: the model's own context by default, and at most that.
      max_num_seqs: S, sequences that run at once.
      block_size: P, KVs in a block; a power of two.
      chunk_size: tokens of a prefill chunk.
      num_blocks: size of the pool, with the null block.
      kv_cache_memory_bytes: size of the pool, where num_blocks is not given. By
        default what max_num_seqs full sequences need, but at most 90% of the
        device's free memory (1 GiB on the CPU).
      seed: of requests that bring none.
      max_waiting: sequences that may wait beside those that free slots are there for; None
        for any number.
      steps_per_sync: K, most decode steps between two looks at their results. More
        make the host's part smaller, and stop strings and new requests later.
      chunks_per_step: prompt chunks between decode steps.
      swap_bytes: host memory for sequences that gave way; beyond it they start over.
      plan_ahead: start a request only where all that run have blocks for this share, 0 to 1, of the
        tokens that their max_tokens leaves them. At 1 hardly anybody gives way; where most end long
        before max_tokens, fewer run than could.
      rules: scoring rules that `warm_up` compiles for; a request with another one
        compiles it when it comes.
      allocations: likewise.
      prefix_caching: keep the KVs of prompts for later ones that begin alike, as long as
        nobody needs their blocks (engine/prefix_cache.py).
      prefix_interval: cached prefixes end at multiples of so many tokens.
      compilation_cache_dir: folder of JAX's persistent compilation cache, for the
        whole process; None leaves it as it is.
      progress: show a progress bar while loading, where stderr is a terminal.

    Raises:
      InputError: a missing or broken model folder, or sizes that do not fit.
    """
    check_sizes(block_size, chunk_size, max_num_seqs, kv_cache_dtype)
    check_count("Engine: steps_per_sync", steps_per_sync, at_least=1, at_most=1024)
    check_count("Engine: chunks_per_step", chunks_per_step, at_least=1)
    check_count("Engine: swap_bytes", swap_bytes, at_least=0, at_most=2**60)
    check_real("Engine: plan_ahead", plan_ahead, at_least=0, hint="a share from 0 to 1")
    if plan_ahead > 1:
      raise InputError(f"Engine: plan_ahead is {plan_ahead!r}; give a share from 0 to 1")
    check_count("Engine: seed", seed, at_least=0)
    for rule in rules:
      check_rule(rule)
    check_count("Engine: prefix_interval", prefix_interval, at_least=1)
    if max_waiting is not None:
      check_count("Engine: max_waiting", max_waiting, at_least=0)
    if compilation_cache_dir is not None:
      jax.config.update("jax_compilation_cache_dir", os.fspath(compilation_cache_dir))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if isinstance(model, Llama):
      if tokenizer is None:
        raise InputError(
            "a model that is loaded already comes without a tokenizer; give tokenizer=Tokenizer.from_folder(FOLDER)")
      shape, self.tokenizer, self.model = model.config, tokenizer, model
    else:
      shape = LlamaConfig.from_folder(model)
      self.tokenizer = tokenizer or Tokenizer.from_folder(model)
      self.model = load_model(model, dtype=dtype, progress=progress)
    self.fingerprint = fingerprint(self.model) if isinstance(self.model.layers, DecoderLayer) else None
    if self.model is not model and backends.device_capability() is not None:
      self.model = unstack_layers(self.model)
    self.max_model_len = context_length(max_model_len, shape.max_position_embeddings)
    self.config = pool_config(
        self.model, self.max_model_len, max_num_seqs, block_size, num_blocks, kv_cache_memory_bytes,
        FP8 if kv_cache_dtype == "fp8" else self.model.embed.embedding[...].dtype, prefix_caching)
    scales = calibrated_scales(self.model, self.max_model_len) if kv_cache_dtype == "fp8" else None
    self.batch = Batch(self.model, self.config, min(chunk_size, self.max_model_len), scales, steps_per_sync)
    self._eos_ids = self.tokenizer.eos_ids | frozenset(shape.eos_token_ids)
    self._seeds = np.random.SeedSequence(seed)
    self._ids, self._orders = itertools.count(), itertools.count()
    self._max_waiting, self._chunks_per_step, self._swap_bytes = max_waiting, chunks_per_step, swap_bytes
    self._rules, self._allocations = rules, allocations
    self._compiled: set[tuple[Any, ...]] | None = None  # until warm_up
    self._counts: collections.Counter[str] = collections.Counter()
    self._prefix_interval, self._plan_ahead = prefix_interval, plan_ahead
    self._start_empty()

  def _start_empty(self) -> None:
    self._scheduler = Scheduler(self.config, self._plan_ahead)
    self._requests: dict[int, list[Sequence]] = {}
    self._flight: Flight | None = None  # what is being dispatched
    self._sealed: Flight | None = None  # what was dispatched before that, and not read yet
    self._chunks_ahead = 0  # prompt chunks of the next step that were dispatched already
    self._newest: Dispatched | None = None  # decode steps that those to come can go on from, unread
    self._decoded_ahead = False  # decode steps of the next step were dispatched already
    self._riding: set[ScoringRule | None] = set()  # decode rules of those that go beside a chunk of this step
    self._news: list[Sequence] = []  # those that the next updates are about, in the order in which they got there
    self._stalled = False  # a sequence got no block, and none has come back since
    self._prefixes = PrefixCache(self._prefix_interval, self.batch.drop) if self.config.sharing else None
    self._free_now = self._scheduler.free_blocks  # a lower bound of what is really free, beside cached prefixes
    self._lengths: jax.Array | None = None  # i32 [L, S, H], when results were last read

  def reset(self) -> None:
    """Drops all requests and empties the cache, whatever state an exception may have left it in."""
    self.batch.reset()
    self._start_empty()

  def close(self) -> None:
    """Frees the cache's memory; the engine is of no use afterwards."""
    self.batch.free()

  # ------------------------------------------------------------------------- requests

  def encode(self, prompt: str | list[int], name: str = "the prompt") -> list[int]:
    """Token ids of a prompt, checked.

    Raises:
      InputError: it is empty, too long, or out of the vocabulary; `name` stands for it in the message.
    """
    return prompt_ids(self.tokenizer, prompt, name, vocab_size=self.model.config.vocab_size,
                      max_model_len=self.max_model_len)

  def check_fits(self, name: str, prompt_tokens: int, compression: Compression | None) -> None:
    """Raises InputError where the pool is too small for a request even when nothing else runs."""
    footprint.prefill_interval(self.config, name, prompt_tokens, compression)
    check_profile(self.config, compression)

  def add(
      self, prompt: str | list[int], params: SamplingParams | None = None, compression: Compression | None = None,
      *, return_positions: bool = False,
  ) -> int:
    """Takes a request; it waits until `step` starts it.

    Args:
      prompt: text or token ids.
      params: how to sample; by default as `SamplingParams()`.
      compression: None holds every KV.
      return_positions: put the positions of the KVs held at the end into the receipt.

    Returns:
      The request's id, which its updates bear.

    Raises:
      InputError: the prompt is empty, too long, out of the vocabulary, or too large
        for the whole pool.
      QueueFull: more than `max_waiting` sequences would wait.
    """
    params = SamplingParams() if params is None else params
    check_types(params, compression)
    ids = self.encode(prompt)
    interval = footprint.prefill_interval(self.config, "the prompt", len(ids), compression)
    check_profile(self.config, compression)
    self._check_queue(params.n)
    self._notice(compression)
    if params.seed is None:  # another one for every request that this engine ever serves
      params = dataclasses.replace(params, seed=int(self._seeds.spawn(1)[0].generate_state(1)[0]))
    request_id = next(self._ids)
    sequences = [
        self._sequence(
            request_id, ids, params, compression, sample=sample, interval=interval, positions=return_positions)
        for sample in range(params.n)]
    self._requests[request_id] = sequences
    self._scheduler.waiting.extend(sequences)
    return request_id

  def _notice(self, compression: Compression | None) -> None:
    """Says in a line that a request of a kind that `warm_up` does not know will make the engine compile."""
    if compression is None or self._compiled is None:
      return
    if (kind := kind_of(compression)) not in self._compiled:
      self._compiled.add(kind)
      what, remedy = ("", "them to Engine") if compression.mass is None else ("and mass ", "such a request to warm_up")
      _log.warning("steps for %r with allocation %r %scompile while serving; give %s",
                   compression.scoring, compression.allocation, what, remedy)

  def _sequence(
      self, request_id: int, ids: list[int], params: SamplingParams, compression: Compression | None, *, sample: int,
      interval: int | None, positions: bool,
  ) -> Sequence:
    if sample:
      params = dataclasses.replace(
          params, seed=int(np.random.SeedSequence((params.seed or 0, sample)).generate_state(1)[0]))
    decoder = IncrementalDecoder(self.tokenizer, skip_special_tokens=params.skip_special_tokens, context=ids)
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
    return Sequence(
        request_id=request_id, sample=sample, order=next(self._orders), prompt=ids, params=params,
        compression=compression, prefill_interval=interval, stop_ids=stop_ids, positions=positions,
        output=OutputText(decoder, params.stop_strings))

  def _check_queue(self, more: int) -> None:
    free = self.config.num_slots - len(self._scheduler.running)
    waiting = len(self._scheduler.waiting)
    if self._max_waiting is not None and waiting + more > self._max_waiting + free:
      raise QueueFull(f"{waiting} sequences wait for {free} free slots and {self._max_waiting} may wait beside them; "
                      "try again later")

  def cancel(self, request_id: int) -> bool:
    """Ends a request without a further update; its slots and blocks are free at once.

    Waits for what is in flight.

    Returns:
      False where the request is unknown or has ended.
    """
    if request_id not in self._requests:
      return False
    self._collect()
    for sequence in self._requests.pop(request_id):
      if sequence.slot >= 0:
        self.batch.release(sequence)
        self._stalled = False
      self._scheduler.end(sequence)
      self._news = [s for s in self._news if s is not sequence]
      self._counts["cancelled"] += sequence.receipt is None
    return True

  def save(self, request_id: int, path: str | pathlib.Path, *, sample: int = 0) -> None:
    """Writes a request's compressed cache, and all else that it takes to go on with it, to a safetensors file.

    The request itself goes on; `cancel` ends it. Waits for what is in flight.

    Args:
      request_id: as `add` gave it.
      path: file to write.
      sample: which of the request's samples.

    Raises:
      InputError: the request is unknown, has ended or is still in its prompt, scores by
        a rule of one's own, or the file cannot be written.
    """
    self._collect()
    sequence = next((s for s in self._requests.get(request_id, ()) if s.sample == sample), None)
    if sequence is None or sequence.finish_reason:
      raise InputError(f"request {request_id} is unknown or has ended; save one that is being served")
    if not sequence.decodes or (sequence.slot < 0 and sequence.snapshot is None):
      raise InputError(f"request {request_id} is not past its prompt; save it when its first update has come")
    if sequence.is_due and sequence.slot >= 0:
      self._compress([sequence])
      self._collect()
    snapshot = sequence.snapshot or self.batch.snapshot(sequence)
    save_sequence(path, snapshot, token_ids=sequence.prompt + sequence.token_ids, model=self._name_of_model(),
                  settings=saved.settings_of(sequence))

  def _name_of_model(self) -> str:
    if self.fingerprint is None:
      raise InputError("requests are saved under their model's fingerprint, which one with its layers apart has not; "
                       "give Engine the model's folder")
    return self.fingerprint

  def resume(self, path: str | pathlib.Path) -> int:
    """Takes up a request that `save` wrote, here or in another process.

    Updates bring what none had brought when it was saved; the last one has the whole output.

    Returns:
      The request's id.

    Raises:
      InputError: the file is missing, damaged or of another model, or does not fit this
        engine's cache or context.
      QueueFull: more than `max_waiting` sequences would wait.
    """
    file = load_sequence(path, model=self._name_of_model())
    check_fits(self.batch.state, file.snapshot)
    request = saved.request_of(file)
    if len(file.token_ids) >= self.max_model_len:
      raise InputError(f"{path} holds {len(file.token_ids)} tokens, but the context is {self.max_model_len}; "
                       "raise max_model_len")
    needed, pool = file.snapshot.blocks(self.config.block_size), self.config.num_blocks - 1
    if needed + self.config.heads_per_sequence > pool:
      raise InputError(f"{path} needs {needed} blocks and one for each head, but the pool has {pool}; raise num_blocks "
                       "or kv_cache_memory_bytes")
    self._check_queue(1)
    request_id = next(self._ids)
    sequence = self._sequence(
        request_id, request.prompt, request.params, request.compression, sample=0,
        interval=request.prefill_interval, positions=request.positions)
    sequence.go_on_from(request.token_ids, request.tokens_given)
    sequence.prefilled, sequence.snapshot, sequence.logprobs = len(request.prompt), file.snapshot, request.logprobs
    for name, count in request.progress.items():
      setattr(sequence, name, count)
    self._requests[request_id] = [sequence]
    self._scheduler.waiting.append(sequence)
    self._news.append(sequence)
    return request_id

  @property
  def has_work(self) -> bool:
    """Whether a request has updates to come."""
    return bool(self._requests)

  # ----------------------------------------------------------------------------- step

  def step(self) -> list[Update]:
    """Carries all requests on, and returns what is new since the last step.

    Results are read, the next work is chosen and dispatched, and while the device
    runs it the tokens that were read become text. So updates come one step after
    their tokens were drawn. Where it raises, the cache may be lost: call `reset`.
    """
    self._schedule()
    self._run()
    return self._postprocess()

  def _schedule(self) -> None:
    """Reads results, lets go of what ended, compresses what is due, and makes room."""
    self._land()
    if self._stalled:  # whoever has a chunk ahead may have to give way
      self._collect()
    ended = [s for s in self._scheduler.running if s.finish_reason]
    self._let_go(ended, self._lengths)
    due = [s for s in self._scheduler.running if s.decodes and not s.ahead and s.is_due]
    self._compress(due)
    if self._stalled:
      if not due:  # else blocks may come back, which the next look at the results will tell
        self._make_room()
    elif self.batch.has_free_slot:
      self._make_room_to_start()
    self._stalled = False

  def _run(self) -> None:
    """Dispatches prompt chunks with a decode step in the first, then what decode steps have no part in that one.

    A chunk of the next step's, or its decode steps, then keep the device busy.
    """
    ahead, self._chunks_ahead = self._chunks_ahead, 0
    decoded, self._decoded_ahead = self._decoded_ahead, False
    if not ahead and not decoded:
      self._newest = None
    before = self._newest if decoded else None
    prefilled = [self._prefill_chunk(before) for _ in range(self._chunks_per_step - ahead)]
    prefills = ahead > 0 or any(prefilled)
    if not decoded:
      newest = self._decode(1 if prefills else self.batch.steps_per_sync)
      self._newest = self._newest if prefills else newest
    self._seal()
    self._riding.clear()
    if not (prefills and self._prefill_ahead()):
      self._decode_ahead()

  def _postprocess(self) -> list[Update]:
    """Turns tokens into text and updates."""
    updates = []
    news, self._news = self._news, []
    for sequence in news:
      sequence.decode_text()
      update = sequence.update()
      if update is not None:
        updates.append(update)
      if sequence.finish_reason:
        self._forget(sequence)
    return updates

  def _forget(self, sequence: Sequence) -> None:
    left = self._requests[sequence.request_id]
    left.remove(sequence)
    if not left:
      del self._requests[sequence.request_id]

  # --------------------------------------------------------------------- reading back

  @property
  def _in_flight(self) -> Flight:
    """What is being dispatched."""
    if self._flight is None:
      self._flight = Flight()
    return self._flight

  def _seal(self) -> None:
    """Ends a flight: what is dispatched from now on joins another one."""
    flight, self._flight = self._flight, None
    if flight is not None:
      flight.seal(self.batch.usage())
      self._sealed = flight

  def _collect(self) -> None:
    """Waits for all that was dispatched and notes what came of it."""
    self._land()
    # Receipts tell of the time of the last token, in front of decode steps and compressions that went ahead.
    ended = [s for s in self._scheduler.running if s.finish_reason and s.prefilled == len(s.prompt)]
    self._let_go(ended, self._lengths)
    self._seal()
    self._land()
    self._decoded_ahead = False

  def _land(self) -> None:
    """Waits for the sealed flight, not for a chunk ahead, and notes what came of it."""
    flight, self._sealed = self._sealed, None
    if flight is None:
      return
    landed = flight.land()
    for sequence, blocks in landed.freed:
      if blocks >= 0:
        sequence.freed_blocks += blocks
        self._counts["compressions"] += 1
        self._counts["freed_blocks"] += blocks
    news = [(1, f.sequence) for f, token in landed.first
            if f.sequence not in landed.failed and self._take_first(f, token)]
    for dispatched, counts, tokens in landed.decoded:
      news += self._take_decoded(dispatched, counts, tokens)
    for sequence in landed.failed:  # a scoring rule of infinite values can keep more than the budget
      sequence.finish_reason = "cache_full"
      news.append((0, sequence))
    self._stalled |= bool(landed.failed)
    for _, sequence in sorted(news, key=lambda pair: pair[0]):
      self._note(sequence)
    self._note_usage(landed.usage)
    for sequence, blocks in self._flight.claims if self._flight else ():  # behind that usage
      self._scheduler.claim(sequence, blocks)

  def _note_usage(self, usage: Usage) -> None:
    """Takes what the cache held for what each sequence holds and what is free."""
    held, free = jax.device_get((usage.held, usage.free))
    for sequence in self._scheduler.running:
      if sequence.slot >= 0:  # else it is about to be given one
        sequence.held_blocks = int(held[sequence.slot])
    # As if nothing was shared, for all may need blocks of their own; as if no prefix was cached, for those give way.
    self._scheduler.free_blocks = self.config.num_blocks - 1 - sum(s.held_blocks for s in self._scheduler.running)
    self._free_now, self._lengths = int(free), usage.lengths

  def _note(self, sequence: Sequence) -> None:
    if sequence not in self._news:
      self._news.append(sequence)

  def _take_first(self, first: First, token: int) -> bool:
    sequence = first.sequence
    if sequence.token_ids or sequence.finish_reason:  # it started over: its first token is known
      return False
    self._accept(sequence, [token], first.rows())
    return True

  def _take_decoded(
      self, dispatched: Dispatched, counts: np.ndarray, drawn: np.ndarray
  ) -> list[tuple[int, Sequence]]:
    """Notes the steps [S] and tokens [K, S] of one loop; returns how many new tokens each sequence got."""
    news = []
    logprobs = dispatched.logprobs()
    for sequence, slot, limit in zip(dispatched.sequences, dispatched.slots, dispatched.limits, strict=True):
      sequence.ahead -= limit
      if not sequence.ahead:
        sequence.newest = None
      count = int(counts[slot])
      if sequence.finish_reason:  # it went on until that was seen
        sequence.steps += count
        sequence.forget_compression_ahead()
        continue
      known = len(sequence.token_ids) - 1 - sequence.steps  # run again, not drawn
      sequence.steps += count
      tokens = [int(token) for token in drawn[known:count, slot]]
      asked = sequence.params.logprobs is not None and logprobs is not None
      rows = [row_of(logprobs, (step, slot)) for step in range(known, count)] if asked else []
      if tokens:
        news.append((self._accept(sequence, tokens, rows), sequence))
      if sequence.finish_reason or count < limit:
        sequence.forget_compression_ahead()
      self._stalled |= count < limit and not sequence.finish_reason
    return news

  def _accept(self, sequence: Sequence, tokens: list[int], rows: list[tuple]) -> int:
    logprobs = token_logprobs(tokens, rows, sequence.params.logprobs or 0)
    taken = sequence.accept(tokens, logprobs, self.max_model_len)
    self._counts["generated_tokens"] += taken
    return taken

  def _let_go(self, ended: list[Sequence], lengths: jax.Array | None = None) -> None:
    """Writes the receipts of sequences that ended, by `lengths` or those of now, and frees their slots and blocks."""
    for sequence, receipt in zip(ended, self.batch.receipts(ended, lengths), strict=True):
      sequence.receipt = receipt
      self.batch.release(sequence)
      self._scheduler.end(sequence)
      self._stalled = False
      self._counts["finished"] += 1

  # --------------------------------------------------------------------------- memory

  def _compress(self, sequences: list[Sequence]) -> None:
    """Compresses each of these to its budget."""
    groups = collections.defaultdict(list)
    for sequence in sequences:
      assert sequence.compression is not None
      compression = sequence.compression
      groups[compression.scoring, compression.allocation, compression.mass is None].append(sequence)
    for group in groups.values():
      self._in_flight.evicted += self.batch.compress(group)

  def _make_room(self) -> None:
    """No block was free for somebody.

    Cached prefixes go first; then sequences are compressed on demand, or the newest
    gives way, or it ends if it is alone.
    """
    running = self._scheduler.running
    if self._drop_prefixes():
      return
    if self._scheduler.free_blocks >= len(running) * self.config.heads_per_sequence:
      return  # whoever ended in front of steps ahead has given some back behind them
    alone = len(running) == 1
    # Alone a sequence meets a full pool at the same token whatever else was served.
    shrinkable = [
        s for s in running if s.decodes and s.compression and footprint.excess_blocks(self.config, s)
        and (s.compression.on_demand or (alone and s.compression.scores_decode))]
    if shrinkable:
      self._compress(shrinkable)
    elif alone:
      self._finish(running[0], "cache_full")
    elif running:
      self._preempt(running[-1])

  def _make_room_to_start(self) -> None:
    """Compresses on demand where that lets the first of those that wait start."""
    running = self._scheduler.running
    shrinkable = [s for s in running if s.decodes and not s.ahead and s.compression and s.compression.on_demand]
    excess = {s: footprint.excess_blocks(self.config, s) for s in shrinkable}
    lacking = self._scheduler.blocks_lacking() if self._scheduler.fits_ahead() else 0
    if 0 < lacking <= sum(excess.values()):
      self._compress([s for s in shrinkable if excess[s]])

  def _drop_prefixes(self) -> bool:
    """Drops cached prefixes until there is a block for every head that runs; whether blocks came free."""
    before = 0 if self._prefixes is None else self.batch.free_blocks
    needed = len(self._scheduler.running) * self.config.heads_per_sequence
    self._make_free(max(needed, before + 1))
    return self._prefixes is not None and self._free_now > before

  def _make_free(self, blocks: int) -> None:
    """Drops cached prefixes until so many blocks are free, or none is left (waits for the device where it drops)."""
    if self._prefixes is None or self._free_now >= blocks:
      return
    self._note_usage(self.batch.usage())
    while self._free_now < blocks and self._prefixes.drop_oldest():
      self._free_now = self.batch.free_blocks

  def _claim(self, sequence: Sequence, blocks: int) -> None:
    """Notes that a sequence may hold up to `blocks` from now on, and sees to it that they are free."""
    self._make_free(blocks - sequence.held_blocks)
    self._make_free(blocks - sequence.held_blocks)  # the first may have found that it holds less
    self._free_now -= max(blocks - sequence.held_blocks, 0)
    self._scheduler.claim(sequence, blocks)
    self._in_flight.claims.append((sequence, blocks))

  def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
    sequence.finish_reason = reason
    self._let_go([sequence])
    self._note(sequence)

  def _preempt(self, sequence: Sequence) -> None:
    """Sends a running sequence back to the queue, with its cache in host memory where there is room for it."""
    swapped = sum(s.snapshot.nbytes for s in self._scheduler.waiting if s.snapshot)
    size = sequence.held_blocks * self.config.bytes_per_block
    # One that was resumed from a file may come from a larger pool, and could not start over in this one.
    cannot_restart = footprint.peak_blocks(self.config, sequence) > self.config.num_blocks - 1
    if sequence.decodes and (cannot_restart or swapped + size <= self._swap_bytes):
      self.batch.swap_out(sequence)
      self._counts["swaps"] += 1
    else:
      self.batch.release(sequence)
      sequence.restart()
    self._scheduler.give_way(sequence)
    self._stalled = False
    self._counts["preemptions"] += 1

  def _admit(self) -> Sequence | None:
    """Starts those that may start, up to the first that has a prompt to prefill, which it returns."""
    while self.batch.has_free_slot and (sequence := self._scheduler.next_to_start()):
      self._scheduler.start(sequence)
      if sequence.snapshot is None:
        self.batch.take_slot(sequence)
        self._start_from_prefix(sequence)
        return sequence
      self._claim(sequence, sequence.snapshot.blocks(self.config.block_size))
      self._in_flight.given.append(self.batch.swap_in(sequence))
      self._in_flight.given_to.append(sequence)
      if sequence.is_due:  # it left between a step and the compression behind it
        self._compress([sequence])
    return None

  # ------------------------------------------------------------------------- prefixes

  def _start_from_prefix(self, sequence: Sequence) -> None:
    """Gives a sequence that starts the longest cached prefix of its prompt."""
    if self._prefixes is None or not self._prefixes.serves(sequence):
      return
    self._counts["prefix_queries"] += 1
    self._make_free(self.config.heads_per_sequence)  # for the copies of partly filled blocks
    found = self._prefixes.find(sequence)
    if found is None:
      return
    tokens, held = found
    blocks = footprint.blocks_behind(self.config, sequence, tokens)  # counted as if none were shared
    self._scheduler.claim(sequence, blocks)
    self._free_now -= blocks
    self._in_flight.given.append(self.batch.adopt(sequence, held, tokens))
    self._in_flight.given_to.append(sequence)
    self._counts["prefix_hits"] += 1
    self._counts["prefix_tokens"] += tokens

  def _keep_prefix(self, sequence: Sequence) -> None:
    """Keeps what a sequence holds, where it stands at a boundary that is not cached."""
    if self._prefixes is not None and self._prefixes.wants(sequence):
      self._prefixes.keep(sequence, self.batch.hold(sequence))

  def _unshare(self, sequence: Sequence) -> None:
    """Gives a sequence blocks of its own, for its KVs and scores are about to change.

    What it holds was claimed as if nothing was shared, so there are blocks enough when
    no prefix is left. Waits for the device where blocks are short.
    """
    if not sequence.shares or self._prefixes is None:
      return
    if self._free_now >= sequence.held_blocks:
      self._free_now -= sequence.held_blocks
      self.batch.unshare(sequence)
      return
    while not bool(self.batch.unshare(sequence)):
      if not self._prefixes.drop_oldest():
        raise RuntimeError("a sequence that shares blocks found none to copy them to")
    self._note_usage(self.batch.usage())

  # -------------------------------------------------------------------------- running

  def _prefill_chunk(self, before: Dispatched | None) -> bool:
    """Dispatches the next piece of the prompt whose turn it is, behind these decode steps; False if there is none."""
    sequence = self._scheduler.prefilling or self._admit()
    if sequence is None:
      return False
    count, blocks = self._next_piece(sequence)
    if blocks - sequence.held_blocks + self._scheduler.blocks_ahead > self._scheduler.free_blocks:
      if len(self._scheduler.running) == 1 and self._flight is None:  # nobody will free any
        self._finish(sequence, "cache_full")
      return False  # until others have ended
    self._prefill(sequence, count, blocks, before)
    return True

  def _prefill_ahead(self) -> bool:
    """Dispatches a chunk of the next step's, where a prompt has one and decode steps surely leave blocks for it.

    The device runs it while results are read and the next steps dispatched; cached prefixes would have to wait for it.
    Returns whether there is one.
    """
    if self._prefixes is not None:
      return False
    sequence = self._scheduler.prefilling or self._admit()
    if sequence is None:
      return False
    count, blocks = self._next_piece(sequence)
    if blocks - sequence.held_blocks + self._scheduler.blocks_ahead > self._scheduler.free_blocks:
      return False
    self._prefill(sequence, count, blocks, self._newest)
    self._chunks_ahead = 1
    return True

  def _next_piece(self, sequence: Sequence) -> tuple[int, int]:
    """Tokens of a prompt's next chunk, and the most blocks that the sequence holds behind it."""
    cached = self._prefixes is not None and self._prefixes.serves(sequence)
    count = footprint.next_piece(sequence, self.batch.chunk_size, self._prefix_interval if cached else None)
    return count, footprint.blocks_behind(self.config, sequence, count)

  def _prefill(self, sequence: Sequence, count: int, blocks: int, before: Dispatched | None) -> None:
    """Dispatches a chunk, a decode step of those of the others that can go beside it, and what comes behind it.

    Those can that are not ahead, or by `before`.
    """
    self._claim(sequence, blocks)
    rules = {None, ride_rule(sequence.compression)}
    riders = [s for s in self._scheduler.running
              if s.decodes and s.steps_left(self.max_model_len) > 0 and decode_rule(s.compression) in rules
              and (not s.ahead or s.newest is before)]
    found = self.batch.mixed(sequence, count, riders, before)
    self._riding |= rules
    self._free_now -= len(riders) * self.config.heads_per_sequence
    if riders:
      self._newest = self._in_flight.decodes(riders, [1] * len(riders), found.decoded)
    self._counts["prompt_tokens"] += count
    self._in_flight.given.append(found.ok)
    self._in_flight.given_to.append(sequence)
    ends, interval = sequence.prefilled == len(sequence.prompt), sequence.prefill_interval
    if sequence.compression and (ends or (interval and sequence.prefilled % interval == 0)):
      self._unshare(sequence)
      self.batch.score(sequence)
      self._compress([sequence])
    self._keep_prefix(sequence)
    if ends:
      sequence.observation = None
      if not sequence.token_ids:
        wanted = sequence.params.logprobs is not None
        self._in_flight.first.append(First(sequence, found.token, found.logprobs if wanted else None))

  def _decode(self, most_steps: int) -> Dispatched | None:
    """Dispatches decode steps, once for each way of keeping scores, of those that go beside no chunk.

    Returns the last call.
    """
    rows = [s for s in self._scheduler.running if s.decodes and decode_rule(s.compression) not in self._riding]
    most_steps = worthwhile_steps([min(s.steps_left(self.max_model_len), most_steps) for s in rows])
    groups = collections.defaultdict(list)
    for sequence in rows:
      groups[decode_rule(sequence.compression)].append(sequence)
    plain, newest = groups.pop(None, []), None
    scored = list(groups.values()) or ([[]] if plain else [])
    for group in scored:
      group += plain  # whoever needs no scores goes with the first group
      plain = []
      limits = [min(s.steps_left(self.max_model_len), most_steps) for s in group]
      newest = self._in_flight.decodes(group, limits, self.batch.decode(group, limits, most_steps))
    return newest

  def _decode_ahead(self) -> None:
    """Dispatches the next step's decode steps, and the compressions that are due in front of them.

    The device is at them while results are read. Who reached an end sits there, who has just got through a prompt joins
    a call later, and so may somebody who waits: only where that costs less than the device's wait.
    """
    running, waiting, before = self._scheduler.running, self._scheduler.waiting, self._newest
    if (self._prefixes is not None or before is None or self._sealed is None or before not in self._sealed.decoded
        # Who may be compressed on demand is to be found at rest.
        or (waiting and any(s.compression and s.compression.on_demand for s in running))):
      return
    ready = [s for s in running if s.decodes and (s.newest is before or not s.ahead)
             and s.steps_to_end(self.max_model_len) > 0
             and not (s.is_due and s.positions)]  # its receipt names positions of the time of its last token
    if len({decode_rule(s.compression) for s in ready} - {None}) > 1:
      return
    longest = self.batch.steps_per_sync // 2  # whoever comes waits for this call and for the one before
    if waiting or self._scheduler.prefilling:  # who counts on others taking no more than a block for each head
      longest = min(longest, self.config.block_size)
    left = [min(s.steps_behind_compression(self.max_model_len), longest) for s in ready]
    most = worthwhile_steps(left)
    idle = len(running) - len(ready)
    if not most or idle * most > SYNC_STEPS * len(ready):  # steps that some miss, and that all would while they wait
      return
    if due := [s for s in ready if s.is_due]:
      self._compress(due)
      self._sealed.shrinks(self.batch.usage())
    limits = [min(steps, most) for steps in left]
    self._newest = self._in_flight.decodes(ready, limits, self.batch.decode(ready, limits, most, before))
    self._decoded_ahead = True

  # ---------------------------------------------------------------------------- state

  def stats(self) -> EngineStats:
    """Counts; does not wait for the device."""
    return EngineStats(
        running=len(self._scheduler.running), waiting=len(self._scheduler.waiting),
        free_blocks=max(self._scheduler.free_blocks, 0), num_blocks=self.config.num_blocks - 1, **self._counts)

  def kvs_kept(self) -> np.ndarray:
    """KVs that all running sequences hold, i32 [L, H] (waits for the device)."""
    return np.asarray(self.batch.state.lengths).sum(axis=1, dtype=np.int32)

  def default_kinds(self) -> list[Compression | None]:
    """Kinds of requests that `warm_up` compiles for by default: all `rules` and `allocations`, once and again."""
    return kinds_of(self._rules, self._allocations)

  def warm_up(self, progress: bool = False, kinds: Collection[Compression | None] | None = None) -> None:
    """Compiles every program that serving can need, by serving each kind of request once.

    Args:
      progress: show a progress bar on stderr.
      kinds: as of requests that will come; by default `default_kinds`. How large a budget or an interval is makes no
        difference, but whether there is an interval, and `mass`, does.

    Raises:
      RuntimeError: requests are being served.
    """
    if self.has_work:
      raise RuntimeError("warm_up serves requests of its own; call it before the first one is added")
    counts = self._counts.copy()
    kinds = self.default_kinds() if kinds is None else kinds
    todo = dict.fromkeys(kind and smallest_of(kind) for kind in kinds)
    for kind in tqdm.tqdm(todo, disable=not progress, unit="kind", desc="compiling"):
      self.batch.compile_kind(kind, self.max_model_len)
      self._serve_one(kind)
    if self.config.sharing:
      self.batch.compile_sharing()
    self._counts = counts
    self._compiled = {kind_of(kind) for kind in kinds if kind}

  def _serve_one(self, compression: Compression | None) -> None:
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=3, logprobs=1, ignore_eos=True)
    self.add([0], params, compression, return_positions=True)
    swapped = False
    while self.has_work:
      self.step()
      self._collect()
      decoding = [s for s in self._scheduler.running if s.decodes]
      if decoding and not swapped:
        self._preempt(decoding[0])
        swapped = True
