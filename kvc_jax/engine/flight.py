"""What the engine dispatched to the device and has not looked at yet, and how much to dispatch at once."""

import dataclasses
from typing import Any

import jax
import numpy as np

from kvc_jax.engine.request import TokenLogprobs
from kvc_jax.engine.sequence import Sequence
from kvc_jax.engine.steps import Decoded, Usage
from kvc_jax.sampling import Logprobs

Evicted = tuple[list[Sequence], jax.Array]
"""Sequences of one eviction call, and i32 [B] the blocks that it freed of each."""

LogprobRow = tuple[Any, np.ndarray, np.ndarray]
"""Log-probabilities of one token: the drawn one's, the best ones', and their ids."""

SYNC_STEPS = 0.5
"""What looking at the results of a loop costs, in decode steps."""


def worthwhile_steps(limits: list[int]) -> int:
  """Steps of a loop that give the most tokens in its time: sequences that cannot go on wait for its end."""
  candidates = sorted(set(limits), reverse=True)
  return max(candidates, key=lambda n: sum(min(n, limit) for limit in limits) / (n + SYNC_STEPS), default=0)


@dataclasses.dataclass(frozen=True)
class First:
  """A token drawn behind a prompt: i32 [1]."""

  sequence: Sequence
  token: jax.Array
  logprobs: Logprobs | None

  def rows(self) -> list[LogprobRow]:
    """The token's log-probabilities, where wanted (waits for the device)."""
    return [] if self.logprobs is None else [row_of(jax.device_get(self.logprobs), 0)]


@dataclasses.dataclass(frozen=True, eq=False)
class Dispatched:
  """Decode steps that were dispatched: at most `limits` of each sequence, in the slot that it had then."""

  sequences: list[Sequence]
  slots: list[int]
  limits: list[int]
  found: Decoded

  def asked_of(self, sequences: list[Sequence], num_rows: int) -> np.ndarray:
    """Steps i32 [R] that were asked of those of `sequences` that are ahead; 0 in all other slots."""
    limits = dict(zip(self.sequences, self.limits, strict=True))
    asked = np.zeros(num_rows, np.int32)
    for sequence in sequences:
      if sequence.ahead:
        assert sequence.newest is self, "a sequence goes on from a call that is not its newest"
        asked[sequence.slot] = limits[sequence]
    return asked

  def logprobs(self) -> Logprobs | None:
    """On the host, where a sequence wants any (waits for the device)."""
    wanted = any(s.params.logprobs is not None for s in self.sequences)
    return jax.device_get(self.found.logprobs) if wanted else None


@dataclasses.dataclass(frozen=True)
class Landed:
  """What came of a flight, on the host.

  Attributes:
    decoded: each loop, with the steps i32 [S] that its slots took and their tokens i32 [K, S].
    first: tokens drawn behind prompts.
    freed: blocks that each eviction freed of a sequence.
    failed: sequences whose blocks were not there.
    usage: of the cache behind the flight, still on the device.
  """

  decoded: list[tuple[Dispatched, np.ndarray, np.ndarray]]
  first: list[tuple[First, int]]
  freed: list[tuple[Sequence, int]]
  failed: list[Sequence]
  usage: Usage


@dataclasses.dataclass
class Flight:
  """What was dispatched and not read yet.

  Attributes:
    decoded: loops of decode steps.
    first: tokens behind prompts.
    evicted: calls that evict.
    given: bool [] whether blocks were there for each of `given_to`.
    given_to: sequences that had to get blocks.
    claims: sequences, and the blocks that each may hold behind what was dispatched for it.
    usage: of the cache behind all this, once nothing joins it any more.
  """

  decoded: list[Dispatched] = dataclasses.field(default_factory=list)
  first: list[First] = dataclasses.field(default_factory=list)
  evicted: list[Evicted] = dataclasses.field(default_factory=list)
  given: list[jax.Array] = dataclasses.field(default_factory=list)
  given_to: list[Sequence] = dataclasses.field(default_factory=list)
  claims: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)
  usage: Usage | None = None

  def _arrays(self) -> Any:
    return ([(d.found.counts, d.found.tokens) for d in self.decoded], [f.token for f in self.first],
            [freed for _, freed in self.evicted], self.given)

  def decodes(self, sequences: list[Sequence], limits: list[int], found: Decoded) -> Dispatched:
    """Takes decode steps, which their sequences are `ahead` by from now on."""
    dispatched = Dispatched(sequences, [s.slot for s in sequences], limits, found)
    self.decoded.append(dispatched)
    for sequence, limit in zip(sequences, limits, strict=True):
      sequence.ahead += limit
      sequence.newest = dispatched
    return dispatched

  def seal(self, usage: Usage) -> None:
    """Takes what the cache holds behind it, and starts the copies to the host."""
    self.usage = usage
    for array in jax.tree.leaves((self._arrays(), usage.held, usage.free)):
      array.copy_to_host_async()

  def shrinks(self, usage: Usage) -> None:
    """Takes what is held and free behind compressions that follow at once; lengths stay those that receipts name."""
    assert self.usage is not None
    self.usage = dataclasses.replace(usage, lengths=self.usage.lengths)
    for array in (usage.held, usage.free):
      array.copy_to_host_async()

  def land(self) -> Landed:
    """Waits for the device; of a sealed flight."""
    assert self.usage is not None
    decoded, first, evicted, given = jax.device_get(self._arrays())
    return Landed(
        decoded=[(d, counts, tokens) for d, (counts, tokens) in zip(self.decoded, decoded, strict=True)],
        first=[(f, int(token[0])) for f, token in zip(self.first, first, strict=True)],
        freed=[(sequence, int(blocks)) for (sequences, _), freed in zip(self.evicted, evicted, strict=True)
               for sequence, blocks in zip(sequences, freed, strict=False)],
        failed=[sequence for sequence, ok in zip(self.given_to, given, strict=True) if not ok],
        usage=self.usage)


def row_of(logprobs: Any, at: Any) -> LogprobRow:
  """The token's at an index."""
  return logprobs.drawn[at], logprobs.top[at], logprobs.top_ids[at]


def token_logprobs(tokens: list[int], rows: list[LogprobRow], top: int) -> list[TokenLogprobs]:
  """One for each token that has a row, with the `top` best."""
  return [
      TokenLogprobs(token_id=token, logprob=float(drawn),
                    top=tuple(zip(ids[:top].tolist(), best[:top].tolist(), strict=True)))
      for token, (drawn, best, ids) in zip(tokens, rows, strict=False)]
