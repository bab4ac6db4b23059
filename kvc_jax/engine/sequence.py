"""One sample of a request while it is served: what the host knows of it."""

import dataclasses
from collections.abc import Sequence as Sequences

from kvc_jax.attention.prefill import Observation
from kvc_jax.cache.snapshot import SequenceSnapshot
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.request import (
    CompressionReceipt,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    Update,
)
from kvc_jax.eviction.compression import Compression


@dataclasses.dataclass(kw_only=True, eq=False)
class Sequence:
  """One sample of a request (host side, mutable).

  A sequence waits, is prefilled piece by piece, decodes, and ends. One that gives way
  to others waits again; what it has generated stays.

  Attributes:
    request_id: of its request.
    prompt: token ids.
    params: how to sample; `seed` is set.
    compression: None for a request that is not compressed.
    output: decoded text so far.
    sample: 0 to n - 1.
    order: place in the order of arrival, over all sequences.
    stop_ids: ids that end it, end-of-sequence ids among them.
    positions: whether the receipt is to name the positions held.
    prefill_interval: prompt tokens from one compression to the next; None for none
      before the prompt's end.
    slot: of the cache, -1 while waiting.
    prefilled: prompt tokens in the cache.
    observation: of the prompt, while it is prefilled.
    has_gaps: whether KVs of what it has seen may be gone.
    shares: whether somebody else may hold some of its blocks too.
    prefix_digests: of the prompt up to each boundary of cached prefixes, where they were asked for.
    token_ids: ids generated so far; the newest is not in the cache yet.
    logprobs: one for each of them, where asked for.
    steps: decode steps done; fewer than len(token_ids) - 1 while a sequence that
      started over catches up with what it had generated.
    ahead: decode steps dispatched beyond those, whose results nobody has read yet.
    newest: the call that has the newest of those; None where there are none.
    held_blocks: when results were last read.
    compressions: evictions run.
    freed_blocks: blocks that they gave back.
    compressed_at: tokens seen when it was last compressed, steps `ahead` included.
    snapshot: of its cache, where it gave way and that was kept in host memory.
    finish_reason: set when the sequence has ended.
    receipt: set then.
  """

  request_id: int
  prompt: list[int]
  params: SamplingParams
  compression: Compression | None
  output: OutputText
  sample: int = 0
  order: int = 0
  stop_ids: frozenset[int] = frozenset()
  positions: bool = False
  prefill_interval: int | None = None
  slot: int = -1
  prefilled: int = 0
  observation: Observation | None = None
  has_gaps: bool = False
  shares: bool = False
  prefix_digests: list[bytes] | None = None
  token_ids: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
  steps: int = 0
  ahead: int = 0
  newest: object = None
  held_blocks: int = 0
  compressions: int = 0
  freed_blocks: int = 0
  compressed_at: int = -1
  snapshot: SequenceSnapshot | None = None
  finish_reason: FinishReason | None = None
  receipt: CompressionReceipt | None = None
  _compressed_before: int = -1  # `compressed_at` of the compression before
  _text_of: int = 0  # token_ids whose text was decoded
  _given: int = 0  # token_ids that updates have brought
  _piece: str = ""  # text that no update has brought yet

  @property
  def tokens_given(self) -> int:
    """Of token_ids, those that updates have brought."""
    return self._given

  @property
  def tokens_seen(self) -> int:
    """Tokens that went through the cache."""
    return self.prefilled + self.steps

  @property
  def decodes(self) -> bool:
    """Whether a decode step is next."""
    return self.prefilled == len(self.prompt) and bool(self.token_ids) and self.finish_reason is None

  @property
  def tokens_ahead(self) -> int:
    """Tokens that will have gone through the cache when the steps ahead are done."""
    return self.tokens_seen + self.ahead

  @property
  def is_due(self) -> bool:
    """Whether `interval` asks for a compression behind the steps that are done or ahead."""
    interval, steps = self.compression.interval if self.compression else None, self.steps + self.ahead
    return bool(interval and steps and steps % interval == 0 and self.compressed_at != self.tokens_ahead)

  def steps_to_end(self, max_model_len: int) -> int:
    """Decode steps to the last one that there can be, behind those that are ahead."""
    return min(self.params.max_tokens, max_model_len - len(self.prompt)) - 1 - self.steps - self.ahead

  def steps_left(self, max_model_len: int) -> int:
    """Decode steps to the next compression that is due, or to the end, behind those that are ahead."""
    return 0 if self.is_due else self.steps_behind_compression(max_model_len)

  def steps_behind_compression(self, max_model_len: int) -> int:
    """`steps_left` behind the compression that is due, if one is."""
    left, interval = self.steps_to_end(max_model_len), self.compression.interval if self.compression else None
    return left if interval is None else min(left, interval - (self.steps + self.ahead) % interval)

  def note_compression(self) -> None:
    """Notes one that was dispatched behind the steps ahead."""
    self.compressions += 1
    self.has_gaps = True
    self._compressed_before, self.compressed_at = self.compressed_at, self.tokens_ahead

  def forget_compression_ahead(self) -> None:
    """Takes that back where the sequence has ended, or did not take all of its steps ahead."""
    if self.compressed_at > self.tokens_seen or (self.finish_reason and self.compressed_at == self.tokens_seen):
      self.compressions -= 1
      self.compressed_at = self._compressed_before

  def restart(self) -> None:
    """Goes back to the prompt; what was generated stays and is run again, not drawn again."""
    self.prefilled = self.steps = self.ahead = self.compressions = self.freed_blocks = 0
    self.compressed_at = -1
    self.observation, self.newest, self.has_gaps, self.shares = None, None, False, False

  def accept(self, tokens: Sequences[int], logprobs: Sequences[TokenLogprobs], max_model_len: int) -> int:
    """Takes newly drawn tokens, up to the one that ends the sequence; returns how many.

    Args:
      tokens: in their order.
      logprobs: one for each, or none at all.
      max_model_len: most tokens of prompt and output.
    """
    longest = min(self.params.max_tokens, max_model_len - len(self.prompt))
    for taken, token in enumerate(tokens, 1):
      self.token_ids.append(token)
      self.logprobs += logprobs[taken - 1 : taken]
      if token in self.stop_ids:
        self.finish_reason = "stop"
      elif len(self.token_ids) >= longest:
        self.finish_reason = "length"
      if self.params.stop_strings:  # their text says whether to go on; all other text can wait
        self.decode_text()
      if self.finish_reason:
        return taken
    return len(tokens)

  def decode_text(self) -> None:
    """Turns the ids that are new into text."""
    for token in self.token_ids[self._text_of :]:
      self._text_of += 1
      if token not in self.stop_ids:
        self._piece += self.output.add(token)
      if self.output.stopped:
        self.finish_reason = "stop"
    if self.finish_reason:
      self._piece += self.output.finish()
      # The text may end in a stop string that only the last bytes completed.
      self.finish_reason = "stop" if self.output.stopped else self.finish_reason

  def go_on_from(self, token_ids: Sequences[int], given: int) -> None:
    """Takes ids that were generated before, elsewhere; updates had brought the first `given` of them."""
    self.token_ids = list(token_ids[:given])
    self.decode_text()
    self._given, self._piece = given, ""
    self.token_ids += token_ids[given:]

  def update(self) -> Update | None:
    """What no update has brought yet; None where there is no text and no end."""
    if not self._piece and self.finish_reason is None:
      return None
    first, self._given = self._given, len(self.token_ids)
    piece, self._piece = self._piece, ""
    return Update(
        request_id=self.request_id, sample=self.sample, text=piece, token_ids=self.token_ids[first:],
        logprobs=None if self.params.logprobs is None else tuple(self.logprobs[first:]),
        finish_reason=self.finish_reason, output=self._result() if self.finish_reason else None)

  def _result(self) -> RequestOutput:
    assert self.finish_reason is not None
    assert self.receipt is not None
    return RequestOutput(
        index=self.request_id, sample=self.sample, prompt_token_ids=self.prompt, token_ids=self.token_ids,
        text=self.output.text, finish_reason=self.finish_reason, receipt=self.receipt,
        logprobs=None if self.params.logprobs is None else tuple(self.logprobs))
