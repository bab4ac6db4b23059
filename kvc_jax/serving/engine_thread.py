"""Runs an engine on a thread of its own, for callers on an event loop.

What is to be done goes in through a queue; what comes of it goes back to the loop.
Nobody waits for a thread that is gone: an exception in the engine ends every request
with `EngineFailed`, those to come as well.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from kvc_jax.engine.request import EngineStats, SamplingParams, Update
from kvc_jax.errors import InputError, QueueFull
from kvc_jax.eviction.compression import Compression

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_STATS_SECONDS = 0.1
_KVS_KEPT_SECONDS = 0.5
_LAST_STEP_SECONDS = 5.0
_POLL_SECONDS = 0.02


class EngineFailed(Exception):
  """The engine has raised an exception; it answers nothing any more."""


class EngineStopping(EngineFailed):
  """The server is stopping: nothing new is taken, and what did not end in time has failed."""

  def __init__(self):
    super().__init__("the server is stopping")


class TooManyChoices(InputError):
  """More than would fit even where nothing else is served."""


class ServedEngine(Protocol):
  """What a server needs of an engine; `kvc_jax.engine.engine.Engine` is one."""

  @property
  def has_work(self) -> bool: ...

  def add(
      self, prompt: str | list[int], params: SamplingParams | None = None, compression: Compression | None = None
  ) -> int: ...

  def cancel(self, request_id: int) -> bool: ...

  def step(self) -> list[Update]: ...

  def stats(self) -> EngineStats: ...

  def kvs_kept(self) -> np.ndarray: ...


class TokenClock(Protocol):
  """Takes down how long tokens were in coming."""

  def first_token(self, seconds: float) -> None: ...

  def next_tokens(self, seconds: float, count: int) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
  """One prompt of a call."""

  prompt: list[int]
  params: SamplingParams
  compression: Compression | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """An update, and which prompt of the call it belongs to."""

  prompt: int
  update: Update


class Generation:
  """What becomes of one call's prompts; `next` is for the loop, all else for the thread.

  Attributes:
    open_samples: samples that have not ended.
  """

  def __init__(self, open_samples: int):
    self.open_samples = open_samples
    self.started = time.monotonic()
    self.request_ids: list[int] = []
    self.last_token: dict[tuple[int, int], float] = {}
    self._events: asyncio.Queue[Progress | Exception] = asyncio.Queue()

  async def next(self) -> Progress:
    """Waits for the next update.

    Raises:
      EngineFailed: none will come.
    """
    event = await self._events.get()
    if isinstance(event, Exception):
      raise event
    return event

  def deliver(self, event: Progress | Exception) -> None:
    """Called on the loop."""
    self._events.put_nowait(event)


class EngineThread:
  """The thread and the only way to the engine.

  Attributes:
    failure: what the engine raised, or None.
    stats: the newest counts that the thread has put down.
  """

  def __init__(self, engine: ServedEngine, clock: TokenClock):
    self._engine = engine
    self._clock = clock
    self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    self._lock = threading.Lock()  # of _closed, so that no command is left in the queue
    self._closed = False
    self._stopping = False
    self._is_over = False  # requests that run may go on no longer
    self._requests: dict[int, tuple[Generation, int]] = {}
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name="kvc-engine", daemon=True)
    self._stats_at = -1.0
    self._kept: np.ndarray | None = None
    self._kept_at = -1.0
    self.failure: Exception | None = None
    self.stats = engine.stats()

  @property
  def state(self) -> str:
    """"ok", "failed" or "stopping"."""
    if self._stopping:
      return "stopping"
    return "ok" if self.failure is None and self._thread.is_alive() else "failed"

  def start(self) -> None:
    """Starts the thread; updates go to the loop that runs now."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  async def stop(self, timeout: float) -> None:
    """Lets running requests end, or fails them where that takes longer than `timeout` seconds.

    From now on others are refused. May be called again, also while it runs or after it was cancelled.
    """
    self._stopping = True
    self._post(lambda: None)  # wakes the thread up
    await self._ended(timeout)
    self._is_over = True
    await self._ended(_LAST_STEP_SECONDS)

  async def _ended(self, timeout: float) -> None:
    end = time.monotonic() + timeout
    while self._thread.is_alive() and time.monotonic() < end:
      await asyncio.sleep(_POLL_SECONDS)

  async def submit(self, submissions: Sequence[Submission]) -> Generation:
    """Adds all prompts of a call, or none.

    Raises:
      InputError: a prompt that the engine refuses.
      QueueFull: too many requests wait.
      EngineFailed: the engine has failed or is stopping.
    """
    if self._stopping:
      raise self._refusal()
    generation = Generation(sum(s.params.n for s in submissions))
    try:
      await self._call(lambda: self._add(generation, submissions))
    except asyncio.CancelledError:
      self.cancel(generation)
      raise
    return generation

  def cancel(self, generation: Generation) -> None:
    """Takes back what has not ended yet; its slots and blocks are free at once."""
    self._post(lambda: self._cancel(generation))

  async def kvs_kept(self, timeout: float) -> np.ndarray | None:
    """KVs held by each head over all running sequences, i32 [L, H]; what was last known where the engine is busy."""
    if time.monotonic() - self._kept_at > _KVS_KEPT_SECONDS and self.failure is None:
      self._kept_at = time.monotonic()
      try:
        self._kept = await asyncio.wait_for(self._call(self._engine.kvs_kept), timeout)
      except (TimeoutError, EngineFailed):
        _log.debug("the engine did not answer in %s s", timeout)
    return self._kept

  # --- On the loop's side -----------------------------------------------------------------

  async def _call(self, function: Callable[[], _T]) -> _T:
    """Runs a function on the thread, between two steps."""
    result: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
      if not result.set_running_or_notify_cancel():
        return
      try:
        if self.failure is not None or self._closed:
          raise self._refusal()
        result.set_result(function())
      except Exception as e:
        result.set_exception(e)

    self._post(run)
    return await asyncio.wrap_future(result)

  def _refusal(self) -> EngineFailed:
    if self._stopping and (self.failure is None or isinstance(self.failure, EngineStopping)):
      return EngineStopping()
    return EngineFailed("the engine has failed; restart the server")

  def _post(self, command: Callable[[], None]) -> None:
    with self._lock:
      if not self._closed:
        self._commands.put(command)
        return
    command()  # nobody else will; it finds the thread closed

  # --- On the thread ------------------------------------------------------------------------

  def _run(self) -> None:
    try:
      while not self._stopping or (self._engine.has_work and not self._is_over):
        self._run_commands(wait=not self._engine.has_work)
        if self._engine.has_work:
          self._hand_out(self._engine.step())
        self._put_down_stats()
      if self._engine.has_work:
        self._fail(EngineStopping())
    except Exception as e:
      _log.error("the engine has failed; every request ends", exc_info=e)
      self._fail(e)
      while not self._stopping:
        self._run_commands(wait=True)
    with self._lock:
      self._closed = True
    self._run_commands(wait=False)

  def _run_commands(self, *, wait: bool) -> None:
    if wait:
      self._commands.get()()
    while True:
      try:
        command = self._commands.get_nowait()
      except queue.Empty:
        return
      command()

  def _fail(self, e: Exception) -> None:
    self.failure = e
    generations = {id(g): g for g, _ in self._requests.values()}
    self._requests.clear()
    self._deliver([(g, self._refusal()) for g in generations.values()])

  def _add(self, generation: Generation, submissions: Sequence[Submission]) -> None:
    idle = not self._engine.has_work
    try:
      for i, submission in enumerate(submissions):
        request_id = self._engine.add(submission.prompt, submission.params, submission.compression)
        generation.request_ids.append(request_id)
        self._requests[request_id] = generation, i
    except Exception as e:
      self._cancel(generation)
      if idle and isinstance(e, QueueFull):  # trying again would not help
        raise TooManyChoices("the request asks for more choices than this server can run and let wait; ask for fewer"
                             ) from None
      raise
    finally:
      self._put_down_stats(now=True)

  def _cancel(self, generation: Generation) -> None:
    if self.failure is not None or self._closed:
      return
    for request_id in generation.request_ids:
      if self._requests.pop(request_id, None):
        self._engine.cancel(request_id)
    self._put_down_stats(now=True)

  def _hand_out(self, updates: Sequence[Update]) -> None:
    now = time.monotonic()
    events: list[tuple[Generation, Progress | Exception]] = []
    for update in updates:
      if update.request_id not in self._requests:
        continue
      generation, prompt = self._requests[update.request_id]
      self._time(generation, update, now)
      generation.open_samples -= update.finish_reason is not None
      events.append((generation, Progress(prompt=prompt, update=update)))
      if not generation.open_samples:
        for request_id in generation.request_ids:
          self._requests.pop(request_id, None)
    if events:
      self._deliver(events)

  def _time(self, generation: Generation, update: Update, now: float) -> None:
    count = len(update.token_ids)
    if not count:
      return
    key = update.request_id, update.sample
    if key in generation.last_token:
      self._clock.next_tokens(now - generation.last_token[key], count)
    else:
      self._clock.first_token(now - generation.started)
    generation.last_token[key] = now

  def _deliver(self, events: list[tuple[Generation, Progress | Exception]]) -> None:
    def deliver_all() -> None:
      for generation, event in events:
        generation.deliver(event)

    assert self._loop is not None
    try:
      self._loop.call_soon_threadsafe(deliver_all)
    except RuntimeError:  # the loop is closed: nobody is left to hear it
      _log.debug("updates came after the event loop had ended")

  def _put_down_stats(self, *, now: bool = False) -> None:
    at = time.monotonic()
    if now or not self._engine.has_work or at - self._stats_at > _STATS_SECONDS:
      self.stats, self._stats_at = self._engine.stats(), at

