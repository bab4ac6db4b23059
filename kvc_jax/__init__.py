"""Paged KV-cache compression with a different rate for every attention head.

Two levels. `LLM` generates text with a compressed cache (and `Engine` serves requests
that come and go):

    from kvc_jax import LLM, Compression, SamplingParams
    llm = LLM("path/to/model")
    outputs = llm.generate(prompts, SamplingParams(max_tokens=64), Compression(rate=8))

Below it are pure functions on `CacheState` for use under one's own `jit`:
`init_cache`, `allocate`, `prefill_attention`, `score_observed`,
`decode_attention`, `evict`, `release`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from kvc_jax.attention.decode import decode_attention
  from kvc_jax.attention.prefill import Observation, init_observation, prefill_attention, score_observed
  from kvc_jax.cache.alloc import allocate, release
  from kvc_jax.cache.sequence_file import SavedSequence, load_sequence, save_sequence
  from kvc_jax.cache.share import Held, adopt, drop, hold, unshare
  from kvc_jax.cache.snapshot import SequenceSnapshot, export_sequence, import_sequence
  from kvc_jax.cache.state import CacheConfig, CacheState, check_invariants, init_cache
  from kvc_jax.cache.write import write
  from kvc_jax.checkpoint.convert import convert
  from kvc_jax.checkpoint.store import load_model
  from kvc_jax.config import LlamaConfig, RopeConfig
  from kvc_jax.engine.engine import Engine
  from kvc_jax.engine.llm import LLM
  from kvc_jax.engine.profile import measure_profile
  from kvc_jax.engine.request import (
      CompressionReceipt,
      EngineStats,
      RequestOutput,
      SamplingParams,
      StreamChunk,
      TokenLogprobs,
      Update,
  )
  from kvc_jax.errors import InputError, QueueFull
  from kvc_jax.eviction.compression import Compression
  from kvc_jax.eviction.profile import HeadProfile
  from kvc_jax.eviction.score import HeldKVs, LayerKVs, ScoringRule
  from kvc_jax.eviction.score_critical import CriticalKV
  from kvc_jax.eviction.score_expected import ExpectedAttention
  from kvc_jax.eviction.score_full import FullAttention
  from kvc_jax.eviction.score_h2o import H2O
  from kvc_jax.eviction.score_head_bias import HeadBias
  from kvc_jax.eviction.score_key_norm import KeyNorm
  from kvc_jax.eviction.score_keydiff import KeyDiff
  from kvc_jax.eviction.score_random import RandomScore
  from kvc_jax.eviction.score_snapkv import SnapKV
  from kvc_jax.eviction.score_streaming import StreamingLLM
  from kvc_jax.eviction.score_tova import TOVA
  from kvc_jax.eviction.score_window import WindowAttention
  from kvc_jax.eviction.step import Eviction, evict
  from kvc_jax.model.fingerprint import fingerprint
  from kvc_jax.model.llama import Llama

__version__ = "0.1.0"

_HOMES = {
    "LLM": "engine.llm",
    "Engine": "engine.engine",
    "EngineStats": "engine.request",
    "Update": "engine.request",
    "TokenLogprobs": "engine.request",
    "SamplingParams": "engine.request",
    "RequestOutput": "engine.request",
    "StreamChunk": "engine.request",
    "CompressionReceipt": "engine.request",
    "Compression": "eviction.compression",
    "ScoringRule": "eviction.score",
    "HeadProfile": "eviction.profile",
    "HeadBias": "eviction.score_head_bias",
    "measure_profile": "engine.profile",
    "HeldKVs": "eviction.score",
    "LayerKVs": "eviction.score",
    "SnapKV": "eviction.score_snapkv",
    "H2O": "eviction.score_h2o",
    "TOVA": "eviction.score_tova",
    "StreamingLLM": "eviction.score_streaming",
    "KeyNorm": "eviction.score_key_norm",
    "KeyDiff": "eviction.score_keydiff",
    "ExpectedAttention": "eviction.score_expected",
    "CriticalKV": "eviction.score_critical",
    "WindowAttention": "eviction.score_window",
    "FullAttention": "eviction.score_full",
    "RandomScore": "eviction.score_random",
    "CacheConfig": "cache.state",
    "CacheState": "cache.state",
    "init_cache": "cache.state",
    "check_invariants": "cache.state",
    "allocate": "cache.alloc",
    "release": "cache.alloc",
    "write": "cache.write",
    "Held": "cache.share",
    "hold": "cache.share",
    "adopt": "cache.share",
    "unshare": "cache.share",
    "drop": "cache.share",
    "SequenceSnapshot": "cache.snapshot",
    "export_sequence": "cache.snapshot",
    "import_sequence": "cache.snapshot",
    "SavedSequence": "cache.sequence_file",
    "save_sequence": "cache.sequence_file",
    "load_sequence": "cache.sequence_file",
    "fingerprint": "model.fingerprint",
    "Observation": "attention.prefill",
    "init_observation": "attention.prefill",
    "prefill_attention": "attention.prefill",
    "score_observed": "attention.prefill",
    "decode_attention": "attention.decode",
    "Eviction": "eviction.step",
    "evict": "eviction.step",
    "Llama": "model.llama",
    "LlamaConfig": "config",
    "RopeConfig": "config",
    "load_model": "checkpoint.store",
    "convert": "checkpoint.convert",
    "InputError": "errors",
    "QueueFull": "errors",
}

__all__ = [
    "H2O",
    "LLM",
    "TOVA",
    "CacheConfig",
    "CacheState",
    "Compression",
    "CompressionReceipt",
    "CriticalKV",
    "Engine",
    "EngineStats",
    "Eviction",
    "ExpectedAttention",
    "FullAttention",
    "HeadBias",
    "HeadProfile",
    "Held",
    "HeldKVs",
    "InputError",
    "KeyDiff",
    "KeyNorm",
    "LayerKVs",
    "Llama",
    "LlamaConfig",
    "Observation",
    "QueueFull",
    "RandomScore",
    "RequestOutput",
    "RopeConfig",
    "SamplingParams",
    "SavedSequence",
    "ScoringRule",
    "SequenceSnapshot",
    "SnapKV",
    "StreamChunk",
    "StreamingLLM",
    "TokenLogprobs",
    "Update",
    "WindowAttention",
    "adopt",
    "allocate",
    "check_invariants",
    "convert",
    "decode_attention",
    "drop",
    "evict",
    "export_sequence",
    "fingerprint",
    "hold",
    "import_sequence",
    "init_cache",
    "init_observation",
    "load_model",
    "load_sequence",
    "measure_profile",
    "prefill_attention",
    "release",
    "save_sequence",
    "score_observed",
    "unshare",
    "write",
]


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use, so that `import kvc_jax` does not start JAX."""
  if name not in _HOMES:
    raise AttributeError(f"module 'kvc_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"kvc_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return [*globals(), *__all__]
