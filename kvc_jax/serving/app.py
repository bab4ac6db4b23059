"""The routes of the server, as an ASGI application."""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from kvc_jax.engine.engine import Engine
from kvc_jax.errors import InputError, QueueFull, check_count, check_real
from kvc_jax.eviction.compression import Compression
from kvc_jax.serving import responses
from kvc_jax.serving.api_error import ApiError
from kvc_jax.serving.engine_thread import EngineFailed, EngineThread
from kvc_jax.serving.generate import Answer, Generator, engine_failed, timed_out
from kvc_jax.serving.metrics import Metrics
from kvc_jax.serving.protocol import Defaults, Endpoint, parse_call
from kvc_jax.serving.stream import EventStream, while_connected

_log = logging.getLogger(__name__)

_CLIENT_GONE = 499
_KVS_KEPT_SECONDS = 2.0
_RETRY_AFTER = "1"
_UNREAD_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppSettings:
  """What an application is told beside its engine.

  Attributes:
    model: name that clients give.
    api_key: that clients must bring to `/v1`; None for none.
    compression: of requests that say nothing of it.
    max_body_bytes: of a request.
    body_timeout: seconds for a request's body to come in.
    request_timeout: seconds for an answer.
    drain_timeout: seconds for running requests to end at shutdown.
  """

  model: str
  api_key: str | None = None
  compression: Compression | None = None
  max_body_bytes: int = 4 << 20
  body_timeout: float = 30.0
  request_timeout: float = 600.0
  drain_timeout: float = 60.0

  def __post_init__(self):
    if not self.model:
      raise InputError("the served model has no name; give one")
    check_count("max_body_bytes", self.max_body_bytes, at_least=1)
    for name in ("body_timeout", "request_timeout", "drain_timeout"):
      check_real(name, getattr(self, name), at_least=0, hint="a number of seconds")


class Json(Response):
  """JSON in ASCII: a lone surrogate in a text does no harm."""

  media_type = "application/json"

  def render(self, content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


Handler = Callable[[Request], Awaitable[Any]]


def create_app(engine: Engine, settings: AppSettings) -> Starlette:
  """The application; it starts a thread for the engine when it starts.

  Whoever runs it awaits `app.state.stop(seconds)` before closing its sockets: /health tells of it meanwhile.
  """
  server = _Server(engine, settings)
  app = Starlette(
      routes=[
          Route("/v1/completions", server.guarded("completions", server.completions), methods=["POST"]),
          Route("/v1/chat/completions", server.guarded("chat", server.chat), methods=["POST"]),
          Route("/v1/models", server.guarded("models", server.models)),
          Route("/v1/models/{name:path}", server.guarded("models", server.model)),
          Route("/health", server.health),
          Route("/metrics", server.show_metrics),
          Route("/status", server.status),
          Route("/", server.page),
      ],
      exception_handlers={HTTPException: _http_error, Exception: _unexpected},
      lifespan=server.lifespan,
  )
  app.state.stop = server.stop
  return app


class _Server:
  """Handlers and what they share."""

  def __init__(self, engine: Engine, settings: AppSettings):
    self._engine = engine  # its constants only; all else goes through the thread
    self._settings = settings
    self._started = time.time()
    self._metrics = Metrics(lambda: self._thread.stats)
    self._thread = EngineThread(engine, self._metrics)
    self._generator = Generator(
        self._thread, engine.tokenizer, self._metrics, max_model_len=engine.max_model_len,
        timeout=settings.request_timeout)
    self.stop = self._thread.stop
    self._defaults = Defaults(
        model=settings.model, max_model_len=engine.max_model_len, interval=engine.config.block_size,
        compression=settings.compression)
    self._page = importlib.resources.files("kvc_jax.serving").joinpath("status.html").read_text(encoding="utf-8")

  @contextlib.asynccontextmanager
  async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
    self._thread.start()
    try:
      yield
    finally:
      await self.stop(0.0)  # under uvicorn nothing runs by now
      self._generator.close()

  def guarded(self, endpoint: str, handler: Handler) -> Handler:
    """Checks the API key, counts the request and words its errors."""

    async def handle(request: Request) -> Any:
      try:
        self._check_key(request)
        response = await handler(request)
      except ClientDisconnect:
        response = Response(status_code=_CLIENT_GONE)
      except Exception as e:
        response = _error(_as_api_error(e))
      if not isinstance(response, EventStream):  # which counts itself, at its end
        self._metrics.answered(endpoint, response.status_code)
      return response

    return handle

  def _check_key(self, request: Request) -> None:
    if self._settings.api_key is None:
      return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    known = hmac.compare_digest(key.strip().encode("utf-8", "replace"), self._settings.api_key.encode())
    if kind.lower() != "bearer" or not known:
      raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                     code="invalid_api_key", headers={"www-authenticate": "Bearer"})

  async def completions(self, request: Request) -> Any:
    return await self._generate("completions", request)

  async def chat(self, request: Request) -> Any:
    return await self._generate("chat", request)

  async def _generate(self, endpoint: Endpoint, request: Request) -> Any:
    call = parse_call(endpoint, await self._body(request), self._defaults)
    form = responses.answer_form(endpoint, self._settings.model, self._engine.tokenizer, stream=call.stream)
    if call.stream:
      return self._stream(await self._generator.submit(call), form, endpoint)
    async with self._generator.accepted(call) as answer:
      results: list[dict[str, Any]] = []

      async def collect() -> None:
        results.append(await answer.whole(form))

      if not await while_connected(collect(), request.receive):
        return Response(status_code=_CLIENT_GONE)
    return Json(results[0])

  def _stream(self, answer: Answer, form: responses.AnswerForm, endpoint: str) -> EventStream:
    def close() -> None:
      self._generator.end(answer)
      self._metrics.answered(endpoint, 200 if answer.is_complete else 500 if answer.has_failed else _CLIENT_GONE)

    return EventStream(answer.events(form), close, longest=self._settings.request_timeout + _UNREAD_SECONDS)

  async def _body(self, request: Request) -> Any:
    """Reads a request's JSON within the limits of size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page of somebody else's cannot send this unasked
      raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
    most = self._settings.max_body_bytes
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
      _refuse_size(most)
    data = bytearray()
    try:
      async with asyncio.timeout(self._settings.body_timeout):
        async for chunk in request.stream():
          data += chunk
          if len(data) > most:
            _refuse_size(most)
    except TimeoutError:
      raise ApiError(408, "the body took too long to come in; send it faster") from None
    try:
      return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
      raise ApiError(400, f"the body is not valid JSON ({' '.join(str(e).split())[:100]})") from None

  async def models(self, request: Request) -> Response:
    return Json(responses.model_list(self._settings.model, int(self._started)))

  async def model(self, request: Request) -> Response:
    name = request.path_params["name"]
    if name != self._settings.model:
      raise ApiError(404, f"the model {name[:200]!r} is not served; ask for {self._settings.model!r}",
                     param="model", code="model_not_found")
    return Json(responses.model_card(name, int(self._started)))

  async def health(self, request: Request) -> Response:
    state = self._thread.state
    return Json({"status": state}, status_code=200 if state == "ok" else 503)

  async def show_metrics(self, request: Request) -> Response:
    kept = await self._thread.kvs_kept(_KVS_KEPT_SECONDS)
    return Response(self._metrics.render(kept), media_type="text/plain; version=0.0.4; charset=utf-8")

  async def status(self, request: Request) -> Response:
    kept = await self._thread.kvs_kept(_KVS_KEPT_SECONDS)
    return Json({
        "status": self._thread.state, "model": self._settings.model, "uptime": time.time() - self._started,
        "max_model_len": self._engine.max_model_len, "block_size": self._engine.config.block_size,
        "slots": self._engine.config.num_slots, "stats": dataclasses.asdict(self._thread.stats),
        "kvs_kept": None if kept is None else kept.tolist()})

  async def page(self, request: Request) -> Response:
    policy = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
              "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
    return HTMLResponse(self._page, headers={"content-security-policy": policy, "cache-control": "no-store"})


def _refuse_size(most: int) -> NoReturn:
  raise ApiError(413, f"the body is larger than {most} bytes; shorten the prompt")


def _no_constant(name: str) -> NoReturn:
  raise ValueError(f"{name} is no JSON number")


def _as_api_error(e: Exception) -> ApiError:
  match e:
    case ApiError():
      return e
    case InputError():
      return ApiError(400, str(e))
    case QueueFull():
      return ApiError(429, "too many requests are waiting; try again later", code="queue_full",
                      headers={"retry-after": _RETRY_AFTER})
    case TimeoutError():
      return timed_out()
    case EngineFailed():
      return engine_failed(e)
    case _:
      _log.error("a request failed unexpectedly", exc_info=e)
      return ApiError(500, "the server failed on this request; its log says why")


def _error(e: ApiError) -> Response:
  return Json(e.body(), status_code=e.status, headers=e.headers)


async def _http_error(request: Request, e: Exception) -> Response:
  assert isinstance(e, HTTPException)
  known = {404: f"there is nothing at {request.url.path[:200]!r}", 405: f"{request.method} is not allowed here"}
  return _error(ApiError(e.status_code, known.get(e.status_code, e.detail), headers=dict(e.headers or {})))


async def _unexpected(request: Request, e: Exception) -> Response:
  return _error(_as_api_error(e))
