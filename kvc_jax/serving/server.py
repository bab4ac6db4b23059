"""Runs the application under uvicorn until it is told to stop."""

import asyncio
import dataclasses
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn

from kvc_jax.engine.engine import Engine
from kvc_jax.errors import InputError, check_count
from kvc_jax.serving.app import AppSettings, create_app

_KEEP_ALIVE_SECONDS = 30
_HEADER_BYTES = 32 << 10
_FLUSH_SECONDS = 10.0
"""For answers to reach their clients, behind the time in which requests may end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
  """Where to listen; port 0 takes a free one."""

  host: str = "127.0.0.1"
  port: int = 8000

  def __post_init__(self):
    check_count("port", self.port, at_least=0, at_most=65_535)


def listen(address: Address) -> socket.socket:
  """Takes the port; call it before long work such as loading a model.

  Raises:
    InputError: it is not free, or there is no such host.
  """
  try:
    family, *_, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(where[:2], family=family, reuse_port=False)
  except OSError as e:
    raise InputError(f"cannot listen on {address.host} port {address.port} ({e}); give another --host or --port"
                     ) from None


def make_server(engine: Engine, settings: AppSettings, on_ready: Callable[[str], None]) -> uvicorn.Server:
  """The server; `run(sockets=[...])` answers requests until SIGINT, SIGTERM or `should_exit`.

  Requests that run then may end.

  Args:
    engine: warmed up; the server is its only user from now on.
    settings: of the application.
    on_ready: called with the server's URL once it answers.
  """
  app = create_app(engine, settings)
  config = uvicorn.Config(
      app, http="h11", ws="none", lifespan="on", log_config=None, access_log=False,
      server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, h11_max_incomplete_event_size=_HEADER_BYTES)
  return _Server(config, on_ready, app.state.stop, settings.drain_timeout)


class _Server(uvicorn.Server):
  """Says when it is ready, and keeps its sockets open until the engine has drained."""

  def __init__(
      self, config: uvicorn.Config, on_ready: Callable[[str], None],
      stop: Callable[[float], Coroutine[Any, Any, None]], drain_timeout: float,
  ):
    super().__init__(config)
    self._on_ready = on_ready
    self._stop = stop
    self._drain_timeout = drain_timeout

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    if self.started and sockets:
      host, port = sockets[0].getsockname()[:2]
      self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    end = time.monotonic() + self._drain_timeout + _FLUSH_SECONDS
    draining = asyncio.ensure_future(self._stop(self._drain_timeout))
    while not draining.done() and not self.force_exit:
      await asyncio.wait((draining,), timeout=0.1)
    if self.force_exit:  # a second Ctrl-C ends what runs, a third does not wait for that either
      self.force_exit = False
      draining.cancel()
      await self._stop(0.0)
    self.config.timeout_graceful_shutdown = max(1, round(end - time.monotonic()))
    await super().shutdown(sockets)
