"""What a caller asks of the engine and what comes back."""

import dataclasses
from typing import Literal

import numpy as np

from kvc_jax.errors import InputError, check_count, check_real
from kvc_jax.sampling import MOST_LOGPROBS

FinishReason = Literal["stop", "length", "cache_full"]

MOST_SAMPLES = 128
"""Of one prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How tokens are drawn and when a request ends. Names and meanings as in vLLM.

  Attributes:
    temperature: 0 is greedy.
    top_k: most probable tokens to draw from; 0 or -1 is all.
    top_p: smallest set of tokens whose probabilities reach this sum.
    min_p: least probability, relative to the best token's.
    seed: of this request's draws; None takes the engine's.
    max_tokens: most tokens to generate.
    stop: a string or strings that end the text; they are left out of it.
    stop_token_ids: ids that end the text, beside the model's end-of-sequence ids.
    ignore_eos: go on past end-of-sequence ids.
    skip_special_tokens: leave special tokens out of the text.
    n: samples of the prompt. Sample 0 is what n = 1 gives; each other has a seed of its own.
    logprobs: most probable tokens whose log-probabilities are given with each token, 0
      for that of the token alone; None for none. At most 20.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int | None = None
  max_tokens: int = 128
  stop: str | tuple[str, ...] | list[str] = ()
  stop_token_ids: tuple[int, ...] | list[int] = ()
  ignore_eos: bool = False
  skip_special_tokens: bool = True
  n: int = 1
  logprobs: int | None = None

  def __post_init__(self):
    check_real("SamplingParams: temperature", self.temperature, at_least=0, hint="0 (greedy) or more")
    check_count("SamplingParams: top_k", self.top_k, at_least=-1, hint="; 0 is all")
    check_real("SamplingParams: top_p", self.top_p, at_least=0, hint="a number above 0 and up to 1")
    if not 0 < self.top_p <= 1:
      raise InputError(f"SamplingParams: top_p is {self.top_p}; give a number above 0 and up to 1")
    check_real("SamplingParams: min_p", self.min_p, at_least=0, hint="a number from 0 to 1")
    if self.min_p > 1:
      raise InputError(f"SamplingParams: min_p is {self.min_p}; give a number from 0 to 1")
    check_count("SamplingParams: max_tokens", self.max_tokens, at_least=1)
    if self.seed is not None:
      check_count("SamplingParams: seed", self.seed, at_least=0, at_most=2**32 - 1)
    check_count("SamplingParams: n", self.n, at_least=1, at_most=MOST_SAMPLES)
    if self.logprobs is not None:
      check_count("SamplingParams: logprobs", self.logprobs, at_least=0, at_most=MOST_LOGPROBS)
    self._check_stops()

  def _check_stops(self):
    if not isinstance(self.stop, (str, tuple, list)) or not all(isinstance(s, str) for s in self.stop):
      raise InputError(f"SamplingParams: stop is {self.stop!r}; give a string or a list of strings")
    if any(not s for s in self.stop_strings):
      raise InputError("SamplingParams: an empty stop string would end every text at once; leave it out")
    if not isinstance(self.stop_token_ids, (tuple, list)):
      raise InputError(f"SamplingParams: stop_token_ids is {self.stop_token_ids!r}; give a list of token ids")
    for token in self.stop_token_ids:
      check_count("SamplingParams: a stop token id", token, at_least=0)

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """`stop` as a tuple."""
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionReceipt:
  """What a request's cache held when it ended, beside what it would have held uncompressed.

  Attributes:
    tokens_seen: tokens that went through the model (prompt and output).
    kvs_kept: i32 [L, H] KVs held by each head at the end.
    blocks_uncompressed: blocks for all KVs seen.
    blocks_held: blocks held at the end.
    bytes_per_block: keys, values, scores and positions.
    freed_blocks: blocks that evictions gave back, over the request's life.
    compressions: how often it was compressed.
    rate_asked: the rate of `Compression`, or None where only a size was given.
    positions: i32 [L, H, max KVs kept], positions held by each head in
      ascending order, -1 behind them; None unless asked for.
  """

  tokens_seen: int
  kvs_kept: np.ndarray
  blocks_uncompressed: int
  blocks_held: int
  bytes_per_block: int
  freed_blocks: int
  compressions: int
  rate_asked: float | None
  positions: np.ndarray | None = None

  @property
  def kvs_seen(self) -> int:
    """KVs that went through the cache, over all layers and heads."""
    return self.tokens_seen * self.kvs_kept.size

  @property
  def rate_reached(self) -> float:
    """Blocks without compression over blocks held: what memory really shrank by."""
    return self.blocks_uncompressed / max(self.blocks_held, 1)

  @property
  def bytes_uncompressed(self) -> int:
    return self.blocks_uncompressed * self.bytes_per_block

  @property
  def bytes_held(self) -> int:
    return self.blocks_held * self.bytes_per_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
  """Log-probabilities at one token's place, under the model's own distribution.

  Attributes:
    token_id: the token that was drawn.
    logprob: its log-probability.
    top: (token id, log-probability) of the most probable tokens, the best first.
  """

  token_id: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
  """The result of one prompt, or of one sample of it.

  Attributes:
    index: place of the prompt in the call; from an `Engine` the request's id.
    prompt_token_ids: ids of the prompt.
    token_ids: ids generated; the one that ended the text is included.
    text: decoded output, without stop strings and end-of-sequence tokens.
    finish_reason: "stop" (a stop string or id), "length" (max_tokens or the
      model's context), "cache_full" (the pool had no block left for it).
    receipt: what the cache held. A text that a stop string ended may have run on by some
      tokens before that was seen; the receipt counts them.
    sample: 0 to n - 1, where a prompt has n samples.
    logprobs: one for each of `token_ids`, where they were asked for.
  """

  index: int
  prompt_token_ids: list[int]
  token_ids: list[int]
  text: str
  finish_reason: FinishReason
  receipt: CompressionReceipt
  sample: int = 0
  logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamChunk:
  """A piece of one request's text, as given to a streaming callback.

  All chunks' texts and token ids together are those of the `RequestOutput`; ids
  whose text is held back come with the next chunk.

  `finish_reason` is None until the request's last chunk; `sample` is that of `RequestOutput`.
  """

  index: int
  text: str
  token_ids: list[int]
  finish_reason: FinishReason | None
  sample: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
  """What is new of one sample of a request, as `Engine.step` returns it.

  Attributes:
    request_id: as `Engine.add` gave it.
    sample: 0 to n - 1.
    text: the piece of text since the last update.
    token_ids: ids since then; those whose text is held back come with a later update.
    logprobs: one for each of `token_ids`; None unless asked for.
    finish_reason: None until the last update.
    output: the whole result, with the last update.
  """

  request_id: int
  sample: int
  text: str
  token_ids: list[int]
  logprobs: tuple[TokenLogprobs, ...] | None
  finish_reason: FinishReason | None
  output: RequestOutput | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
  """Counts of an engine: what it holds now, and what it has done since it was made.

  Attributes:
    running: sequences that hold a slot.
    waiting: sequences that wait for one, preempted ones too.
    free_blocks: of the pool, when results were last read. Those of cached prefixes alone
      count as free; those that several sequences share count once for each.
    num_blocks: of the pool that can be allocated at all.
    prompt_tokens: prefilled; again for a sequence that started over.
    generated_tokens: given to requests.
    finished: sequences that ended, but were not cancelled.
    cancelled: sequences.
    preemptions: sequences that gave way to others.
    swaps: preemptions whose blocks went to host memory.
    compressions: evictions run.
    freed_blocks: that they gave back.
    prefix_queries: prompts looked up among cached prefixes.
    prefix_hits: prompts found there.
    prefix_tokens: prompt tokens that were not prefilled because of it.
  """

  running: int
  waiting: int
  free_blocks: int
  num_blocks: int
  prompt_tokens: int = 0
  generated_tokens: int = 0
  finished: int = 0
  cancelled: int = 0
  preemptions: int = 0
  swaps: int = 0
  compressions: int = 0
  freed_blocks: int = 0
  prefix_queries: int = 0
  prefix_hits: int = 0
  prefix_tokens: int = 0
