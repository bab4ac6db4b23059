"""From a checked call to its answer: tokenize, submit, collect or stream."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from kvc_jax.engine.request import RequestOutput
from kvc_jax.errors import InputError
from kvc_jax.serving import stream
from kvc_jax.serving.api_error import ApiError
from kvc_jax.serving.engine_thread import (
    EngineFailed,
    EngineStopping,
    EngineThread,
    Generation,
    Progress,
    Submission,
    TooManyChoices,
)
from kvc_jax.serving.metrics import Metrics
from kvc_jax.serving.protocol import GenerationCall
from kvc_jax.serving.responses import AnswerForm, usage_of
from kvc_jax.tokenizer import Tokenizer

_PING_SECONDS = 15.0


class Generator:
  """Answers calls with one engine.

  One thread tokenizes, so that long prompts hold up neither the event loop nor the engine.
  """

  def __init__(self, thread: EngineThread, tokenizer: Tokenizer, metrics: Metrics, *, max_model_len: int,
               timeout: float):
    self._thread = thread
    self._tokenizer = tokenizer
    self._metrics = metrics
    self._max_model_len = max_model_len
    self._timeout = timeout
    self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, "kvc-tokenizer")

  @contextlib.asynccontextmanager
  async def accepted(self, call: GenerationCall) -> AsyncIterator["Answer"]:
    """Submits a call; what is left of it at the exit is cancelled.

    Raises:
      ApiError: a prompt is at fault.
      QueueFull: too many requests wait.
      EngineFailed: the engine has failed or is stopping.
    """
    answer = await self.submit(call)
    try:
      yield answer
    finally:
      self.end(answer)

  def close(self) -> None:
    """Ends the tokenizing thread."""
    self._tokenizing.shutdown(wait=False)

  async def submit(self, call: GenerationCall) -> "Answer":
    """As `accepted`, but the caller has to call `end`."""
    prompts, field = await self._encoded(call), "prompt" if call.prompts else "messages"
    for ids in prompts:
      if len(ids) >= self._max_model_len:
        raise ApiError(
            400, f"the prompt has {len(ids)} tokens, but the context is {self._max_model_len} with at least one to "
            "generate; shorten it", param=field, code="context_length_exceeded")
    try:
      generation = await self._thread.submit(
          [Submission(prompt=ids, params=call.params, compression=call.compression) for ids in prompts])
    except InputError as e:
      param = "n" if isinstance(e, TooManyChoices) and call.params.n > 1 else field
      raise ApiError(400, str(e), param=param) from None
    echoes = self._echoes(call) if call.echo else [""] * (len(prompts) * call.params.n)
    return Answer(call, generation, echoes, time.monotonic() + self._timeout)

  def end(self, answer: "Answer") -> None:
    """Cancels what has not ended; without effect on what has."""
    self._thread.cancel(answer.generation)
    if answer.is_complete:
      self._metrics.ended(time.monotonic() - answer.generation.started)

  async def _encoded(self, call: GenerationCall) -> list[list[int]]:
    def encode() -> list[list[int]]:
      if call.endpoint == "chat":
        return [self._tokenizer.apply_chat_template(call.messages)]
      return [self._tokenizer.encode(p) if isinstance(p, str) else p for p in call.prompts]

    return await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode)

  def _echoes(self, call: GenerationCall) -> list[str]:
    texts = [p if isinstance(p, str) else self._tokenizer.decode(p) for p in call.prompts]
    return [text for text in texts for _ in range(call.params.n)]


@dataclasses.dataclass(eq=False)
class Answer:
  """A call that runs: its choices, as they come.

  Choice i is sample i % n of prompt i // n. `has_failed` where a stream ended in an error.
  """

  call: GenerationCall
  generation: Generation
  echoes: Sequence[str]
  deadline: float
  outputs: dict[int, RequestOutput] = dataclasses.field(default_factory=dict)
  has_failed: bool = False

  @property
  def is_complete(self) -> bool:
    """Whether every choice has ended."""
    return len(self.outputs) == len(self.echoes)

  async def whole(self, form: AnswerForm) -> dict[str, object]:
    """Waits for all choices.

    Raises:
      TimeoutError: they took too long.
      EngineFailed: the engine has failed meanwhile.
    """
    async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.deadline - time.monotonic()):
      while not self.is_complete:
        self._take(await self.generation.next())
    outputs = self._in_order()
    texts = [echo + output.text for echo, output in zip(self.echoes, outputs, strict=True)]
    return form.whole(texts, outputs, usage_of(outputs, self.call.params.n))

  async def events(self, form: AnswerForm) -> AsyncGenerator[bytes]:
    """Server-sent events up to [DONE], or to an error, which is the last one then."""
    for choice, echo in enumerate(self.echoes):
      if opening := form.opening(choice):
        yield stream.event(opening)
      if echo:
        yield stream.event(form.piece(choice, echo, None))
    try:
      while not self.is_complete:
        progress = await self._next_or_ping()
        if progress is None:
          yield stream.PING
          continue
        choice, update = self._take(progress), progress.update
        if update.text or update.logprobs:
          yield stream.event(form.piece(choice, update.text, update.logprobs))
        if update.finish_reason is not None:
          yield stream.event(form.closing(choice, update.finish_reason))
    except (TimeoutError, EngineFailed) as e:
      self.has_failed = True
      yield stream.event((timed_out() if isinstance(e, TimeoutError) else engine_failed(e)).body())
      return
    if self.call.include_usage:
      yield stream.event(form.usage(usage_of(self._in_order(), self.call.params.n)))
    yield stream.DONE

  async def _next_or_ping(self) -> Progress | None:
    """The next update, or None where a sign of life is due.

    Raises:
      TimeoutError: the call has taken too long.
    """
    left = self.deadline - time.monotonic()
    if left <= 0:
      raise TimeoutError
    try:
      return await asyncio.wait_for(self.generation.next(), min(left, _PING_SECONDS))
    except TimeoutError:
      return None

  def _take(self, progress: Progress) -> int:
    """Puts down a result; returns the choice that it belongs to."""
    choice = progress.prompt * self.call.params.n + progress.update.sample
    if progress.update.output is not None:
      self.outputs[choice] = progress.update.output
    return choice

  def _in_order(self) -> list[RequestOutput]:
    return [self.outputs[i] for i in range(len(self.echoes))]


def engine_failed(e: EngineFailed) -> ApiError:
  """The error of a call whose engine is gone, or about to go."""
  if isinstance(e, EngineStopping):
    return ApiError(503, str(e), code="stopping")
  return ApiError(500, str(e), code="engine_failed")


def timed_out() -> ApiError:
  """The error of a call that took too long."""
  return ApiError(504, "the request took longer than this server allows; ask for fewer tokens")
