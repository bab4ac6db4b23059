"""Server-sent events, and work that ends when the client goes away."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"


def event(value: dict[str, Any]) -> bytes:
  """One event; ASCII, so a lone surrogate in a text does no harm."""
  return f"data: {json.dumps(value, separators=(',', ':'), allow_nan=False)}\n\n".encode()


class EventStream:
  """A response that sends events as they come, to the end or until the client goes away."""

  def __init__(self, events: AsyncGenerator[bytes], on_close: Callable[[], None], *, longest: float):
    """Takes the events, what is to be done behind them, however they end, and a bound in seconds.

    The bound is for a client that is there but does not read.
    """
    self._events = events
    self._on_close = on_close
    self._longest = longest

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
               (b"x-accel-buffering", b"no")]

    async def run() -> None:
      await send({"type": "http.response.start", "status": 200, "headers": headers})
      async for data in self._events:
        await send({"type": "http.response.body", "body": data, "more_body": True})
      await send({"type": "http.response.body", "body": b"", "more_body": False})

    try:
      async with asyncio.timeout(self._longest):
        await while_connected(run(), receive)
    except TimeoutError:
      _log.warning("a client did not read its stream in %s s and was let go", self._longest)
    finally:
      self._on_close()
      await self._events.aclose()


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
  """Runs `work` to its end, or cancels it when the client goes away; whether it came to its end.

  The request's body must have been read.
  """
  task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
  try:
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      task.result()
    return task.done()
  finally:
    for one in (task, gone):
      one.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass
