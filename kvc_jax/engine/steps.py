"""The jitted steps: a prompt's chunk beside a decode step, decode tokens for every slot, score, compress, release.

Each takes the cache and gives it back, donated, so the pool is updated in place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.mixed import mixed_attention
from kvc_jax.attention.prefill import Observation, init_observation, score_observed
from kvc_jax.cache import alloc, share
from kvc_jax.cache.state import CacheState
from kvc_jax.engine.packed import Packed, unpack
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.eviction.shares import Allocation
from kvc_jax.eviction.step import Eviction
from kvc_jax.eviction.step import evict as evict_step
from kvc_jax.model.flat import FlatModel
from kvc_jax.model.layers import Attend
from kvc_jax.model.llama import Llama, output_projections
from kvc_jax.sampling import Logprobs, SamplingArrays, logprobs_of, most_ranks, sample

DECODE_OPTIONS = {
    # XLA counts the pool again for each update in place, sees memory run out, and would compute
    # small things anew in every layer instead of keeping them.
    "xla_disable_hlo_passes": "rematerialization",
    # XLA's Triton products of a few rows win when timed alone, but leave f32 sums of split products
    # to further kernels, where cuBLAS adds the residual as well.
    "xla_gpu_enable_triton_gemm": False,
}
"""Compiler options of a decode step; only an outermost jit may have any."""

LOOP_OPTIONS = DECODE_OPTIONS | {
    # XLA's own choice and WHILE: the whole loop is one CUDA graph, where XLA would have the host ask before each step
    # whether there is another one, and not return before the last.
    "xla_gpu_enable_command_buffer":
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}
"""Compiler options of a loop of decode steps."""


def _whole(model: Llama | FlatModel) -> Llama:
  return model.model() if isinstance(model, FlatModel) else model


@functools.partial(jax.jit, static_argnames=("rule", "num_layers", "num_heads", "head_dim", "dtype"))
def new_observation(
    rule: ScoringRule | None, num_layers: int, num_heads: int, head_dim: int, dtype: np.dtype, frequencies: jax.Array
) -> Observation:
  """`kvc_jax.attention.prefill.init_observation` as one program: one call for all of its arrays."""
  return init_observation(rule, num_layers, num_heads, head_dim, dtype, frequencies)


@functools.partial(
    jax.jit, static_argnames="rule", donate_argnames="state", compiler_options=DECODE_OPTIONS)
def decode_step(
    model: Llama,
    state: CacheState,
    tokens: jax.Array,
    active: jax.Array,
    *,
    rule: ScoringRule | None,
) -> tuple[jax.Array, jax.Array, CacheState]:
  """Runs one token of every active slot. An outermost jit: it carries compiler options.

  Args:
    model: the model.
    state: the cache; donated.
    tokens: i32 [R] newest token of each of the first R slots; R may be S.
    active: bool [R].
    rule: adds attention to the scores; None where no compression will follow.

  Returns:
    Logits f32 [R, V]; ok bool [R] (False: not active, or no block was free, and
    the slot is as before); the cache.
  """
  return _decode(model, state, tokens, active, rule)


def _decode(
    model: Llama, state: CacheState, tokens: jax.Array, active: jax.Array, rule: ScoringRule | None
) -> tuple[jax.Array, jax.Array, CacheState]:
  slots = jnp.arange(len(tokens), dtype=jnp.int32)
  state, ok = alloc.allocate(state, slots, active.astype(jnp.int32), max_count=1)
  ok &= active
  scale = model.config.head_dim**-0.5

  def attend(layer, q, k, v, state):
    return decode_attention(state, layer, q, k, v, active=ok, scale=scale, rule=rule)

  hidden, state = model(tokens, jnp.maximum(state.num_tokens[slots] - 1, 0), attend, state)
  return model.logits(hidden), ok, state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
  """What `decode_loop` is to do for each of the first R slots; all others rest. K is the most steps of a loop.

  Attributes:
    tokens: i32 [R] newest token of each slot, not in the cache yet.
    limits: i32 [R] steps that the slot may take, up to K; 0 where it is not active.
    given: i32 [R, K] tokens to go on with instead of drawn ones, -1 for none: those that a
      sequence had generated before it started over.
    stop_ids: i32 [R, E] ids behind which the slot stops, -1 for none.
    sampling: how to draw; `step` is that of the first token.
    logprobs: bool [R] whether log-probabilities are wanted.
  """

  tokens: jax.Array
  limits: jax.Array
  given: jax.Array
  stop_ids: jax.Array
  sampling: SamplingArrays
  logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
  """What a loop of decode steps found.

  Attributes:
    counts: i32 [S] steps that each slot took. Fewer than its limit, where no stop id was
      drawn, because no block was free.
    tokens: i32 [K, S] the tokens behind them; 0 behind a slot's count.
    logprobs: [K, S] of these tokens.
  """

  counts: jax.Array
  tokens: jax.Array
  logprobs: Logprobs


@functools.partial(
    jax.jit, static_argnames="rule", donate_argnames="state", compiler_options=LOOP_OPTIONS)
def decode_loop(
    model: Llama | FlatModel, state: CacheState, rows: DecodeRows | Packed[DecodeRows], num_steps: jax.Array, *,
    rule: ScoringRule | None,
) -> tuple[Decoded, CacheState]:
  """Several decode steps with sampling in one program. An outermost jit, as `decode_step` is.

  Ends early when no slot can go on.

  Args:
    model: the model.
    state: the cache; donated.
    rows: what to do for the first R slots; each R is a program. `Packed` is one transfer.
    num_steps: i32 [] most steps, up to K; traced, so one compile serves any number.
    rule: as for `decode_step`.

  Returns:
    What was found, and the cache.
  """
  model = _whole(model)
  decode = functools.partial(_decode, model, rule=rule)
  return run_loop(decode, state, unpack(rows), num_steps, model.config.vocab_size)


Step = Callable[[CacheState, jax.Array, jax.Array], tuple[jax.Array, jax.Array, CacheState]]
"""Cache, tokens i32 [R] and active bool [R] to logits f32 [R, V], ok bool [R] and the cache: see `decode_step`."""


def run_loop(
    decode: Step, state: CacheState, rows: DecodeRows, num_steps: jax.Array, vocab_size: int
) -> tuple[Decoded, CacheState]:
  """What `decode_loop` is made of, for any way to do a step."""
  width, steps = rows.given.shape
  slot = jnp.arange(width, dtype=jnp.int32)

  def going(carry):
    step, moved, *_ = carry
    return (step < num_steps) & moved

  def body(carry):
    step, _, tokens, limits, found, state = carry
    counts = found.counts[:width]
    logits, ok, state = decode(state, tokens, counts < limits)
    drawn = sample(logits, dataclasses.replace(rows.sampling, step=rows.sampling.step + counts))
    given = rows.given[slot, jnp.minimum(counts, steps - 1)]
    token = jnp.where(given >= 0, given, drawn)
    found = _note(found, token, ok, logprobs_of(logits, token, jnp.any(rows.logprobs & ok)))
    stopped = ok & jnp.any(token[:, None] == rows.stop_ids, axis=1)
    limits = jnp.where(stopped, 0, limits)
    going_on = jnp.any(found.counts[:width] < limits) & jnp.any(ok)
    return step + 1, going_on, jnp.where(ok, token, tokens), limits, found, state

  nothing = _nothing(steps, state.num_slots, vocab_size)
  start = (jnp.int32(0), jnp.any(rows.limits > 0), rows.tokens, rows.limits, nothing, state)
  *_, found, state = lax.while_loop(going, body, start)
  return found, state


def _nothing(steps: int, slots: int, vocab_size: int) -> Decoded:
  ranks = (steps, slots, most_ranks(vocab_size))
  return Decoded(
      jnp.zeros(slots, jnp.int32), jnp.zeros((steps, slots), jnp.int32),
      Logprobs(jnp.zeros((steps, slots)), jnp.zeros(ranks), jnp.zeros(ranks, jnp.int32)))


def _note(found: Decoded, token: jax.Array, ok: jax.Array, logprobs: Logprobs) -> Decoded:
  """Puts down each ok slot's token behind those it has."""
  steps, slots = found.tokens.shape
  at = jnp.where(ok, found.counts[: len(ok)], steps), jnp.arange(len(ok))

  def put(rows: jax.Array, row: jax.Array) -> jax.Array:
    return rows.at[at].set(row, mode="drop")

  counts = found.counts + jnp.pad(ok, (0, slots - len(ok)))
  return Decoded(counts, put(found.tokens, token), jax.tree.map(put, found.logprobs, logprobs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptChunk:
  """The next piece of a prompt.

  Attributes:
    tokens: i32 [T] of a fixed T; from `count` on padding.
    slot: i32 [] of its sequence.
    count: i32 [], 1..T; with 0 nothing is prefilled.
    sampling: [1] how to draw the token behind the piece, which counts where the prompt ends there.
    logprobs: bool [1] whether that token's log-probabilities are wanted.
  """

  tokens: jax.Array
  slot: jax.Array
  count: jax.Array
  sampling: SamplingArrays
  logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixed:
  """What came of a prompt's chunk and the decode step beside it.

  Attributes:
    ok: bool []; False: no blocks for the chunk, whose sequence is as before.
    logits: f32 [V] behind the chunk's last token.
    token: i32 [1] drawn from them.
    logprobs: [1] of that token.
    decoded: of the decode step, K = 1.
  """

  ok: jax.Array
  logits: jax.Array
  token: jax.Array
  logprobs: Logprobs
  decoded: Decoded


@functools.partial(
    jax.jit, static_argnames=("rule", "decode_rule", "most_prefix"), donate_argnames=("state", "observation"))
def mixed_step(
    model: Llama | FlatModel,
    state: CacheState,
    observation: Observation,
    chunk: PromptChunk | Packed[PromptChunk],
    rows: DecodeRows | Packed[DecodeRows],
    *,
    rule: ScoringRule | None,
    decode_rule: ScoringRule | None = None,
    most_prefix: int | None = None,
) -> tuple[Mixed, CacheState, Observation]:
  """Runs one chunk of one prompt, and one decode step of other slots in the same products.

  A decode step of its own reads all weights; here they are read for the chunk already.

  Args:
    model: the model.
    state: the cache; donated.
    observation: of the prompt's chunks before; donated.
    chunk: the prompt's next piece; `Packed`, as rows too, is one transfer.
    rows: of the decode step; K = 1, and limits are 0 or 1.
    rule: None where the prompt will not be compressed.
    decode_rule: as the `rule` of `decode_step`.
    most_prefix: as for `prefill_attention`.

  Returns:
    What was found; the cache; the observation.
  """
  model, piece, riders = _whole(model), unpack(chunk), unpack(rows)
  slots, width = jnp.arange(len(riders.tokens), dtype=jnp.int32), piece.tokens.shape[0]
  state, (ok,) = alloc.allocate(state, piece.slot[None], piece.count[None], max_count=width)
  count, active = jnp.where(ok, piece.count, 0), riders.limits > 0
  state, rows_ok = alloc.allocate(state, slots, active.astype(jnp.int32), max_count=1)
  rows_ok &= active
  positions = state.num_tokens[piece.slot] - count + jnp.arange(width, dtype=jnp.int32)
  scale = model.config.head_dim**-0.5

  def attend(layer, q, k, v, carry):
    state, observation = carry
    out, state, observation = mixed_attention(
        state, observation, layer, q, k, v, slot=piece.slot, count=count, active=rows_ok, scale=scale, rule=rule,
        decode_rule=decode_rule, most_prefix=most_prefix)
    return out, (state, observation)

  positions = jnp.concatenate([positions, jnp.maximum(state.num_tokens[slots] - 1, 0)])
  found, (state, observation) = run_mixed(
      model, piece, riders, (ok, rows_ok), positions, attend, (state, observation), num_slots=state.num_slots)
  return found, state, observation


def run_mixed(
    model: Llama, chunk: PromptChunk, rows: DecodeRows, ok: tuple[jax.Array, jax.Array], positions: jax.Array,
    attend: Attend, state: Any, *, num_slots: int,
) -> tuple[Mixed, Any]:
  """What `mixed_step` is made of, for any cache: `ok` is bool [] and bool [R], `positions` are i32 [T+R]."""
  chunk_ok, rows_ok = ok
  hidden, state = model(jnp.concatenate([chunk.tokens, rows.tokens]), positions, attend, state)
  last = hidden[jnp.maximum(chunk.count - 1, 0)]
  logits = model.logits(jnp.concatenate([last[None], hidden[len(chunk.tokens):]]))
  drawn = sample(logits, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chunk.sampling, rows.sampling))
  tokens = drawn.at[1:].set(jnp.where(rows.given[:, 0] >= 0, rows.given[:, 0], drawn[1:]))
  wanted = jnp.any(chunk.logprobs) | jnp.any(rows.logprobs & rows_ok)
  logprobs = logprobs_of(logits, tokens, wanted)
  of_first, of_rows = (jax.tree.map(lambda a, part=part: a[part], logprobs) for part in (slice(1), slice(1, None)))
  nothing = _nothing(1, num_slots, logits.shape[-1])
  return Mixed(chunk_ok, logits[0], tokens[:1], of_first, _note(nothing, tokens[1:], rows_ok, of_rows)), state


@jax.jit
def follow(rows: Packed[DecodeRows], before: Decoded, asked: jax.Array) -> Packed[DecodeRows]:
  """Rows that go on where a call ended that nobody has looked at yet.

  Args:
    rows: as if each slot had taken all the steps that were asked of it.
    before: what the call found.
    asked: i32 [R] limits that it was given; slots with 0 were not in it, and stay as they are.

  Returns:
    Rows with the tokens that were drawn. Those who drew a stop id, or found no block, are at rest.
  """
  plain, slots = rows.unpacked(), jnp.arange(len(asked))
  last = before.tokens[jnp.maximum(asked, 1) - 1, slots]
  goes = (before.counts[slots] == asked) & ~jnp.any(last[:, None] == plain.stop_ids, axis=1)
  return Packed.of(dataclasses.replace(
      plain, tokens=jnp.where(asked > 0, last, plain.tokens), limits=jnp.where((asked > 0) & ~goes, 0, plain.limits)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Usage:
  """What a cache held at some time; arrays of their own, which no later step takes away.

  Attributes:
    held: i32 [S] blocks that each slot holds.
    free: i32 [] free blocks.
    lengths: i32 [L, S, H] KVs that each head holds.
  """

  held: jax.Array
  free: jax.Array
  lengths: jax.Array


@jax.jit
def usage(state: CacheState) -> Usage:
  """What the cache holds now."""
  held = jnp.sum(alloc.blocks_held(state.lengths, state.block_size), axis=(0, 2))
  return Usage(held, jnp.copy(state.free_count), jnp.copy(state.lengths))


@jax.jit
def held_positions(state: CacheState, slot: jax.Array) -> jax.Array:
  """Positions i32 [L, H, M*P] in the lists of one slot's heads; nonsense behind their lengths."""
  tables = state.tables[:, slot]
  return state.positions[tables].reshape(*tables.shape[:2], -1)


@functools.partial(jax.jit, static_argnames=("rule", "scale", "in_order"), donate_argnames="state")
def score_prompt(
    state: CacheState, observation: Observation, slot: jax.Array, *, scale: float, rule: ScoringRule,
    in_order: bool | None = None,
) -> CacheState:
  """Scores a prompt's KVs behind a chunk; see `score_observed`."""
  return score_observed(state, observation, slot, scale=scale, rule=rule, in_order=in_order)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvictRows:
  """What is to be evicted of B sequences; the arguments of `kvc_jax.eviction.step.evict` by their names there.

  Attributes:
    slots: i32 [B]; S = ignore.
    cache_tokens: i32 [B].
    window: i32 [B].
    sinks: i32 [B].
    first_query: i32 [B].
    keep: i32 [B, R, 2].
    least: i32 [B]; None for none.
    mass: f32 [B]; None for none.
    seen: i32 [B] tokens that each sequence has seen by now; one that has not, for it stopped or found no block, is
      left alone. None for whatever they have seen.
  """

  slots: jax.Array
  cache_tokens: jax.Array
  window: jax.Array
  sinks: jax.Array
  first_query: jax.Array
  keep: jax.Array
  least: jax.Array | None = None
  mass: jax.Array | None = None
  seen: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("rule", "allocation"), donate_argnames="state")
def evict(
    state: CacheState, rows: EvictRows | Packed[EvictRows], *, rule: ScoringRule, allocation: Allocation,
    model: Llama | FlatModel | None = None,
) -> tuple[CacheState, Eviction]:
  """`kvc_jax.eviction.step.evict`, jitted and donated; `model` for rules that need the output projection.

  `freed_blocks` is -1 of sequences that were left alone.
  """
  output = None if model is None else output_projections(_whole(model))
  given = unpack(rows)
  slots = given.slots
  if given.seen is not None:
    there = state.num_tokens[jnp.minimum(slots, state.num_slots - 1)] == given.seen
    slots = jnp.where(there, slots, state.num_slots)
  state, eviction = evict_step(
      state, slots, given.cache_tokens, given.window, given.sinks, given.first_query, given.keep, rule=rule,
      allocation=allocation, output=output, least=given.least, mass=given.mass)
  freed = jnp.where(slots < state.num_slots, eviction.freed_blocks, -1)
  return state, dataclasses.replace(eviction, freed_blocks=freed)


@functools.partial(jax.jit, donate_argnames="state")
def release(state: CacheState, slots: jax.Array) -> CacheState:
  """`kvc_jax.cache.alloc.release`, jitted and donated."""
  return alloc.release(state, slots)


@functools.partial(jax.jit, donate_argnames="state")
def hold(state: CacheState, slot: jax.Array) -> tuple[CacheState, share.Held]:
  """`kvc_jax.cache.share.hold`, jitted and donated."""
  return share.hold(state, slot)


@functools.partial(jax.jit, donate_argnames="state")
def adopt(state: CacheState, held: share.Held, slot: jax.Array) -> tuple[CacheState, jax.Array]:
  """`kvc_jax.cache.share.adopt`, jitted and donated."""
  return share.adopt(state, held, slot)


@functools.partial(jax.jit, donate_argnames="state")
def unshare(state: CacheState, slot: jax.Array) -> tuple[CacheState, jax.Array]:
  """`kvc_jax.cache.share.unshare`, jitted and donated."""
  return share.unshare(state, slot)


@functools.partial(jax.jit, donate_argnames="state")
def drop(state: CacheState, held: share.Held) -> CacheState:
  """`kvc_jax.cache.share.drop`, jitted and donated."""
  return share.drop(state, held)
