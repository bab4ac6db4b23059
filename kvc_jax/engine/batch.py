"""The running batch: the cache on the device, and what the host knows of each slot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.attention.prefill import init_observation
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.engine import steps
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.request import CompressionReceipt, FinishReason, SamplingParams
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score import ScoringRule, first_observed
from kvc_jax.model.llama import Llama
from kvc_jax.sampling import SamplingArrays, sample

_EVICT_TOKENS = 32_768


@dataclasses.dataclass(kw_only=True, eq=False)
class Sequence:
  """One request while it is served (host side, mutable).

  Attributes:
    index: place of the prompt in the caller's list.
    prompt: token ids.
    params: how to sample; `seed` is set.
    compression: None for a request that is not compressed.
    output: decoded text so far.
    token_ids: ids generated so far; the newest is not in the cache yet.
    ids_given: how many of them a streaming callback has seen.
    slot: of the cache, -1 while waiting.
    steps: decode steps done; fewer than len(token_ids) - 1 while a preempted
      request catches up with what it had generated.
    compressions: evictions run.
    freed_blocks: blocks that they gave back.
    finish_reason: set when the request has ended.
  """

  index: int
  prompt: list[int]
  params: SamplingParams
  compression: Compression | None
  output: OutputText
  token_ids: list[int] = dataclasses.field(default_factory=list)
  ids_given: int = 0
  slot: int = -1
  steps: int = 0
  compressions: int = 0
  freed_blocks: int = 0
  finish_reason: FinishReason | None = None

  @property
  def tokens_seen(self) -> int:
    """Tokens that went through the cache."""
    return len(self.prompt) + self.steps

  @property
  def is_new_ground(self) -> bool:
    """Whether the token that comes next was not generated before a preemption."""
    return self.steps == len(self.token_ids) - 1

  def restart(self) -> None:
    """Goes back to the prompt; what was generated stays and is run again, not drawn again."""
    self.steps = self.compressions = self.freed_blocks = 0


class Batch:
  """Slots of one cache and the transitions that an engine composes.

  Attributes:
    config: shape of the cache.
    state: the cache; replaced by every transition.
    chunk_size: tokens of a prefill chunk.
  """

  def __init__(self, model: Llama, config: CacheConfig, chunk_size: int, kv_scales: jax.Array | None = None):
    self.model = model
    self.config = config
    self.chunk_size = chunk_size
    self._kv_scales = None if kv_scales is None else np.asarray(kv_scales)
    self._start_empty()
    # Sequences per eviction call: each costs temporaries of some bytes for every KV its tables could hold.
    longest = config.max_blocks_per_head * config.block_size
    self._evict_rows = max(1, min(config.num_slots, 4, _EVICT_TOKENS // longest))

  def reset(self) -> None:
    """Empties the cache, whatever state an exception may have left it in."""
    for array in jax.tree.leaves(self.state):
      array.delete()  # before the new pool is made: there may not be room for two
    self._start_empty()

  def _start_empty(self) -> None:
    self.state = init_cache(self.config, self._kv_scales)
    self._free_slots = list(range(self.config.num_slots - 1, -1, -1))

  @property
  def free_blocks(self) -> int:
    """Blocks on the free stack (waits for the device)."""
    return int(self.state.free_count)

  @property
  def has_free_slot(self) -> bool:
    return bool(self._free_slots)

  def prefill(self, sequence: Sequence) -> jax.Array:
    """Takes a slot, runs the prompt in chunks and scores it; returns logits [V].

    The caller has checked that a slot and the prompt's blocks are free.
    """
    sequence.slot = self._free_slots.pop()
    slot = jnp.asarray(sequence.slot, jnp.int32)
    rule = sequence.compression.scoring if sequence.compression else None
    shape = self.model.config
    observation = init_observation(
        rule, shape.num_layers, shape.num_heads, shape.head_dim, self.config.query_dtype)
    for start in range(0, len(sequence.prompt), self.chunk_size):
      piece = sequence.prompt[start : start + self.chunk_size]
      tokens = np.zeros(self.chunk_size, np.int32)
      tokens[: len(piece)] = piece
      logits, ok, self.state, observation = steps.prefill_chunk(
          self.model, self.state, observation, tokens, slot, jnp.asarray(len(piece), jnp.int32), rule=rule)
    if not ok:
      raise RuntimeError("prefill was admitted without its blocks")
    if rule is not None:
      self.state = steps.score_prompt(
          self.state, observation, slot, scale=shape.head_dim**-0.5, rule=rule)
    return logits

  def decode(self, sequences: list[Sequence]) -> tuple[jax.Array, np.ndarray]:
    """Runs one token of each sequence; returns logits [S, V] and ok [S].

    A sequence whose slot is not ok got no block and has not moved.
    """
    tokens = np.zeros(self.config.num_slots, np.int32)
    active = np.zeros(self.config.num_slots, bool)
    for sequence in sequences:
      tokens[sequence.slot] = sequence.token_ids[sequence.steps]
      active[sequence.slot] = True
    logits, ok, self.state = steps.decode_step(
        self.model, self.state, tokens, active, rule=_decode_rule(sequences))
    ok = np.asarray(ok)
    for sequence in sequences:
      sequence.steps += int(ok[sequence.slot])
    return logits, ok

  def sample(self, logits: jax.Array, sequences: list[Sequence | None]) -> np.ndarray:
    """Draws a token id for each row of logits; a row without a sequence draws anything."""
    rows = [_sampling_row(s, self.model.config.vocab_size) for s in sequences]
    columns = [jnp.asarray(c, d) for c, d in zip(zip(*rows, strict=True), _SAMPLING_DTYPES, strict=True)]
    return np.asarray(_sample(logits, SamplingArrays(*columns)))

  def compress(self, sequences: list[Sequence]) -> None:
    """Evicts each sequence down to its own budget; all share one rule and allocation."""
    for start in range(0, len(sequences), self._evict_rows):
      self._compress_rows(sequences[start : start + self._evict_rows])

  def _compress_rows(self, sequences: list[Sequence]) -> None:
    first = _compression(sequences[0])
    rows = np.zeros((5, self._evict_rows), np.int32)
    rows[0] = self.config.num_slots  # rows without a sequence are ignored
    for i, sequence in enumerate(sequences):
      compression = _compression(sequence)
      rows[:, i] = (
          sequence.slot, compression.cache_tokens(sequence.tokens_seen), compression.window, compression.sinks,
          first_observed(compression.scoring, len(sequence.prompt)))
    self.state, eviction = steps.evict(self.state, *rows, rule=first.scoring, allocation=first.allocation)
    for sequence, freed in zip(sequences, np.asarray(eviction.freed_blocks), strict=False):
      sequence.compressions += 1
      sequence.freed_blocks += int(freed)

  def release(self, sequence: Sequence) -> None:
    """Frees the sequence's blocks and slot."""
    self.state = steps.release(self.state, jnp.asarray([sequence.slot], jnp.int32))
    self._free_slots.append(sequence.slot)
    sequence.slot = -1

  def receipt(self, sequence: Sequence, *, positions: bool = False) -> CompressionReceipt:
    """What the sequence holds now; with `positions`, which tokens too."""
    lengths = np.asarray(self.state.lengths[:, sequence.slot])
    return CompressionReceipt(
        tokens_seen=sequence.tokens_seen,
        kvs_kept=lengths,
        blocks_uncompressed=self.config.blocks_for(sequence.tokens_seen),
        blocks_held=int((-(-lengths // self.config.block_size)).sum()),
        bytes_per_block=self.config.bytes_per_block,
        freed_blocks=sequence.freed_blocks,
        compressions=sequence.compressions,
        rate_asked=sequence.compression.rate if sequence.compression else 1.0,
        positions=self._positions(sequence.slot, lengths) if positions else None,
    )

  def _positions(self, slot: int, lengths: np.ndarray) -> np.ndarray:
    held = np.asarray(self.state.positions[self.state.tables[:, slot]]).reshape(*lengths.shape, -1)
    index = np.arange(held.shape[-1])
    last = np.iinfo(np.int32).max
    ordered = np.sort(np.where(index < lengths[..., None], held, last), axis=-1)[..., : lengths.max()]
    return np.where(ordered == last, -1, ordered)


_sample = jax.jit(sample)
_SAMPLING_DTYPES = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)


def _sampling_row(sequence: Sequence | None, vocab_size: int) -> tuple[float, ...]:
  if sequence is None:
    return (0.0, 0, 1.0, 0.0, 0, 0)
  params = sequence.params
  return (params.temperature, min(max(params.top_k, 0), vocab_size), params.top_p, params.min_p, params.seed or 0,
          len(sequence.token_ids))


def _compression(sequence: Sequence) -> Compression:
  assert sequence.compression is not None
  return sequence.compression


def _decode_rule(sequences: list[Sequence]) -> ScoringRule | None:
  """Decode keeps scores up to date only where a later compression will read them."""
  for sequence in sequences:
    if sequence.compression and sequence.compression.interval is not None:
      return sequence.compression.scoring
  return None
