"""Makes a head profile: what share of its tokens each head keeps on a set of prompts."""

from collections.abc import Sequence

import numpy as np

from kvc_jax.engine.llm import LLM
from kvc_jax.engine.request import CompressionReceipt, SamplingParams
from kvc_jax.errors import InputError, check_count
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.profile import HeadProfile

_MOST_BINS = 4096


def measure_profile(
    llm: LLM, prompts: Sequence[str | list[int]], compression: Compression, *, bins: int = 16, progress: bool = False
) -> HeadProfile:
  """Compresses each prompt and counts what its heads keep of it.

  Args:
    llm: the model.
    prompts: texts or token ids; some dozens are enough.
    compression: how to choose, with allocation "all": heads that do not compete keep what they are given, whatever
      they need. Its window, sinks and ranges to keep are left out of the count.
    bins: equal parts of each prompt that are counted apart.
    progress: show a progress bar on stderr.

  Returns:
    The shares, over all prompts together.

  Raises:
    InputError: no prompt, or one that is too short to be counted, or another allocation.
  """
  check_competes(compression)
  check_count("calibrate: bins", bins, at_least=1, at_most=_MOST_BINS)
  if not prompts:
    raise InputError("calibrate needs prompts; give some dozens of them")
  ids = [llm.engine.encode(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
  protected = compression.window + compression.sinks
  for i, prompt in enumerate(ids):
    if len(prompt) < protected + bins:
      raise InputError(
          f"prompt {i} has {len(prompt)} tokens, but {protected} are protected and {bins} parts are counted; give "
          "longer prompts, fewer bins or a smaller window")
  outputs = llm.generate(
      ids, SamplingParams(temperature=0, max_tokens=1), compression, return_positions=True, progress=progress)
  counts = [_count(output.receipt, compression, bins) for output in outputs]
  kept, seen = (np.sum([count[which] for count in counts], axis=0) for which in (0, 1))
  about = {
      "prompts": str(len(ids)), "rate": str(compression.rate), "max_cache_tokens": str(compression.max_cache_tokens),
      "scoring": repr(compression.scoring), "model": llm.engine.fingerprint or ""}
  return HeadProfile(kept / np.maximum(seen, 1), about)


def check_competes(compression: Compression) -> None:
  """Raises InputError unless all heads compete for one budget, so that what they keep says what they need."""
  if compression.allocation != "all":
    raise InputError(f"calibrate: with allocation {compression.allocation!r} heads do not all compete, so what they "
                     "keep says nothing of what they need; leave the allocation at 'all'")


def _count(receipt: CompressionReceipt, compression: Compression, bins: int) -> tuple[np.ndarray, np.ndarray]:
  """KVs kept [L, H, bins] and seen [bins], of those that were not protected."""
  assert receipt.positions is not None
  first, stop = compression.sinks, receipt.tokens_seen - compression.window
  counted = np.ones(stop - first, bool)
  for start, end in compression.keep:
    counted[max(start - first, 0) : max(end - first, 0)] = False
  place = np.arange(stop - first) * bins // (stop - first)
  seen = np.bincount(place[counted], minlength=bins)
  kept = np.zeros((*receipt.kvs_kept.shape, bins), np.int64)
  for layer, head in np.ndindex(receipt.kvs_kept.shape):
    index = receipt.positions[layer, head] - first
    index = index[(index >= 0) & (index < stop - first)]
    kept[layer, head] = np.bincount(place[index[counted[index]]], minlength=bins)
  return kept, seen
