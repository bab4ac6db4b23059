"""How large an engine's pool is, from what the caller says and what the device has."""

import dataclasses
import os

import jax
import numpy as np
from jax.typing import DTypeLike

from kvc_jax.cache.state import CacheConfig
from kvc_jax.engine.calibrate import kv_scales
from kvc_jax.errors import InputError, check_count
from kvc_jax.kernels import backends
from kvc_jax.model.llama import Llama

_CPU_POOL_BYTES = 1 << 30
_CALIBRATION_TOKENS = 256
_DEVICE_MEMORY_SHARE = 0.9


def check_sizes(block_size: int, chunk_size: int, max_num_seqs: int, kv_cache_dtype: str) -> None:
  """The quickest checks, before a model is loaded.

  Raises:
    InputError: naming what is wrong.
  """
  check_count("Engine: block_size", block_size, at_least=1)
  if block_size & (block_size - 1):
    raise InputError(f"block_size is {block_size}; give a power of two, such as 16")
  check_count("Engine: chunk_size", chunk_size, at_least=1)
  check_count("Engine: max_num_seqs", max_num_seqs, at_least=1)
  if kv_cache_dtype not in ("auto", "fp8"):
    raise InputError(f"kv_cache_dtype is {kv_cache_dtype!r}; give 'auto' or 'fp8'")
  try:
    backends.requested()
  except ValueError as e:
    raise InputError(str(e)) from None


def context_length(asked: int | None, own: int) -> int:
  """Most tokens of a sequence: what is asked for, or the model's `own`.

  Raises:
    InputError: more than the model can.
  """
  if asked is not None and not 2 <= asked <= own:
    raise InputError(f"max_model_len is {asked}; give 2 to {own}, the model's own context")
  return asked or own


def calibrated_scales(model: Llama, max_model_len: int) -> jax.Array:
  """Scales of an FP8 cache."""
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, min(_CALIBRATION_TOKENS, max_model_len))
  return kv_scales(model, tokens.astype(np.int32))


def pool_config(
    model: Llama, max_model_len: int, max_num_seqs: int, block_size: int,
    num_blocks: int | None, memory_bytes: int | None, dtype: DTypeLike, sharing: bool = False,
) -> CacheConfig:
  """Shape of the cache; `num_blocks` counts before `memory_bytes`, and the device's memory where neither is given.

  Raises:
    InputError: the pool is too small for one sequence, or too large for the device.
  """
  shape = model.config
  config = CacheConfig(
      num_layers=shape.num_layers, num_slots=max_num_seqs, num_kv_heads=shape.num_kv_heads,
      head_dim=shape.head_dim, num_blocks=2, max_blocks_per_head=-(-max_model_len // block_size),
      block_size=block_size, dtype=dtype, num_heads=shape.num_heads, sharing=sharing)
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
  limit = stats["bytes_limit"]
  free = limit - stats.get("bytes_in_use", 0)
  if "pool_bytes" in stats:  # what the allocator holds of the device. The cache is one array: it wants one gap
    free = min(free, max(limit - stats["pool_bytes"], stats.get("largest_free_block_bytes", 0)))
  return int(_DEVICE_MEMORY_SHARE * free)
