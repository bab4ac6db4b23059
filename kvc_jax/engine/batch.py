"""The running batch: the cache on the device, and the transitions that an engine composes."""

import heapq
import os
from collections.abc import Sequence as Sequences
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from kvc_jax.attention.prefill import Observation
from kvc_jax.cache.share import Held
from kvc_jax.cache.snapshot import PIECE_KVS, SequenceSnapshot, export_sequence, import_sequence
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.engine import steps
from kvc_jax.engine.flight import Dispatched, Evicted
from kvc_jax.engine.packed import Packed
from kvc_jax.engine.request import CompressionReceipt
from kvc_jax.engine.sequence import Sequence
from kvc_jax.eviction.compression import MOST_KEPT_RANGES, Compression
from kvc_jax.eviction.score import ScoringRule, first_observed, pooling_of
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.kernels.paged_prefill import bound_of_prefix
from kvc_jax.model.flat import FlatModel
from kvc_jax.model.llama import Llama
from kvc_jax.model.rope import inverse_frequencies
from kvc_jax.sampling import SamplingArrays

_EVICT_TOKENS = 32_768
_EVICT_ROWS = 16
_NO_MASS = 2.0
"""A share of the scores that cannot be kept: nothing goes for it."""
_STOP_IDS = 16
"""Ids that the device stops at; the host stops at any further ones."""
_FEWEST_ROWS = 64
"""So many rows of a product take no longer than one: reading the weights does."""


class Batch:
  """Slots of one cache. Everything is dispatched; only what says so waits for the device.

  Attributes:
    model: the model.
    config: shape of the cache.
    state: the cache; replaced by every transition.
    chunk_size: tokens of a prefill chunk.
    steps_per_sync: K, most decode steps of one call.
  """

  def __init__(
      self, model: Llama, config: CacheConfig, chunk_size: int, kv_scales: jax.Array | None = None,
      steps_per_sync: int = 1):
    self.model = model
    self._flat = FlatModel.of(model)
    self.config = config
    self.chunk_size = chunk_size
    self.steps_per_sync = steps_per_sync
    self._buckets = row_buckets(config.num_slots)
    self._kv_scales = None if kv_scales is None else np.asarray(kv_scales)
    self._start_empty()
    # Sequences per eviction call: each costs temporaries of some bytes for every KV its tables could hold.
    longest = config.max_blocks_per_head * config.block_size
    self._piece = min(PIECE_KVS, longest * config.heads_per_sequence)
    self._evict_rows = max(1, min(config.num_slots, _EVICT_ROWS, _EVICT_TOKENS // longest))

  def reset(self) -> None:
    """Empties the cache, whatever state an exception may have left it in."""
    self.free()  # before the new pool is made: there may not be room for two
    self._start_empty()

  def free(self) -> None:
    """Deletes the cache's arrays."""
    for array in jax.tree.leaves(self.state):
      array.delete()

  def _start_empty(self) -> None:
    self.state = init_cache(self.config, self._kv_scales)
    self._free_slots = list(range(self.config.num_slots))  # a heap: few rows do where the first slots are used first

  @property
  def free_blocks(self) -> int:
    """Blocks on the free stack (waits for the device)."""
    return int(self.state.free_count)

  @property
  def has_free_slot(self) -> bool:
    return bool(self._free_slots)

  def take_slot(self, sequence: Sequence) -> None:
    """Gives the sequence an empty slot; the caller has checked that there is one."""
    sequence.slot = heapq.heappop(self._free_slots)

  def prefill(self, sequence: Sequence, count: int) -> tuple[jax.Array, jax.Array]:
    """Runs the next `count` prompt tokens, at most a chunk, and nothing beside them.

    The caller has checked that their blocks are free.

    Returns:
      Logits f32 [V] behind them, and ok bool []: whether the blocks were there.
    """
    found = self.mixed(sequence, count, [])
    return found.logits, found.ok

  def mixed(
      self, sequence: Sequence, count: int, riders: list[Sequence], before: Dispatched | None = None
  ) -> steps.Mixed:
    """Runs the next `count` prompt tokens of a sequence, at most a chunk, and beside them a decode step of others.

    The caller has checked that the chunk's blocks are free.

    Args:
      sequence: in its prompt.
      count: tokens.
      riders: sequences that decode; each has no `decode_rule`, or the `ride_rule` of `sequence`, and shares no
        blocks where it has one.
      before: the call that riders with steps `ahead` go on from.
    """
    assert not any(s.shares and s.compression for s in riders), "a sequence that scores shares blocks"
    if sequence.observation is None:
      sequence.observation = self._new_observation(prefill_rule(sequence.compression))
    tokens = np.zeros(self.chunk_size, np.int32)
    tokens[:count] = sequence.prompt[sequence.prefilled : sequence.prefilled + count]
    rows = self._following(self._rows(riders, [1] * len(riders), 1), riders, before)
    found, sequence.observation = self._mixed(
        sequence.compression, self._chunk(tokens, sequence.slot, count, sequence), rows, sequence.observation,
        self._bound_of_prefix(sequence.prefilled))
    sequence.prefilled += count
    return found

  def _mixed(
      self, compression: Compression | None, chunk: Packed[steps.PromptChunk], rows: Packed[steps.DecodeRows],
      observation: Observation, most_prefix: int | None,
  ) -> tuple[steps.Mixed, Observation]:
    found, self.state, observation = steps.mixed_step(
        self._flat, self.state, observation, chunk, rows, rule=prefill_rule(compression),
        decode_rule=ride_rule(compression), most_prefix=most_prefix)
    return found, observation

  def _chunk(self, tokens: Any, slot: int, count: int, sequence: Sequence | None) -> Packed[steps.PromptChunk]:
    wanted = sequence is not None and sequence.params.logprobs is not None
    arrays: list[Any] = [tokens, np.int32(slot), np.int32(count), self._sampling([sequence]), np.array([wanted])]
    return Packed.of(steps.PromptChunk(*arrays))

  def _new_observation(self, rule: ScoringRule | None) -> Observation:
    shape = self.model.config
    return steps.new_observation(
        rule, shape.num_layers, shape.num_heads, shape.head_dim, np.dtype(self.config.query_dtype),
        inverse_frequencies(shape.rope, shape.head_dim))

  def _bound_of_prefix(self, tokens: int) -> int | None:
    """The `most_prefix` of a chunk behind so many tokens."""
    return bound_of_prefix(
        tokens, self.state.kv, self.model.config.num_heads // self.config.num_kv_heads, self.config.query_dtype)

  def score(self, sequence: Sequence) -> None:
    """Scores what is held of the prompt so far, for a compression that follows."""
    rule = _compression(sequence).scoring
    if rule.observed in ("last", "moments"):
      self._score(sequence.observation, sequence.slot, rule, in_order=not sequence.has_gaps)

  def _score(self, observation: Observation | None, slot: int, rule: ScoringRule, *, in_order: bool) -> None:
    assert observation is not None
    matters = rule.observed == "last" and pooling_of(rule)[0] > 1  # else one program does
    self.state = steps.score_prompt(
        self.state, observation, np.int32(slot), scale=self.model.config.head_dim**-0.5, rule=rule,
        in_order=in_order if matters else None)

  def compile_kind(self, compression: Compression | None, max_model_len: int) -> None:
    """Runs all that a request of this kind can need for its prompt and decode steps, on an empty slot: a no-op."""
    slot, tokens = self._free_slots[0], np.zeros(self.chunk_size, np.int32)
    observation = self._new_observation(prefill_rule(compression))
    bounds = {self._bound_of_prefix(most) for most in (0, 1, max_model_len - 1)}
    self._compile_side_by_side(compression, observation, bounds)
    for bucket in self._buckets:
      asked = np.zeros(bucket, np.int32)
      loop = rows = self._rows([], [], self.steps_per_sync, bucket)
      for _ in range(2):  # rows from the host, and from the device
        decoded = self._decode(loop, 0, decode_rule(compression))
        loop = steps.follow(rows, decoded, asked)
      row = self._rows([], [], 1, bucket)
      beside = steps.follow(row, decoded, asked)
      for most_prefix in bounds:
        for given in (row, beside):
          found, observation = self._mixed(
              compression, self._chunk(tokens, slot, 0, None), given, observation, most_prefix)
      for behind in (rows, row):  # what follows a chunk is a loop, or another chunk
        steps.follow(behind, found.decoded, asked)
    if compression is not None and compression.scoring.observed in ("last", "moments"):
      for in_order in (True, False):
        self._score(observation, slot, compression.scoring, in_order=in_order)

  def _compile_side_by_side(
      self, compression: Compression | None, observation: Observation, bounds: set[int | None]) -> None:
    """Compiles the programs of all layers in threads; the calls of them find what was compiled."""
    chunk = self._chunk(np.zeros(self.chunk_size, np.int32), 0, 0, None)
    rules = {"rule": prefill_rule(compression), "decode_rule": ride_rule(compression)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
      compiled = []
      for bucket in self._buckets:
        rows, row = (self._rows([], [], most, bucket) for most in (self.steps_per_sync, 1))
        lowered = [steps.decode_loop.lower(
            self._flat, self.state, rows, np.int32(0), rule=decode_rule(compression))]
        lowered += [steps.mixed_step.lower(
            self._flat, self.state, observation, chunk, row, most_prefix=most_prefix, **rules)
            for most_prefix in bounds]
        compiled += [pool.submit(program.compile) for program in lowered]
      for program in compiled:
        program.result()

  def decode(
      self, sequences: list[Sequence], limits: list[int], num_steps: int, before: Dispatched | None = None
  ) -> steps.Decoded:
    """Runs up to `num_steps` decode steps, at most limits[i] of sequences[i].

    All sequences whose decode keeps scores share one `decode_rule`, and no blocks. `before` is as for `mixed`.
    """
    assert not any(s.shares and s.compression for s in sequences), "a sequence that scores shares blocks"
    rules = {rule for s in sequences if (rule := decode_rule(s.compression)) is not None}
    assert len(rules) <= 1, "sequences of one decode call score by different rules"
    rows = self._following(self._rows(sequences, limits, self.steps_per_sync), sequences, before)
    return self._decode(rows, num_steps, next(iter(rules), None))

  def _decode(self, rows: Packed[steps.DecodeRows], num_steps: int, rule: ScoringRule | None) -> steps.Decoded:
    found, self.state = steps.decode_loop(self._flat, self.state, rows, np.int32(num_steps), rule=rule)
    return found

  def _following(
      self, rows: Packed[steps.DecodeRows], sequences: list[Sequence], before: Dispatched | None
  ) -> Packed[steps.DecodeRows]:
    """The rows of these, where those that have steps `ahead` go on from what `before` finds."""
    if before is None or not any(s.ahead for s in sequences):
      assert not any(s.ahead for s in sequences), "a sequence has steps ahead that nobody named"
      return rows
    return steps.follow(rows, before.found, before.asked_of(sequences, self._bucket(sequences)))

  def _bucket(self, sequences: list[Sequence]) -> int:
    """Rows of a call that has a row for each of these."""
    last = max((s.slot for s in sequences), default=0)
    return next(rows for rows in self._buckets if rows > last)

  def _rows(
      self, sequences: list[Sequence], limits: list[int], most: int, bucket: int | None = None
  ) -> Packed[steps.DecodeRows]:
    """What a call of at most so many steps is to do; the token of a sequence that has steps `ahead` may be missing."""
    slots = bucket or self._bucket(sequences)
    tokens: Any = np.zeros(slots, np.int32)
    allowed: Any = np.zeros(slots, np.int32)
    wanted: Any = np.zeros(slots, bool)
    given: Any = np.full((slots, most), -1, np.int32)
    stop_ids: Any = np.full((slots, _STOP_IDS), -1, np.int32)
    sampled: list[Sequence | None] = [None] * slots
    for sequence, limit in zip(sequences, limits, strict=True):
      at = sequence.slot
      done = sequence.steps + sequence.ahead
      known = sequence.token_ids[done : done + 1 + most]
      if known:
        tokens[at] = known[0]
      allowed[at] = limit
      given[at, : max(len(known) - 1, 0)] = known[1:]
      stops = list(sequence.stop_ids)[:_STOP_IDS]
      stop_ids[at, : len(stops)] = stops
      wanted[at] = sequence.params.logprobs is not None
      sampled[at] = sequence
    return Packed.of(steps.DecodeRows(
        tokens=tokens, limits=allowed, given=given, stop_ids=stop_ids, sampling=self._sampling(sampled),
        logprobs=wanted))

  def _sampling(self, sequences: Sequences[Sequence | None]) -> SamplingArrays:
    rows = [_sampling_row(s, self.model.config.vocab_size) for s in sequences]
    columns: list[Any] = [np.array(c, d) for c, d in zip(zip(*rows, strict=True), _SAMPLING_DTYPES, strict=True)]
    return SamplingArrays(*columns)

  def compress(self, sequences: list[Sequence]) -> list[Evicted]:
    """Evicts each sequence down to its own budget; all share one rule and allocation, and all or
    none have a `mass`. One that does not take all of its steps `ahead` is left alone.

    While its prompt is prefilled, that is the budget that the whole prompt will have.
    """
    calls = []
    for start in range(0, len(sequences), self._evict_rows):
      calls.append(self._compress_rows(sequences[start : start + self._evict_rows]))
    return calls

  def _compress_rows(self, sequences: list[Sequence]) -> Evicted:
    first = _compression(sequences[0])
    rows = np.zeros((7, self._evict_rows), np.int32)
    mass = None if first.mass is None else np.ones(self._evict_rows, np.float32)
    rows[0] = self.config.num_slots  # rows without a sequence are ignored
    keep = np.zeros((self._evict_rows, MOST_KEPT_RANGES, 2), np.int32)
    for i, sequence in enumerate(sequences):
      compression = _compression(sequence)
      tokens = len(sequence.prompt) + sequence.steps + sequence.ahead
      rows[:, i] = (
          sequence.slot, compression.cache_tokens(tokens), compression.window,
          compression.sinks, first_observed(compression.scoring, sequence.prefilled), compression.least_tokens(tokens),
          sequence.tokens_ahead)
      if mass is not None:
        # A prompt that is larger than the pool is compressed on its way too: by the other budgets alone.
        mass[i] = compression.mass if sequence.prefilled == len(sequence.prompt) else _NO_MASS
      for j, pair in enumerate(compression.keep):
        keep[i, j] = pair
      sequence.note_compression()
    model = self._flat if getattr(first.scoring, "needs_output", False) else None
    arrays: list[Any] = [*rows[:5], keep, rows[5], mass, rows[6]]
    self.state, eviction = steps.evict(
        self.state, Packed.of(steps.EvictRows(*arrays)), rule=first.scoring, allocation=first.allocation, model=model)
    return sequences, eviction.freed_blocks

  def usage(self) -> steps.Usage:
    """What the cache holds behind all that was dispatched."""
    return steps.usage(self.state)

  def release(self, sequence: Sequence) -> None:
    """Frees the sequence's blocks and slot."""
    self.state = steps.release(self.state, np.array([sequence.slot], np.int32))
    heapq.heappush(self._free_slots, sequence.slot)
    sequence.slot = -1

  def hold(self, sequence: Sequence) -> Held:
    """Keeps what the sequence holds, whatever becomes of it; `drop` lets go."""
    self.state, held = steps.hold(self.state, np.int32(sequence.slot))
    sequence.shares = True
    return held

  def adopt(self, sequence: Sequence, held: Held, tokens: int) -> jax.Array:
    """Gives the sequence's empty slot what was held behind so many tokens of the same prompt; returns ok bool []."""
    self.state, ok = steps.adopt(self.state, held, np.int32(sequence.slot))
    sequence.prefilled, sequence.has_gaps, sequence.shares = tokens, True, True
    return ok

  def unshare(self, sequence: Sequence) -> jax.Array:
    """Gives the sequence blocks of its own; returns ok bool []: False where too few were free."""
    self.state, ok = steps.unshare(self.state, np.int32(sequence.slot))
    sequence.shares = False
    return ok

  def drop(self, held: Held) -> None:
    """Lets go of what `hold` kept."""
    self.state = steps.drop(self.state, held)

  def compile_sharing(self) -> None:
    """Runs hold, adopt, unshare and drop on an empty slot, which changes nothing."""
    slot = np.int32(self._free_slots[-1])
    self.state, held = steps.hold(self.state, slot)
    for step in (lambda state: steps.adopt(state, held, slot), lambda state: steps.unshare(state, slot)):
      self.state, _ = step(self.state)
    self.drop(held)

  def snapshot(self, sequence: Sequence) -> SequenceSnapshot:
    """A copy in host memory of what the sequence holds (waits for the device)."""
    return export_sequence(self.state, sequence.slot, piece=self._piece)

  def swap_out(self, sequence: Sequence) -> None:
    """Copies what the sequence holds to host memory and frees its slot (waits for the device)."""
    sequence.snapshot = self.snapshot(sequence)
    self.release(sequence)

  def swap_in(self, sequence: Sequence) -> jax.Array:
    """Brings a swapped sequence back into an empty slot; returns ok bool []: whether its blocks were there."""
    assert sequence.snapshot is not None
    self.take_slot(sequence)
    self.state, ok = import_sequence(self.state, sequence.slot, sequence.snapshot, piece=self._piece)
    sequence.snapshot = None
    return ok

  def receipts(self, sequences: list[Sequence], lengths: jax.Array | None = None) -> list[CompressionReceipt]:
    """What each sequence holds (waits for the device).

    Args:
      sequences: each in a slot.
      lengths: i32 [L, S, H] of a time behind which nothing was dispatched for them; by default of now.
    """
    if not sequences:
      return []
    every = np.asarray(self.state.lengths if lengths is None else lengths)
    return [self._receipt(sequence, every[:, sequence.slot].copy()) for sequence in sequences]

  def _receipt(self, sequence: Sequence, lengths: np.ndarray) -> CompressionReceipt:
    return CompressionReceipt(
        tokens_seen=sequence.tokens_seen,
        kvs_kept=lengths,
        blocks_uncompressed=self.config.blocks_for(sequence.tokens_seen),
        blocks_held=int((-(-lengths // self.config.block_size)).sum()),
        bytes_per_block=self.config.bytes_per_block,
        freed_blocks=sequence.freed_blocks,
        compressions=sequence.compressions,
        rate_asked=sequence.compression.rate if sequence.compression else 1.0,
        positions=self._positions(sequence.slot, lengths) if sequence.positions else None,
    )

  def _positions(self, slot: int, lengths: np.ndarray) -> np.ndarray:
    held = np.asarray(steps.held_positions(self.state, np.int32(slot)))
    index = np.arange(held.shape[-1])
    last = np.iinfo(np.int32).max
    ordered = np.sort(np.where(index < lengths[..., None], held, last), axis=-1)[..., : lengths.max()]
    return np.where(ordered == last, -1, ordered)


def row_buckets(num_slots: int) -> tuple[int, ...]:
  """Numbers of rows that decode steps are compiled for: powers of two from where rows cost time, and all slots.

  A step of few sequences does not pay for slots that are free.
  """
  buckets: list[int] = []
  while (rows := _FEWEST_ROWS << len(buckets)) < num_slots:
    buckets.append(rows)
  return *buckets, num_slots


def prefill_rule(compression: Compression | None) -> ScoringRule | None:
  """What a prompt's chunks observe: one object for all rules that do it alike; None for nothing."""
  scoring = compression.scoring if compression is not None else None
  if scoring is None or scoring.observed == "none":
    return None
  if scoring.observed == "last":
    return WindowAttention(queries=scoring.queries)
  if scoring.observed == "all":
    return FullAttention(power=scoring.power, buffer=scoring.buffer)
  return scoring


def decode_rule(compression: Compression | None) -> ScoringRule | None:
  """How decode steps keep scores up to date: one object for all rules that do it alike; None for not at all."""
  return ride_rule(compression) if compression is not None and compression.scores_decode else None


def ride_rule(compression: Compression | None) -> ScoringRule | None:
  """How the decode step beside a prompt keeps scores: as `decode_rule`, whether or not the prompt itself will need any.

  So all requests of one kind share a program.
  """
  scoring = compression.scoring if compression is not None else None
  if scoring is None or scoring.observed in ("none", "moments"):
    return None
  return FullAttention(power=scoring.power, buffer=scoring.buffer, decode_every=scoring.decode_every)


_SAMPLING_DTYPES = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)


def _sampling_row(sequence: Sequence | None, vocab_size: int) -> tuple[float, ...]:
  if sequence is None:
    return (0.0, 0, 1.0, 0.0, 0, 0)
  params = sequence.params
  # The token behind a prompt is the first; behind decode step n, counted from 0, comes token n + 1.
  step = sequence.steps + sequence.ahead + 1 if sequence.token_ids else 0
  return (params.temperature, min(max(params.top_k, 0), vocab_size), params.top_p, params.min_p, params.seed or 0,
          step)


def _compression(sequence: Sequence) -> Compression:
  assert sequence.compression is not None
  return sequence.compression
