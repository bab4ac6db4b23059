"""Blocks that a request takes, known before it runs: what admission goes by.

A prompt that is compressed while it is prefilled never holds more than its budget and
the tokens of one interval. Whether it is, and at which tokens, follows from the request
and the size of the pool alone, never from the load or the size of a chunk.
"""

from collections.abc import Sequence as Sequences

import numpy as np

from kvc_jax.cache.state import CacheConfig
from kvc_jax.engine.sequence import Sequence
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression

DEFAULT_INTERVAL = 256
"""Prompt tokens between compressions where the pool, not the request, asks for them."""


def prefill_interval(config: CacheConfig, name: str, prompt_tokens: int, compression: Compression | None) -> int | None:
  """Prompt tokens from one compression to the next while prefilling; None for none before the prompt's end.

  What the request asks for, or by default a fixed number where the prompt is larger
  than the pool; halved until it fits the pool.

  Args:
    config: shape of the cache.
    name: of the prompt, for messages.
    prompt_tokens: its length.
    compression: of the request.

  Raises:
    InputError: the pool is too small for the request even when nothing else runs.
  """
  pool, whole = config.num_blocks - 1, config.blocks_for(prompt_tokens + 1)
  evicts = compression is not None and compression.cache_tokens(prompt_tokens) < prompt_tokens
  asked = compression.prefill_interval if compression is not None and evicts else None
  if asked is None and whole <= pool:
    return None
  if compression is None or not evicts:
    raise InputError(
        f"{name} needs {whole} blocks, but the pool has {pool}; raise num_blocks or kv_cache_memory_bytes, shorten "
        "the prompt, or compress it")
  interval = asked or DEFAULT_INTERVAL
  while _peak(config, prompt_tokens, compression, interval) > pool and interval > config.block_size:
    interval = max(interval // 2, config.block_size)
  if _peak(config, prompt_tokens, compression, interval) > pool:
    raise InputError(
        f"{name} needs {_peak(config, prompt_tokens, compression, interval)} blocks even when it is compressed, but "
        f"the pool has {pool}; raise num_blocks, kv_cache_memory_bytes or the rate, or lower max_cache_tokens or "
        "what is protected")
  return interval


def _peak(config: CacheConfig, prompt_tokens: int, compression: Compression, interval: int) -> int:
  """Blocks for the budget and `interval` tokens more of each head."""
  floor = config.blocks_for(compression.floor_tokens(prompt_tokens))
  return min(floor + config.blocks_for(interval), config.blocks_for(prompt_tokens + 1))


def peak_blocks(config: CacheConfig, sequence: Sequence) -> int:
  """Most blocks that a sequence holds before its second decode step."""
  if sequence.prefill_interval is None or sequence.compression is None:
    return config.blocks_for(len(sequence.prompt) + 1)
  return _peak(config, len(sequence.prompt), sequence.compression, sequence.prefill_interval)


def next_piece(sequence: Sequence, chunk_size: int, boundaries: int | None = None) -> int:
  """Prompt tokens to prefill next: a chunk, or less where the prompt ends or a compression is due.

  Args:
    sequence: whose prompt it is.
    chunk_size: most tokens.
    boundaries: cut at multiples of so many tokens as well; None for not.
  """
  left = min(chunk_size, len(sequence.prompt) - sequence.prefilled)
  for every in (sequence.prefill_interval, boundaries):
    left = left if every is None else min(left, every - sequence.prefilled % every)
  return left


def blocks_behind(config: CacheConfig, sequence: Sequence, count: int) -> int:
  """Most blocks that a sequence holds when `count` more prompt tokens are in the cache."""
  tokens = sequence.prefilled + count
  interval = sequence.prefill_interval
  if interval is None or sequence.compression is None:
    return config.blocks_for(tokens)
  floor = config.blocks_for(sequence.compression.floor_tokens(len(sequence.prompt)))
  since = (tokens - 1) % interval + 1  # tokens behind the last compression
  return min(floor + config.blocks_for(since), config.blocks_for(tokens))


def excess_blocks(config: CacheConfig, sequence: Sequence) -> int:
  """Blocks, at least, that a compression now would free of a sequence that decodes."""
  compression = sequence.compression
  if compression is None or sequence.compressed_at == sequence.tokens_seen:
    return 0
  return max(sequence.held_blocks - config.blocks_for(compression.floor_tokens(sequence.tokens_seen)), 0)


def blocks_after(config: CacheConfig, sequence: Sequence, steps: int) -> int:
  """Blocks that a sequence holds about `steps` decode steps from now, in the middle of a compression's interval."""
  compression, tokens = sequence.compression, len(sequence.prompt) + sequence.steps + steps
  whole = config.blocks_for(tokens)
  if compression is None:
    return whole
  if compression.interval is None:  # what comes behind the prompt stays
    floor, since = compression.floor_tokens(len(sequence.prompt)), sequence.steps + steps
  else:
    floor, since = compression.floor_tokens(tokens), compression.interval // 2
  return min(config.blocks_for(floor) + config.blocks_for(since), whole)


def fit_ahead(config: CacheConfig, sequences: Sequences[Sequence], share: float) -> bool:
  """Whether the pool has room for all of these until each has generated `share` of what max_tokens leaves it.

  Taken for linear between now and then. Most is held when one of them gets there.
  """
  context = config.max_blocks_per_head * config.block_size
  left = np.array([
      max(int(share * (min(s.params.max_tokens, context - len(s.prompt)) - 1 - s.steps)), 0) for s in sequences])
  now, last = (
      np.array([blocks_after(config, s, int(steps)) for s, steps in zip(sequences, at, strict=True)])
      for at in (np.zeros_like(left), left))
  ends = left[:, None]
  held = now + (last - now) * ends / np.maximum(left, 1)  # [ends, sequences]
  return bool((np.where(left >= ends, held, 0).sum(axis=1) <= config.num_blocks - 1).all())
