"""What a request is checked for before the engine takes it."""

import operator
from typing import Any

from kvc_jax.cache.state import CacheConfig
from kvc_jax.engine.request import SamplingParams
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.profile import HeadProfile
from kvc_jax.tokenizer import Tokenizer


def prompt_ids(
    tokenizer: Tokenizer, prompt: str | list[int], name: str, *, vocab_size: int, max_model_len: int
) -> list[int]:
  """Token ids of a prompt.

  Args:
    tokenizer: for one that is a text.
    prompt: text or token ids.
    name: what messages call it.
    vocab_size: of the model.
    max_model_len: most tokens of prompt and output.

  Raises:
    InputError: it is empty, too long, or out of the vocabulary.
  """
  ids = _token_ids(tokenizer, prompt, name)
  if not ids:
    raise InputError(f"{name} has no tokens; give at least one token id")
  wrong = [i for i in ids if not 0 <= i < vocab_size]
  if wrong:
    raise InputError(f"{name}: token id {wrong[0]} is outside the vocabulary of {vocab_size} tokens")
  if len(ids) >= max_model_len:
    raise InputError(
        f"{name} has {len(ids)} tokens, but the context is {max_model_len} with at least one "
        "to generate; shorten it or raise max_model_len up to the model's own context")
  return ids


def _token_ids(tokenizer: Tokenizer, prompt: Any, name: str) -> list[int]:
  if isinstance(prompt, str):
    return tokenizer.encode(prompt)
  if isinstance(prompt, bytes):
    raise InputError(f"{name} is bytes; decode it to text first")
  try:
    return [operator.index(i) for i in prompt]
  except TypeError:
    raise InputError(f"{name} is neither a text nor a list of token ids") from None


def check_types(params: Any, compression: Any) -> None:
  """Raises InputError where a request's settings are of another type."""
  if not isinstance(params, SamplingParams):
    raise InputError("sampling_params must be SamplingParams, or a list of them")
  if compression is not None and not isinstance(compression, Compression):
    raise InputError(f"compression is {compression!r}; give a Compression, such as Compression(rate=8), or None")


def check_profile(config: CacheConfig, compression: Compression | None) -> None:
  """Raises InputError where a request's head profile is for a model of another shape."""
  if compression is None:
    return
  for profile in (compression.allocation, getattr(compression.scoring, "profile", None)):
    if isinstance(profile, HeadProfile):
      profile.check_fits(config.num_layers, config.num_kv_heads)
