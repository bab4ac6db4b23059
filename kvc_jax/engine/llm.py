"""`LLM`: prompts in, text and compression receipts out."""

import collections
import dataclasses
import operator
import os
import pathlib
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequences
from typing import Any

import jax
import numpy as np
import tqdm
from jax.typing import DTypeLike

from kvc_jax.cache.quantize import FP8
from kvc_jax.cache.state import CacheConfig
from kvc_jax.checkpoint.store import load_model
from kvc_jax.config import LlamaConfig
from kvc_jax.engine.batch import Batch, Sequence
from kvc_jax.engine.calibrate import kv_scales
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.request import FinishReason, RequestOutput, SamplingParams, StreamChunk
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.kernels import backends
from kvc_jax.model.llama import Llama, unstack_layers
from kvc_jax.tokenizer import IncrementalDecoder, Tokenizer

Prompt = str | list[int]
OnText = Callable[[StreamChunk], None]
OnResult = Callable[[RequestOutput], None]

_CPU_POOL_BYTES = 1 << 30
_CALIBRATION_TOKENS = 256
_DEVICE_MEMORY_SHARE = 0.9


class LLM:
  """A Llama with a compressible cache, for offline generation.

  Attributes:
    config: shape of the cache.
    tokenizer: of the model folder.
    max_model_len: most tokens of prompt and output together.
  """

  def __init__(
      self,
      model: str | pathlib.Path,
      *,
      dtype: DTypeLike | None = None,
      kv_cache_dtype: str = "auto",
      max_model_len: int | None = None,
      max_num_seqs: int = 8,
      block_size: int = 16,
      chunk_size: int = 256,
      num_blocks: int | None = None,
      kv_cache_memory_bytes: int | None = None,
      seed: int = 0,
      progress: bool = False,
  ):
    """Loads a model and allocates the pool.

    Args:
      model: folder of a Hugging Face or converted checkpoint.
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
      progress: show a progress bar while loading, where stderr is a terminal.

    Raises:
      InputError: a missing or broken model folder, or sizes that do not fit.
    """
    # The quickest checks come first: loading can take minutes.
    if block_size < 1 or block_size & (block_size - 1):
      raise InputError(f"block_size is {block_size}; give a power of two, such as 16")
    if chunk_size < 1 or max_num_seqs < 1:
      raise InputError(f"chunk_size is {chunk_size} and max_num_seqs {max_num_seqs}; both must be at least 1")
    _check_choices(kv_cache_dtype)
    shape = LlamaConfig.from_folder(model)
    self.tokenizer = Tokenizer.from_folder(model)
    self._model = load_model(model, dtype=dtype, progress=progress)
    if backends.device_capability() is not None:
      self._model = unstack_layers(self._model)
    self.max_model_len = _context(max_model_len, shape.max_position_embeddings)
    self.config = _cache_config(
        self._model, self.max_model_len, max_num_seqs, block_size, num_blocks, kv_cache_memory_bytes,
        FP8 if kv_cache_dtype == "fp8" else self._model.embed.embedding[...].dtype)
    scales = _calibrated(self._model, self.max_model_len) if kv_cache_dtype == "fp8" else None
    self._batch = Batch(self._model, self.config, min(chunk_size, self.max_model_len), scales)
    self._eos_ids = self.tokenizer.eos_ids | frozenset(shape.eos_token_ids)
    self._seeds = np.random.SeedSequence(seed)
    self._busy = False

  def generate(
      self,
      prompts: Prompt | Sequences[Prompt],
      sampling_params: SamplingParams | Sequences[SamplingParams] | None = None,
      compression: Compression | None = None,
      *,
      on_text: OnText | None = None,
      on_result: OnResult | None = None,
      return_positions: bool = False,
      progress: bool = False,
  ) -> list[RequestOutput]:
    """Generates text for each prompt.

    Prompts run together, as many as slots and blocks allow; the others wait. Where
    the pool runs out, the newest starts over once another has ended; its text stays.

    Args:
      prompts: text or token ids; one or many, of any lengths.
      sampling_params: one for all, or one for each prompt.
      compression: None holds every KV.
      on_text: called with each piece of text as it comes.
      on_result: called with each prompt's result as it ends, so that none is lost
        where a later one fails or the user breaks off.
      return_positions: put the positions of the KVs held at the end into the receipts.
      progress: show a progress bar on stderr.

    Returns:
      One result per prompt, in the order of the prompts.

    Raises:
      InputError: before anything runs, where a prompt is empty, too long, out of
        the vocabulary, or larger than the whole pool.
      RuntimeError: called from a callback of a call that has not ended.
    """
    if self._busy:
      raise RuntimeError("generate is running; a callback cannot call it again")
    sequences = self._sequences(prompts, sampling_params, compression)
    self._busy = True
    try:
      return self._run(sequences, on_text, on_result, return_positions, progress)
    except BaseException:
      # A step that was broken off may have donated the cache and not given it back.
      self._batch.reset()
      raise
    finally:
      self._busy = False

  def _run(self, sequences, on_text, on_result, return_positions, progress) -> list[RequestOutput]:
    waiting = collections.deque(sequences)
    running: list[Sequence] = []
    outputs: dict[int, RequestOutput] = {}
    with tqdm.tqdm(total=len(sequences), disable=not progress, unit="prompt", desc="generating") as bar:
      full = False  # the pool ran out: nobody joins before somebody has ended
      while waiting or running:
        if not full:
          self._admit(waiting, running, on_text)
        if not self._decode(running, on_text):
          self._make_room(waiting, running, on_text)
          full = True
        for sequence in [s for s in running if s.finish_reason]:
          outputs[sequence.index] = self._result(sequence, return_positions)
          running.remove(sequence)
          self._batch.release(sequence)
          full = False
          bar.update()
          if on_result:
            on_result(outputs[sequence.index])
    return [outputs[i] for i in range(len(sequences))]

  def chat(
      self,
      messages: Sequences[dict[str, Any]],
      sampling_params: SamplingParams | None = None,
      compression: Compression | None = None,
      **options: Any,
  ) -> RequestOutput:
    """Generates the answer to a conversation, through the model's chat template.

    Args:
      messages: [{"role": ..., "content": ...}, ...].
      sampling_params: as for `generate`.
      compression: as for `generate`.
      **options: further arguments of `generate`.

    Raises:
      InputError: the model folder has no chat template.
    """
    prompt = self.tokenizer.apply_chat_template(list(messages))
    return self.generate([prompt], sampling_params, compression, **options)[0]

  @property
  def free_blocks(self) -> int:
    """Blocks of the pool that are free now."""
    return self._batch.free_blocks

  def _sequences(self, prompts, sampling_params, compression) -> list[Sequence]:
    prompts = _as_list(prompts)
    params = SamplingParams() if sampling_params is None else sampling_params
    every = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
    if not all(isinstance(p, SamplingParams) for p in every):
      raise InputError("sampling_params must be SamplingParams, or a list of them")
    if compression is not None and not isinstance(compression, Compression):
      raise InputError(f"compression is {compression!r}; give a Compression, such as Compression(rate=8), or None")
    if len(every) != len(prompts):
      raise InputError(f"{len(prompts)} prompts but {len(every)} SamplingParams; give one, or one for each prompt")
    ids = [self._prompt_ids(i, prompt) for i, prompt in enumerate(prompts)]
    return [self._sequence(i, *pair, compression) for i, pair in enumerate(zip(ids, every, strict=True))]

  def _sequence(self, index: int, prompt: list[int], params: SamplingParams, compression) -> Sequence:
    if params.seed is None:  # another one for every request that this engine ever serves
      params = dataclasses.replace(params, seed=int(self._seeds.spawn(1)[0].generate_state(1)[0]))
    decoder = IncrementalDecoder(
        self.tokenizer, skip_special_tokens=params.skip_special_tokens, context=prompt)
    return Sequence(index=index, prompt=prompt, params=params, compression=compression,
                    output=OutputText(decoder, params.stop_strings))

  def _prompt_ids(self, index: int, prompt: Prompt) -> list[int]:
    """Encodes and checks a prompt."""
    ids = self._encoded(index, prompt)
    vocab = self._model.config.vocab_size
    if not ids:
      raise InputError(f"prompt {index} has no tokens; give at least one token id")
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong:
      raise InputError(f"prompt {index}: token id {wrong[0]} is outside the vocabulary of {vocab} tokens")
    if len(ids) >= self.max_model_len:
      raise InputError(
          f"prompt {index} has {len(ids)} tokens, but the context is {self.max_model_len} with at least one "
          "to generate; shorten it or raise max_model_len up to the model's own context")
    if self._blocks_to_start(ids) > self.config.num_blocks - 1:
      raise InputError(
          f"prompt {index} needs {self._blocks_to_start(ids)} blocks, but the pool has "
          f"{self.config.num_blocks - 1}; raise num_blocks or kv_cache_memory_bytes, or shorten the prompt")
    return ids

  def _encoded(self, index: int, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
      return self.tokenizer.encode(prompt)
    if isinstance(prompt, bytes):
      raise InputError(f"prompt {index} is bytes; decode it to text first")
    try:
      return [operator.index(i) for i in prompt]
    except TypeError:
      raise InputError(f"prompt {index} is neither a text nor a list of token ids") from None

  def _blocks_to_start(self, prompt: list[int]) -> int:
    """The prompt's blocks and room for the first token behind it."""
    return self.config.blocks_for(len(prompt) + 1)

  def _admit(self, waiting: collections.deque, running: list[Sequence], on_text: OnText | None) -> None:
    """Prefills waiting prompts, in order, while slots and blocks last."""
    while waiting and self._batch.has_free_slot:
      if self._blocks_to_start(waiting[0].prompt) > self._batch.free_blocks:
        return
      sequence = waiting.popleft()
      running.append(sequence)
      logits = self._batch.prefill(sequence)
      if sequence.compression:
        self._batch.compress([sequence])
      if not sequence.token_ids:
        token = self._batch.sample(logits[None], [sequence])[0]
        self._accept(sequence, int(token), on_text)

  def _decode(self, running: list[Sequence], on_text: OnText | None) -> bool:
    """One token for every sequence that has not ended, then the compressions that are due.

    Returns False where sequences are left to run but none of them got a block.
    """
    going = [s for s in running if not s.finish_reason]
    if not going:
      return True
    draws = [s for s in going if s.is_new_ground]
    logits, ok = self._batch.decode(going)
    by_slot: list[Sequence | None] = [None] * self.config.num_slots
    for sequence in draws:
      by_slot[sequence.slot] = sequence
    tokens = self._batch.sample(logits, by_slot)
    moved = [s for s in going if ok[s.slot]]
    due = [s for s in moved if _is_due(s)]
    if due:
      self._batch.compress(due)
    for sequence in moved:
      if sequence in draws:
        self._accept(sequence, int(tokens[sequence.slot]), on_text)
    return bool(moved)

  def _make_room(self, waiting: collections.deque, running: list[Sequence], on_text: OnText | None) -> None:
    """No block is free and nobody will free one: the newest gives way, or ends if it is alone."""
    if any(s.finish_reason for s in running):
      return None  # blocks are about to come back
    if len(running) == 1:
      return self._finish(running[0], "cache_full", on_text)
    victim = running.pop()
    self._batch.release(victim)
    victim.restart()
    waiting.appendleft(victim)
    return None

  def _accept(self, sequence: Sequence, token: int, on_text: OnText | None) -> None:
    """Takes a generated token: text, stop conditions, callback."""
    params = sequence.params
    sequence.token_ids.append(token)
    ended = token in params.stop_token_ids or (token in self._eos_ids and not params.ignore_eos)
    if ended:
      return self._finish(sequence, "stop", on_text)
    piece = sequence.output.add(token)
    if sequence.output.stopped:
      return self._finish(sequence, "stop", on_text, piece)
    length = len(sequence.prompt) + len(sequence.token_ids)
    if len(sequence.token_ids) >= params.max_tokens or length >= self.max_model_len:
      return self._finish(sequence, "length", on_text, piece)
    if piece:
      self._give(sequence, piece, on_text)
    return None

  def _finish(
      self, sequence: Sequence, reason: FinishReason, on_text: OnText | None, piece: str = ""
  ) -> None:
    piece += sequence.output.finish()
    # The text may end in a stop string that only the last bytes completed.
    sequence.finish_reason = "stop" if sequence.output.stopped else reason
    self._give(sequence, piece, on_text)

  def _give(self, sequence: Sequence, piece: str, on_text: OnText | None) -> None:
    """Hands text, and the ids since the last piece, to the callback."""
    if on_text:
      ids = sequence.token_ids[sequence.ids_given :]
      sequence.ids_given += len(ids)
      on_text(StreamChunk(index=sequence.index, text=piece, token_ids=ids, finish_reason=sequence.finish_reason))

  def _result(self, sequence: Sequence, positions: bool) -> RequestOutput:
    assert sequence.finish_reason is not None
    return RequestOutput(
        index=sequence.index, prompt_token_ids=sequence.prompt, token_ids=sequence.token_ids,
        text=sequence.output.text, finish_reason=sequence.finish_reason,
        receipt=self._batch.receipt(sequence, positions=positions))


def _as_list(prompts: Prompt | Sequences[Prompt]) -> list[Prompt]:
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
    raise InputError(f"prompts is {prompts!r}; give a text, a list of token ids, or a list of these")
  every: list[Any] = list(prompts)
  one = bool(every) and isinstance(every[0], (int, np.integer))  # one prompt, as ids
  return [every] if one else every


def _is_due(sequence: Sequence) -> bool:
  compression = sequence.compression
  return bool(compression and compression.interval and sequence.steps % compression.interval == 0)


def _context(asked: int | None, own: int) -> int:
  if asked is not None and not 2 <= asked <= own:
    raise InputError(f"max_model_len is {asked}; give 2 to {own}, the model's own context")
  return asked or own


def _check_choices(kv_cache_dtype: str) -> None:
  if kv_cache_dtype not in ("auto", "fp8"):
    raise InputError(f"kv_cache_dtype is {kv_cache_dtype!r}; give 'auto' or 'fp8'")
  try:
    backends.requested()
  except ValueError as e:
    raise InputError(str(e)) from None


def _calibrated(model: Llama, max_model_len: int) -> jax.Array:
  """Scales of an FP8 cache."""
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, min(_CALIBRATION_TOKENS, max_model_len))
  return kv_scales(model, tokens.astype(np.int32))


def _cache_config(
    model: Llama, max_model_len: int, max_num_seqs: int, block_size: int,
    num_blocks: int | None, memory_bytes: int | None, dtype: DTypeLike,
) -> CacheConfig:
  shape = model.config
  config = CacheConfig(
      num_layers=shape.num_layers, num_slots=max_num_seqs, num_kv_heads=shape.num_kv_heads,
      head_dim=shape.head_dim, num_blocks=2, max_blocks_per_head=-(-max_model_len // block_size),
      block_size=block_size, dtype=dtype, num_heads=shape.num_heads)
  if num_blocks is None:
    wanted = max_num_seqs * config.blocks_for(max_model_len)
    budget = memory_bytes if memory_bytes is not None else _free_memory()
    num_blocks = min(wanted, budget // config.bytes_per_block - 1) + 1
  if num_blocks <= config.heads_per_sequence:
    raise InputError(
        f"the pool has {max(num_blocks, 0)} blocks, but one sequence needs at least "
        f"{config.heads_per_sequence + 1} (a block for each of {config.heads_per_sequence} heads, and the "
        "null block); raise num_blocks or kv_cache_memory_bytes")
  config = dataclasses.replace(config, num_blocks=num_blocks)
  tables = max_num_seqs * config.heads_per_sequence * config.max_blocks_per_head * 4
  _check_pool_fits(config.num_blocks * config.bytes_per_block + tables)
  return config


def _check_pool_fits(pool_bytes: int) -> None:
  """An allocation above the host's memory would end in the kernel's killing the process."""
  stats = jax.devices()[0].memory_stats() or {}
  memory = stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  if pool_bytes > memory:
    raise InputError(
        f"the cache would take {pool_bytes:,} bytes, but the device has {memory:,}; "
        "lower num_blocks, kv_cache_memory_bytes, max_num_seqs or max_model_len")


def _free_memory() -> int:
  """Bytes that the pool may take where the caller does not say."""
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" not in stats:
    return _CPU_POOL_BYTES
  return int(_DEVICE_MEMORY_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
