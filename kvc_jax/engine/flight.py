"""What the engine dispatched to the device and has not looked at yet, and how much to dispatch at once."""

import dataclasses

import jax

from kvc_jax.engine.batch import Evicted
from kvc_jax.engine.sequence import Sequence
from kvc_jax.engine.steps import Decoded
from kvc_jax.sampling import Logprobs

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


@dataclasses.dataclass(frozen=True)
class Dispatched:
  """A loop of decode steps."""

  sequences: list[Sequence]
  limits: list[int]
  found: Decoded


@dataclasses.dataclass
class Flight:
  """What was dispatched and not read yet. `given` says whether blocks were there for each of `given_to`."""

  decoded: list[Dispatched] = dataclasses.field(default_factory=list)
  first: list[First] = dataclasses.field(default_factory=list)
  evicted: list[Evicted] = dataclasses.field(default_factory=list)
  given: list[jax.Array] = dataclasses.field(default_factory=list)
  given_to: list[Sequence] = dataclasses.field(default_factory=list)
