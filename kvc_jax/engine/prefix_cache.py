"""Prefixes of prompts whose KVs are kept for those that come later (host side).

A prefix ends at a multiple of `interval` prompt tokens, whatever the chunk size and the load. It is found
by its tokens and by the settings that its content depends on:

* nothing, where the request holds every KV there: it is not compressed, or behind its prompt's end only;
* where it is compressed while it is prefilled, its `Compression` (less what matters only to decoding), how often
  that happens and the budget, which with a rate follows from the prompt's length.

Scores of a rule that observes the last queries are computed anew behind the prompt, so that many queries have to
follow a prefix. A rule that observes all queries adds to the scores of every block with every chunk: nothing of
such a request could stay shared, and nothing of it is cached. Nor of one whose rule takes the moments of all queries:
those before a prefix's end are not kept.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Hashable

import numpy as np

from kvc_jax.cache.share import Held
from kvc_jax.engine.sequence import Sequence

MOST_PREFIXES = 256
"""Each has tables of its own: [L, H, M] numbers."""

_Key = tuple[bytes, Hashable]


class PrefixCache:
  """Prefixes in the order of their last use.

  Attributes:
    interval: tokens from one boundary to the next.
  """

  def __init__(self, interval: int, drop: Callable[[Held], None]):
    """Takes the tokens from one boundary to the next, and what lets go of a prefix's blocks."""
    self.interval = interval
    self._drop = drop
    self._held: collections.OrderedDict[_Key, Held] = collections.OrderedDict()

  @property
  def held(self) -> list[Held]:
    """All that is held."""
    return list(self._held.values())

  def serves(self, sequence: Sequence) -> bool:
    """Whether prefixes of the sequence are cached and looked up at all."""
    return _settings(sequence) is not None and len(sequence.prompt) > self.interval

  def find(self, sequence: Sequence) -> tuple[int, Held] | None:
    """The longest prefix that the sequence can start from, and its tokens; at least one token stays to be run."""
    keys = self._keys(sequence)
    for count in range((len(sequence.prompt) - 1) // self.interval, 0, -1):
      tokens, key = count * self.interval, keys[count - 1]
      if key in self._held and _observes_enough(sequence, tokens):
        self._held.move_to_end(key)
        return tokens, self._held[key]
    return None

  def wants(self, sequence: Sequence) -> bool:
    """Whether the sequence stands at a boundary that is to be kept: one that no other request has left there."""
    if sequence.prefilled % self.interval or not self.serves(sequence):
      return False
    if sequence.compression and sequence.prefilled == len(sequence.prompt):
      return False  # it was compressed once more behind the prompt's end
    key = self._keys(sequence)[sequence.prefilled // self.interval - 1]
    if key in self._held:
      self._held.move_to_end(key)
    return key not in self._held

  def keep(self, sequence: Sequence, held: Held) -> None:
    """Keeps what the sequence held at the boundary where it stands."""
    self._held[self._keys(sequence)[sequence.prefilled // self.interval - 1]] = held
    if len(self._held) > MOST_PREFIXES:
      self.drop_oldest()

  def drop_oldest(self) -> bool:
    """Lets go of the prefix that was not used for the longest time; False where there is none."""
    if not self._held:
      return False
    _, held = self._held.popitem(last=False)
    self._drop(held)
    return True

  def _keys(self, sequence: Sequence) -> list[_Key]:
    """Of every boundary in the prompt: a digest of the tokens before it, and the settings."""
    if sequence.prefix_digests is None:
      tokens, digest = np.array(sequence.prompt, np.int64), hashlib.sha256()
      sequence.prefix_digests = []
      for stop in range(self.interval, len(tokens) + 1, self.interval):
        digest.update(tokens[stop - self.interval : stop].tobytes())
        sequence.prefix_digests.append(digest.digest())
    settings = _settings(sequence)
    return [(digest, settings) for digest in sequence.prefix_digests]


def _settings(sequence: Sequence) -> Hashable:
  """What the KVs at a boundary depend on beside the tokens; None where they are not cached."""
  compression = sequence.compression
  if compression is not None and compression.scoring.observed in ("all", "moments"):
    return None
  if compression is None or sequence.prefill_interval is None:
    return "all KVs"
  budget = compression.cache_tokens(len(sequence.prompt))
  # A rate acts through the budget alone.
  same = dataclasses.replace(compression, rate=1.0, max_cache_tokens=None, interval=None, on_demand=False)
  return same, sequence.prefill_interval, budget


def _observes_enough(sequence: Sequence, tokens: int) -> bool:
  """Whether all queries that the next compression scores with come behind `tokens`."""
  compression, interval = sequence.compression, sequence.prefill_interval
  if compression is None or compression.scoring.observed != "last":
    return True
  end = len(sequence.prompt)
  following = end if interval is None else min(end, (tokens // interval + 1) * interval)
  return following - tokens >= compression.scoring.queries
